"""The training step: the same numbers on any mesh, in any number of parts, packed or not."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from gemma_jax.config import PRESETS, OptimizerConfig, PretrainConfig, TransformerConfig, replace
from gemma_jax.data.packing import Batch
from gemma_jax.sharding import named_arrays, put_batch, with_arrays
from gemma_jax.testing import assert_same, assert_same_on_meshes, cpu_mesh
from gemma_jax.training.evaluation import mean_over
from gemma_jax.training.objectives import held_out_loss, pretraining
from gemma_jax.training.optimizer import GROWS_AFTER, MOST_SCALE, LossScaled, learning_rate_schedule
from gemma_jax.training.state import TrainState, abstract_train_state, create_train_state
from gemma_jax.training.step import TrainStep, make_train_step, sums_and_gradients
from gemma_jax.weights import NO_CONTEXT

B, L = 8, 24
CONFIG = PretrainConfig(
    steps=10, model=PRESETS["gemma_tiny"], optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
)
FLOAT64 = {"compute.dtype": "float64", "compute.param_dtype": "float64"}


def packed_batch(model: TransformerConfig, seed: int = 0) -> Batch:
    """Rows of two segments with padding of various lengths at the end, as numpy arrays [B, L]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.vocab_size, (B, L)).astype(np.int32)
    targets = rng.integers(0, model.vocab_size, (B, L)).astype(np.int32)
    positions, segments = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    for row in range(B):
        cut, end = 5 + row, L - 2 * (row % 4)
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
        segments[row, :cut], segments[row, cut:end] = 1, 2
    return Batch(tokens, targets, (segments > 0).astype(np.float32), positions, segments)


def begin(config: PretrainConfig, mesh: Mesh) -> tuple[TrainState, TrainStep]:
    recipe = pretraining(config, mesh)
    return create_train_state(recipe), make_train_step(recipe)


def gradients_of(config: PretrainConfig, mesh: Mesh):
    return jax.jit(sums_and_gradients(pretraining(config, mesh)))


def three_steps(config: PretrainConfig, mesh: Mesh):
    """First loss and gradients, then losses and parameters of three steps."""
    state, step = begin(config, mesh)
    first = put_batch(packed_batch(config.model), B, mesh)
    _, sums, grads = gradients_of(config, mesh)(state.params, first)
    results = [sums["loss"].mean, grads]
    for seed in range(3):
        state, metrics = step(state, put_batch(packed_batch(config.model, seed), B, mesh))
        results += [metrics["loss"], metrics["grad_norm"]]
    return [*results, state.params]


ALL_AXES = {"slices": 2, "fsdp": 2, "tensor": 2}
FEWER_AXES = [
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize(
    "meshes", [[ALL_AXES], pytest.param(FEWER_AXES, marks=pytest.mark.slow)], ids=["all axes", "fewer"]
)
def test_loss_gradients_and_steps_on_eight_devices_equal_those_on_one(meshes: list[dict[str, int]]) -> None:
    devices = [cpu_mesh(1), *(cpu_mesh(8, **axes) for axes in meshes)]
    with jax.enable_x64(True):
        assert_same_on_meshes(lambda mesh: three_steps(replace(CONFIG, FLOAT64), mesh), devices, 1e-10)


def test_one_key_value_head_is_copied_to_every_tensor_device() -> None:
    config = replace(CONFIG, {"model.num_kv_heads": 1, **FLOAT64})
    with jax.enable_x64(True):
        assert_same_on_meshes(
            lambda mesh: three_steps(config, mesh), [cpu_mesh(1), cpu_mesh(8, fsdp=2, tensor=4)], 1e-10
        )


@pytest.mark.slow
def test_accumulation_equals_the_large_batch() -> None:
    """Parts hold different numbers of weighted targets, so a mean of means would be wrong."""
    mesh = cpu_mesh(2)
    with jax.enable_x64(True):
        whole = three_steps(replace(CONFIG, FLOAT64), mesh)
        for parts in (2, 4):
            in_parts = three_steps(replace(CONFIG, {"optimizer.accumulation_steps": parts, **FLOAT64}), mesh)
            assert_same(in_parts, whole, 1e-10)


def test_packed_rows_give_the_loss_and_gradients_of_the_same_segments_alone() -> None:
    packed = packed_batch(CONFIG.model)
    alone = []
    for row in range(B):
        for segment in (1, 2):
            where = packed.segment_ids[row] == segment
            fields = [np.zeros(L, x.dtype) for x in packed]
            for field, source in zip(fields, packed, strict=True):
                field[: where.sum()] = source[row][where]
            fields[4] = np.minimum(fields[4], 1)
            alone.append(fields)
    separate = Batch(*(np.stack(column) for column in zip(*alone, strict=True)))
    assert separate.loss_weights.sum() == packed.loss_weights.sum()
    with jax.enable_x64(True):
        config, mesh = replace(CONFIG, FLOAT64), cpu_mesh(1)
        params = create_train_state(pretraining(config, mesh)).params
        run = gradients_of(config, mesh)
        assert_same(run(params, separate), run(params, packed), 1e-10)


def test_the_step_keeps_shardings_and_reuses_the_memory_of_its_state() -> None:
    mesh = cpu_mesh(4, fsdp=2, tensor=2)
    abstract = abstract_train_state(pretraining(CONFIG, mesh))
    batch = put_batch(packed_batch(CONFIG.model), B, mesh)
    compiled = make_train_step(pretraining(CONFIG, mesh)).lower(abstract, batch).compile()
    state_bytes = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract)
    )
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    state, step = begin(CONFIG, mesh)
    state, _ = step(state, batch)
    for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert actual.sharding.is_equivalent_to(wanted.sharding, actual.ndim)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "warmup-stable-decay", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(10, 100), (0, 5), (1, 5), (3, 5)])
