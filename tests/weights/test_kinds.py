"""Kinds of weight that only these tests define train, sample, shard, load and save as the dense one does."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gemma_jax import Gemma
from gemma_jax.checkpoint.record import RunRecord, run_record
from gemma_jax.checkpoint.restore import load_params
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    ComputeConfig,
    OptimizerConfig,
    PretrainConfig,
    replace,
    to_dict,
)
from gemma_jax.data.packing import Batch
from gemma_jax.model import ModelSpec
from gemma_jax.model.scoring import token_log_probs
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.pretrained.export import PlacedWeights
from gemma_jax.sharding import named_arrays, put_batch, with_arrays
from gemma_jax.testing import assert_same, assert_same_on_meshes, cpu_mesh
from gemma_jax.training.loss import LossSettings, next_token_loss
from gemma_jax.training.objectives import Recipe, next_token
from gemma_jax.training.optimizer import make_optimizer
from gemma_jax.training.state import TrainState, abstract_train_state, create_train_state
from gemma_jax.training.step import make_train_step
from gemma_jax.weights import Context, Quantization, Weight, parameter_table
from tests.pretrained.published import MULTI_QUERY, random_tensors, write_huggingface
from tests.weights.kinds import adapters, dense_weight, is_adapter, with_random_adapters

# Every dimension that a mesh of eight may split is divisible by it.
CONFIG = replace(PRESETS["gemma_tiny"], {"num_kv_heads": 1})
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 12))
POSITIONS, SEGMENTS = np.broadcast_to(np.arange(12), (8, 12)), np.ones((8, 12), np.int32)
INT8 = Quantization("int8")
MESHES = (cpu_mesh(1), cpu_mesh(8, data=2, fsdp=2, tensor=2))


def spec_of(kind: Any, mesh: Mesh) -> ModelSpec:
    return ModelSpec(CONFIG, ComputeConfig(loss_vocab_block=64), mesh, kind)


def adapted(mesh: Mesh, kind: Any = None) -> tuple[ModelSpec, Any]:
    """A model with adapters, and random parameters."""
    spec = spec_of(kind or adapters(), mesh)
    return spec, with_random_adapters(spec.init(0), 1)


def log_probs(spec: ModelSpec, params: Any, context: Context = Context()) -> jax.Array:  # noqa: B008
    """Returns the log-probability of each token in the rows of TOKENS, given the tokens before it."""

    def scored(params: Any, context: Context) -> jax.Array:
        model = spec.merge(params)
        hidden = model(TOKENS[:, :-1], POSITIONS[:, :-1], SEGMENTS[:, :-1], context)
        return token_log_probs(model, hidden, TOKENS[:, 1:])

    return jax.jit(scored)(params, context)


def densified(spec: ModelSpec, params: Any, adapter: int | None = None) -> tuple[ModelSpec, Any]:
    """The dense model that computes the same, layer by layer."""
    held = {name: np.asarray(x, np.float64) for name, x in named_arrays(params).items()}
    dense, placed = ModelSpec(spec.config, spec.compute, spec.mesh), PlacedWeights(params, spec)
    arrays: dict[str, np.ndarray] = {}
    for name, about in parameter_table(spec.config).items():
        layers = range(about.layers) if about.layers else [None]
        arrays[name] = np.stack([placed.get(name, layer) for layer in layers]).reshape(about.stacked_shape)
        if adapter is not None and f"{name}.a" in held:
            a, b = held[f"{name}.a"][:, adapter], held[f"{name}.b"][:, adapter]
            low = np.einsum("lir,lro->lio", a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1))
            arrays[name] = arrays[name] + low.reshape(about.stacked_shape)
    return dense, with_arrays(dense.params, {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()})


def test_each_row_has_its_own_adapter() -> None:
    kind = adapters(count=2)
    chosen = np.array([0, 1, 1, 0, -1, 0, 0, 1], np.int32)

    def on(mesh: Mesh) -> jax.Array:
        return log_probs(*adapted(mesh, kind), Context(adapters=jnp.asarray(chosen)))

    assert_same_on_meshes(on, MESHES)
    spec, params = adapted(MESHES[0], kind)
    each = [np.asarray(log_probs(*densified(spec, params, adapter))) for adapter in (0, 1, None)]
    assert np.abs(each[0] - each[1]).max() > 0.01
    assert_same(on(MESHES[0]), np.choose(chosen[:, None] % 3, each), 1e-5)


def test_dropout_differs_by_layer_and_key_and_not_by_mesh() -> None:
    kind = adapters(dropout=0.5)

    def on(mesh: Mesh, key: int | None = 0) -> jax.Array:
        spec, params = adapted(mesh, kind)
        return log_probs(spec, params, Context(None if key is None else jax.random.key(key)))

    assert_same_on_meshes(on, MESHES)
    assert np.abs(on(MESHES[0]) - on(MESHES[0], 1)).max() > 1e-3
    spec, params = adapted(MESHES[0], kind)
    assert_same(on(MESHES[0], None), log_probs(*densified(spec, params, 0)), 1e-5)
    layers = [jax.random.key_data(Context(jax.random.key(0)).of_layer(jnp.int32(i)).key) for i in (0, 1)]
    assert (layers[0] != layers[1]).any()


def gradients(spec: ModelSpec, params: Any, names: Collection[str]) -> dict[str, jax.Array]:
    """Returns the gradients of the loss with respect to some arrays only."""
    arrays = named_arrays(params)

    def loss(trained: dict[str, jax.Array], arrays: dict[str, jax.Array]) -> jax.Array:
        model = spec.merge(with_arrays(spec.params, arrays | trained))
        hidden = model(TOKENS[:, :-1], POSITIONS[:, :-1], SEGMENTS[:, :-1])
        weights = np.ones((8, 11), np.float32)
        settings = LossSettings(CONFIG.vocab_size, 256, spec.compute.loss_vocab_block, 0.0)
        return next_token_loss(hidden, model.embedding, TOKENS[:, 1:], weights, settings)[0]

    return jax.jit(jax.grad(loss))({name: arrays[name] for name in names}, arrays)


@pytest.mark.parametrize("vocab_block", [0, 64])
def test_adapters_over_frozen_integers_have_the_gradients_of_dense_weights(vocab_block: int) -> None:
    def on(mesh: Mesh) -> dict[str, jax.Array]:
        spec = ModelSpec(CONFIG, ComputeConfig(loss_vocab_block=vocab_block), mesh, adapters())
        params = with_random_adapters(spec.init(0), 1)
        return gradients(spec, params, [name for name in named_arrays(params) if is_adapter(name)])

    assert_same_on_meshes(on, MESHES)
    # d loss / d b is a^T d loss / d W, and d loss / d a is d loss / d W b^T, of the merged dense model.
    spec, params = adapted(MESHES[0])
    d_dense = gradients(*densified(spec, params, 0), parameter_table(CONFIG).keys())
    held, found = named_arrays(params), on(MESHES[0])
    for name, about in parameter_table(CONFIG).items():
        if about.inputs:
            layers, inward = about.layers, int(np.prod(about.shape[: about.inputs]))
            d = np.asarray(d_dense[name]).reshape(layers, inward, -1)
            a = np.asarray(held[f"{name}.a"]).reshape(layers, inward, -1)
            b = np.asarray(held[f"{name}.b"]).reshape(layers, a.shape[-1], -1)
            assert_same(found[f"{name}.b"].reshape(b.shape), np.einsum("lir,lio->lro", a, d), 1e-4)
            assert_same(found[f"{name}.a"].reshape(a.shape), np.einsum("lio,lro->lir", d, b), 1e-4)


def test_what_has_no_gradient_must_be_frozen() -> None:
    """Silence would train an embedding, or a weight in parts, by a gradient of zero."""
    spec = spec_of(INT8, cpu_mesh(8))

    def loss(scale: jax.Array, of: str) -> jax.Array:
        arrays = named_arrays(spec.init(0)) | {f"{of}.scale": scale}
        model = spec.merge(with_arrays(spec.params, arrays))
        hidden = model(TOKENS, POSITIONS, SEGMENTS)
        settings = LossSettings(CONFIG.vocab_size, 256, 0, 0.0)
        return next_token_loss(hidden, model.embedding, TOKENS, SEGMENTS * 1.0, settings)[0]

    for name in ("embedding", "blocks.attention.q"):
        scale = jnp.ones(named_arrays(spec.params)[f"{name}.scale"].shape)
        with pytest.raises(ValueError, match=name):
            jax.grad(loss)(scale, name)


def test_samples_are_the_same_on_one_and_on_eight_devices() -> None:
    texts = []
    for mesh in MESHES:
        gemma = Gemma(*adapted(mesh), None)
        settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}
        texts.append([g.token_ids for g in gemma.generate([[2, 5, 6], [2, 9]], **settings)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mesh", MESHES, ids=["one", "eight"])
def test_published_weights_are_packed_layer_by_layer_when_loaded(tmp_path: Path, mesh: Mesh) -> None:
    write_huggingface(tmp_path, MULTI_QUERY, random_tensors(MULTI_QUERY))
    found = open_checkpoint(tmp_path)
    spec = ModelSpec(found.config, ComputeConfig(), mesh, Quantization("int8"))
    loaded = named_arrays(found.params(spec))
    dense = named_arrays(found.params(ModelSpec(found.config, ComputeConfig(), mesh)))
    for name, about in parameter_table(found.config).items():
        if about.fan_in:
            holder = spec.weight(name)
            assert isinstance(holder, Weight)
            layers = [holder.pack(x) for x in (dense[name] if about.layers else dense[name][None])]
            for key in layers[0]:
                packed = jnp.stack([layer[key] for layer in layers])
                np.testing.assert_array_equal(
                    loaded[f"{name}.{key}"], packed.reshape(loaded[f"{name}.{key}"].shape)
                )


def test_a_dense_weight_gets_no_gradient_where_it_is_frozen() -> None:
    """The compiled gradient of the activations alone neither sums nor scatters anything for the weight."""
    mesh = cpu_mesh(8)
    x, w = jnp.ones((8, 4, 32)), jnp.ones((32, 64))

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(dense_weight(w, ("embed", "mlp"), mesh, 1).matmul(x, Context()) ** 2)

    def scatters(argnums: Any) -> int:
        return jax.jit(jax.grad(loss, argnums)).lower(x, w).as_text().count("reduce_scatter")

    assert scatters(0) == 0 < scatters((0, 1))


@pytest.mark.slow
def test_adapters_train_while_their_base_is_frozen_and_in_no_checkpoint(tmp_path: Path) -> None:
    config = PretrainConfig(
        steps=20,
        model=CONFIG,
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule="constant"),
    )
    rows = (TOKENS[:, :-1], TOKENS[:, 1:], np.ones((8, 11), np.float32), POSITIONS[:, :-1], SEGMENTS[:, :-1])
    batch = Batch(*(np.ascontiguousarray(x) for x in rows))

    def recipe_of(mesh: Mesh) -> Recipe:
        optimizer = make_optimizer(config.optimizer, config.steps)
        spec = spec_of(adapters(dropout=0.1), mesh)
        return Recipe(config, spec, next_token(config), optimizer, is_adapter, random=True)

    recipe = recipe_of(MESHES[1])
    state = create_train_state(recipe)
    frozen = {name: np.asarray(x) for name, x in named_arrays(state.frozen).items()}
    step, losses = make_train_step(recipe), []
    for _ in range(6):
        state, metrics = step(state, put_batch(batch, 8, MESHES[1]))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    for name, x in named_arrays(state.frozen).items():
        np.testing.assert_array_equal(x, frozen[name], err_msg=name)
    # Goes on from its checkpoint on another mesh, where the base comes from elsewhere.
    position = RunRecord(step=6, rows_seen=48, config=to_dict(config))
    with CheckpointStore(tmp_path, config.checkpoint) as store:
        store.save(position, state.parts)
    assert all(is_adapter(name) for name in run_record(tmp_path / "checkpoints" / "6").arrays["params"])
    other = recipe_of(MESHES[0])
    with CheckpointStore(tmp_path, config.checkpoint) as store:
        restored = store.restore(abstract_train_state(other).parts)
    assert restored is not None
    begun = create_train_state(other)
    parts, record = restored
    resumed = TrainState(jnp.int32(record.step), begun.frozen, parts["params"], parts["opt_state"])
    _, here = step(state, put_batch(batch, 8, MESHES[1]))
    _, there = make_train_step(other)(resumed, put_batch(batch, 8, MESHES[0]))
    assert_same(there["loss"], here["loss"], 1e-5)


def test_a_model_of_any_kind_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    spec, params = adapted(MESHES[1])
    with CheckpointStore(tmp_path, CheckpointConfig()) as store:
        config = to_dict(PretrainConfig(model=CONFIG))
        store.save(RunRecord(step=1, rows_seen=0, config=config), {"params": params})
    folder = tmp_path / "checkpoints" / "1"
    loaded = named_arrays(load_params(folder, run_record(folder), spec_of(adapters(), MESHES[0])))
    for name, x in named_arrays(params).items():
        assert loaded[name].dtype == x.dtype
        np.testing.assert_array_equal(loaded[name], x, err_msg=name)