def test_schedules_rise_to_the_peak_and_end_at_the_final_rate(schedule: str, warmup: int, steps: int) -> None:
    config = OptimizerConfig(
        schedule=schedule, learning_rate=2.0, warmup_steps=warmup, final_fraction=0.1, decay_fraction=0.4
    )
    rate = [float(learning_rate_schedule(config, steps)(step)) for step in range(steps)]
    np.testing.assert_allclose(rate[:warmup], 2.0 / max(warmup, 1) * np.arange(1, warmup + 1), rtol=1e-6)
    assert max(rate) == pytest.approx(2.0)
    assert rate[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    falling = rate[max(warmup, 1) - 1 :]
    if schedule in ("cosine", "linear"):
        assert all(later < earlier for earlier, later in zip(falling, falling[1:], strict=False))
    if schedule == "warmup-stable-decay":
        assert rate[-round(0.4 * steps) - 1] == pytest.approx(2.0) and rate[-2] > rate[-1]


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "lion"))]
)
def test_every_optimizer_lowers_the_loss_on_a_mesh(name: str) -> None:
    rate = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 1e-3}[name]
    changes = {
        "optimizer.name": name,
        "optimizer.learning_rate": rate,
        "optimizer.warmup_steps": 0,
        "steps": 40,
    }
    config = replace(CONFIG, changes)
    mesh = cpu_mesh(4, fsdp=2, tensor=2)
    state, step = begin(config, mesh)
    batch = put_batch(packed_batch(config.model), B, mesh)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


def test_gradients_are_clipped_by_their_global_norm() -> None:
    """With plain sums of squares in Adam's moments after one step, clipping scales the first moment."""
    mesh, batch = cpu_mesh(1), packed_batch(CONFIG.model)
    config = replace(CONFIG, {"optimizer.clip_norm": 0.25})
    state, step = begin(config, mesh)
    *_, grads = gradients_of(config, mesh)(state.params, batch)
    state, metrics = step(state, batch)
    assert float(metrics["grad_norm"]) > 0.25
    moments = {n.split(".mu.")[1]: v for n, v in named_arrays(state.opt_state).items() if ".mu." in n}
    factor = 0.25 / float(metrics["grad_norm"]) * (1 - config.optimizer.b1)
    assert_same(moments, jax.tree.map(lambda g: g * factor, named_arrays(grads)), 1e-5)


@pytest.mark.parametrize("rows", [B, B + 5])
def test_held_out_loss_counts_nats_tokens_and_bytes_of_all_batches(rows: int) -> None:
    mesh, batch = cpu_mesh(2), packed_batch(CONFIG.model)
    recipe = pretraining(CONFIG, mesh)
    params = create_train_state(recipe).params
    token_bytes = np.arange(CONFIG.model.vocab_size, dtype=np.int32) % 7
    batches = [batch, packed_batch(CONFIG.model, 1)] if rows > B else [batch]
    measured = mean_over(recipe.model, held_out_loss(token_bytes), lambda: batches, B)(params, lambda: False)
    assert measured is not None
    run = gradients_of(CONFIG, mesh)
    sums = [run(params, put_batch(b, B, mesh))[1]["loss"] for b in batches]
    nats = sum(float(s.total) for s in sums)
    assert measured["held_out_loss"] == pytest.approx(
        nats / sum(b.loss_weights.sum() for b in batches), rel=1e-5
    )
    text = sum((b.loss_weights * token_bytes[b.targets]).sum() for b in batches)
    assert measured["held_out_bits_per_byte"] == pytest.approx(nats / np.log(2) / text, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(name: str) -> None:
    config = replace(CONFIG, {"optimizer.name": name})
    mesh = cpu_mesh(4, fsdp=2, tensor=2)
    state, step = begin(config, mesh)
    good = packed_batch(config.model)
    weights = good.loss_weights.copy()
    weights[0, 0] = np.nan
    state, _ = step(state, put_batch(good, B, mesh))
    before = jax.device_get(named_arrays(state))
    state, metrics = step(state, put_batch(good._replace(loss_weights=weights), B, mesh))
    assert not np.isfinite(metrics["loss"]) and int(state.step) == 2
    for path, after in named_arrays(state).items():
        if np.issubdtype(after.dtype, np.integer):
            assert after == before[path] + 1, path
        else:
            np.testing.assert_array_equal(after, before[path], err_msg=path)
    state, metrics = step(state, put_batch(good, B, mesh))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert metrics["learning_rate"] == learning_rate_schedule(config.optimizer, config.steps)(2)


def test_float16_scales_its_loss() -> None:
    """A scale that lets gradients overflow is halved until none does, nothing else changes, then it grows."""
    config = replace(CONFIG, {"compute.dtype": "float16"})
    mesh = cpu_mesh(4, fsdp=2, tensor=2)
    state, step = begin(config, mesh)
    batch = put_batch(packed_batch(config.model), B, mesh)
    assert isinstance(state.opt_state, LossScaled)
    _, sums, expected = gradients_of(replace(CONFIG, {"compute.dtype": "float32"}), mesh)(state.params, batch)
    scaled = gradients_of(config, mesh)(state.params, batch, NO_CONTEXT, state.opt_state.scale)
    assert_same(jax.tree.map(lambda x: x / state.opt_state.scale, scaled[2]), expected, 1e-2)
    too_large = state.opt_state._replace(scale=jnp.full_like(state.opt_state.scale, MOST_SCALE))
    state = dataclasses.replace(state, opt_state=too_large)
    before, scales = jax.device_get(state.trainable), [MOST_SCALE]
    while True:
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"]) and metrics["loss_scale"] == scales[-1]
        if np.isfinite(metrics["grad_norm"]):
            break
        assert_same(state.trainable, before, 0)
        scales.append(float(state.opt_state.scale))
        assert scales[-1] == scales[-2] / 2
    assert len(scales) > 2
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-2)
    due = state.opt_state._replace(finite=jnp.full_like(state.opt_state.finite, GROWS_AFTER - 1))
    state, _ = step(dataclasses.replace(state, opt_state=due), batch)
    assert (float(state.opt_state.scale), int(state.opt_state.finite)) == (2 * scales[-1], 0)


def test_float16_accumulates_means() -> None:
    """A factor of the loss suits any number of tokens, and sums over tokens may exceed float16."""
    half, mesh = {"compute.dtype": "float16"}, cpu_mesh(1)
    batch = packed_batch(CONFIG.model)
    batch = put_batch(batch._replace(targets=np.full_like(batch.targets, 7)), B, mesh)
    params = begin(replace(CONFIG, half), mesh)[0].params
    arrays = named_arrays(params)
    params = with_arrays(params, arrays | {"final_norm": arrays["final_norm"] + 1500})
    first, _, expected = gradients_of(replace(CONFIG, {"compute.dtype": "float32"}), mesh)(params, batch)
    assert first.weight * jnp.max(jnp.abs(named_arrays(expected)["embedding"])) > 65_504
    for parts in (1, 4):
        config = replace(CONFIG, half | {"optimizer.accumulation_steps": parts})
        _, _, found = gradients_of(config, mesh)(params, batch, NO_CONTEXT, 0.25)
        assert_same(jax.tree.map(lambda x: x / 0.25, found), expected, 1e-2)


@pytest.mark.parametrize("vocab_block", [0, 128])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_products_of_float32_are_of_full_precision(platform: str, vocab_block: int) -> None:
    """No pass in TF32 or bfloat16 without being asked for: every product of the program says so."""
    config = replace(CONFIG, {"compute.dtype": "float32", "compute.loss_vocab_block": vocab_block})
    mesh = cpu_mesh(1)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed_batch(config.model))
    traced = gradients_of(config, mesh).trace(pretraining(config, mesh).model.params, batch)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.dot.*", program)
    # Of a block: 7 with a weight and 2 of attention, each once more for both gradients; the loss has 3 or 4.
    assert len(products) >= 9 * 3 + 3
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_a_first_moment_of_half_the_bytes(rule: str) -> None:
    """It is stored in bfloat16, and a step differs from the whole one by its rounding only."""
    whole = replace(CONFIG, {"optimizer.name": rule})
    half = replace(whole, {"optimizer.first_moment_dtype": "bfloat16"})
    mesh = cpu_mesh(1)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(abstract_train_state(pretraining(half, mesh)).opt_state)}
    assert jnp.dtype(jnp.bfloat16) in dtypes

    def after_two_steps(config: PretrainConfig) -> dict[str, np.ndarray]:
        state, step = begin(config, mesh)
        for seed in range(2):
            state, _ = step(state, put_batch(packed_batch(config.model, seed), B, mesh))
        return jax.device_get(named_arrays(state.params))

    if rule == "adamw":  # a sign, as Lion takes it, may turn over by a rounding
        assert_same(after_two_steps(half), after_two_steps(whole), 1e-2)
