"""Fine-tuning minimises what it should, over the positions that it should, and changes only adapters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gemma_jax.config import (
    PRESETS,
    ComputeConfig,
    ExampleDataConfig,
    FinetuneConfig,
    LoraConfig,
    OptimizerConfig,
    PreferenceConfig,
    replace,
)
from gemma_jax.data.packing import Batch, PairBatch, empty_rows, fill_row
from gemma_jax.errors import UserError
from gemma_jax.sharding import named_arrays, put_batch, with_arrays
from gemma_jax.testing import assert_same, assert_same_on_meshes, cpu_mesh
from gemma_jax.training.finetuning import finetuning, held_out_answers
from gemma_jax.training.objectives import Recipe
from gemma_jax.training.state import create_train_state
from gemma_jax.training.step import make_train_step, sums_and_gradients
from gemma_jax.weights import NO_CONTEXT, is_trained, kind_of
from tests.messages import naming

BOS, LENGTH = 2, 48
CONFIG = FinetuneConfig(
    steps=4,
    model=replace(PRESETS["gemma_tiny"], {"num_kv_heads": 1}),
    data=ExampleDataConfig(sequence_length=LENGTH, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0),
    lora=LoraConfig(rank=4, alpha=8, embedding_rows=(5, 6, 300)),
    compute=ComputeConfig(loss_block=16),
)


def examples(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids with weights: the last third of each example is trained."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(6, 13, count):
        ids, weights = rng.integers(4, 12, length), np.zeros(length, np.float32)
        weights[-(length // 3) :] = 1
        made.append((ids, weights))
    return made


def rows_of(groups: list[list[tuple[np.ndarray, np.ndarray]]]) -> Batch:
    batch = empty_rows(len(groups), LENGTH, 0)
    for row, group in enumerate(groups):
        fill_row(batch, row, [ids for ids, _ in group], BOS, [weights for _, weights in group])
    return batch


def recipe_of(config: FinetuneConfig, mesh: Mesh, positions: int = LENGTH, base: str = "") -> Recipe:
    return finetuning(config, mesh, kind_of(base), positions, 4)


def changed(recipe: Recipe) -> Any:
    """Parameters in which the adapters do something, and differ from their reference."""
    arrays = {}
    for name, x in named_arrays(recipe.model.init(0)).items():
        rng = np.random.default_rng(sum(map(ord, name)))
        noise = (
            0.1 * rng.normal(size=x.shape).astype(np.float32)
            if is_trained(name.replace("reference_", ""))
            else 0
        )
        arrays[name] = jax.device_put(x + jnp.asarray(noise, x.dtype), x.sharding)
    return with_arrays(recipe.model.params, arrays)


def measured(recipe: Recipe, batch: Any) -> tuple[Any, Any]:
    """All sums of the objective as means, and the gradients."""
    params = changed(recipe)
    fed = put_batch(batch, len(jax.tree.leaves(batch)[0]), recipe.model.mesh)
    _, sums, gradients = jax.jit(sums_and_gradients(recipe))(params, fed)
    return {name: x.mean for name, x in sums.items()}, named_arrays(gradients)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_packed_equals_separate(objective: str) -> None:
    made = examples(16)
    config = replace(CONFIG, {"objective": objective})
    packed = rows_of([made[i : i + 4] for i in range(0, 16, 4)])
    separate = rows_of([made[i : i + 2] for i in range(0, 16, 2)])
    if objective == "sft":
        separate = rows_of([[example] for example in made])
    most = int((packed.loss_weights > 0).sum(axis=1).max())
    assert most < LENGTH // 2
    # The first has only as many positions as are trained; the second computes the logits of all.
    first, second = recipe_of(config, cpu_mesh(1), most), recipe_of(config, cpu_mesh(1))
    one, other = measured(first, packed), measured(second, separate)
    assert_same(
        {k: v for k, v in one[0].items() if k != "tokens"},
        {k: v for k, v in other[0].items() if k != "tokens"},
        1e-5,
    )
    assert_same(one[1], other[1], 1e-5)


@pytest.mark.parametrize(("objective", "base"), [("sft", "nf4"), ("dpo", "int8")])
def test_eight_devices_equal_one(objective: str, base: str) -> None:
    config = replace(CONFIG, {"objective": objective, "model.embed_dim": 128, "model.head_dim": 64})
    batch = rows_of([examples(4, seed) for seed in range(8)])
    meshes = (cpu_mesh(1), cpu_mesh(8), cpu_mesh(8, data=2, fsdp=2, tensor=2))
    assert_same_on_meshes(lambda mesh: measured(recipe_of(config, mesh, 20, base), batch), meshes, 1e-5)


def test_trained_rows_equal_a_dense_table() -> None:
    """Loss and gradients are those of a model whose embedding holds the trained rows."""
    config = replace(CONFIG, {"lora.targets": ("q",), "compute.loss_vocab_block": 64})
    batch = rows_of([examples(4, seed) for seed in range(2)])
    recipe = recipe_of(config, cpu_mesh(1))
    params = named_arrays(changed(recipe))
    ids = np.array(CONFIG.lora.embedding_rows)
    with_rows = measured(recipe, batch)

    dense = recipe_of(replace(config, {"lora.embedding_rows": ()}), cpu_mesh(1))
    arrays = {
        name: params[name.replace("embedding", "embedding.base")] if name == "embedding" else params[name]
        for name in named_arrays(dense.model.params)
    }
    arrays["embedding"] = arrays["embedding"].at[ids].set(params["embedding.rows"][0])
    whole = dataclasses.replace(dense, trainable=lambda name: name == "embedding")
    fed = put_batch(batch, 2, whole.model.mesh)
    _, sums, gradients = jax.jit(sums_and_gradients(whole))(with_arrays(dense.model.params, arrays), fed)
    assert_same(with_rows[0]["loss"], sums["loss"].mean, 1e-6)
    assert_same(with_rows[1]["embedding.rows"][0], named_arrays(gradients)["embedding"][ids], 1e-5)

    model = recipe.model.merge(with_arrays(recipe.model.params, params))
    hidden = model(batch.tokens, batch.positions, batch.segment_ids)
    expected = dense.model.merge(with_arrays(dense.model.params, arrays)).logits(hidden)
    assert_same(model.logits(hidden), expected, 1e-6)
    found = held_out_answers(config, LENGTH)(model, batch, NO_CONTEXT)
    right = (np.argmax(expected, -1) == batch.targets)[batch.loss_weights > 0]
    assert_same(found["held_out_token_accuracy"].mean, right.mean(), 1e-6)


def test_dpo_follows_its_formula() -> None:
    """Against log-probabilities of whole rows of logits, one answer after the other."""
    config = replace(CONFIG, {"objective": "dpo", "dpo": PreferenceConfig(beta=0.3, label_smoothing=0.1)})
    made = examples(8)
    recipe = recipe_of(config, cpu_mesh(1), 20)
    params = changed(recipe)

    def log_prob(example: Any, reference: bool) -> float:
        batch = rows_of([[example]])
        context = dataclasses.replace(NO_CONTEXT, reference=reference)
        model = recipe.model.merge(params)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids, context)
        of_tokens = jax.nn.log_softmax(model.logits(hidden, context), axis=-1)
        taken = np.take_along_axis(np.asarray(of_tokens), batch.targets[..., None], -1)[..., 0]
        return float((taken * (batch.loss_weights > 0)).sum())

    policy = np.array([log_prob(example, False) for example in made])
    rewards = 0.3 * (policy - [log_prob(example, True) for example in made])
    margins = rewards[::2] - rewards[1::2]
    losses = 0.9 * np.log1p(np.exp(-margins)) + 0.1 * np.log1p(np.exp(margins))
    expected = {
        "loss": losses.mean(),
        "rewards/chosen": rewards[::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": policy[::2].mean(),
        "logps/rejected": policy[1::2].mean(),
    }
    found, gradients = measured(recipe, rows_of([made[:4], made[4:6], made[6:]]))
    assert_same({name: found[name] for name in expected}, expected, 2e-5)
    assert all(np.any(x) for x in gradients.values())

    # A reference in the batch, as full fine-tuning has it.
    batch = rows_of([made[:4], made[4:]])
    given = np.array([log_prob(example, True) for example in made], np.float32).reshape(2, 4)
    found, _ = measured(recipe, PairBatch(batch, given))
    assert_same(found["loss"], expected["loss"], 2e-5)


def test_a_step_computes_no_gradient_of_what_is_frozen() -> None:
    """No matmul of the step has the shape of a frozen matrix, and a step changes nothing of the base."""
    config = replace(CONFIG, {"model.hidden_dim": 80, "model.embed_dim": 48})  # shapes that nothing else has
    recipe = recipe_of(config, cpu_mesh(1), 20)
    state = create_train_state(recipe)
    batch = put_batch(rows_of([examples(4, seed) for seed in range(8)]), 8, recipe.model.mesh)
    text = make_train_step(recipe).lower(state, batch).as_text()  # type: ignore[attr-defined]
    made = [line.rpartition("->")[2] for line in text.splitlines() if "dot_general" in line]
    assert len(made) > 20
    wanted = ("tensor<48x80x", "tensor<80x48x", "tensor<48x64x", "tensor<64x48x", "tensor<512x48x")
    assert not [line for line in made if any(shape in line for shape in wanted)]
    full = dataclasses.replace(config, lora=LoraConfig())
    lowered = make_train_step(recipe_of(full, cpu_mesh(1), 20)).lower(  # type: ignore[attr-defined]
        create_train_state(recipe_of(full, cpu_mesh(1), 20)), batch
    )
    assert "tensor<48x80x" in lowered.as_text()

    before = jax.device_get(named_arrays(state.frozen))
    sizes = {name: x.size for name, x in named_arrays(state.trainable).items()}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size > 1]
    assert sum(x.size for x in moments) == 2 * sum(sizes.values())
    for _ in range(2):
        state, _ = make_train_step(recipe)(state, batch)
    for name, x in named_arrays(state.frozen).items():
        np.testing.assert_array_equal(x, before[name], err_msg=name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora.targets": ("q", "query")}, ("query", "attention.q", "feed_forward.down")),
        ({"lora.embedding_rows": (7, 512)}, (512, 511)),
    ],
)
def test_adapters_that_cannot_be(changes: dict[str, Any], named: tuple[object, ...]) -> None:
    with pytest.raises(UserError, match=naming(*named)):
        recipe_of(replace(CONFIG, changes), cpu_mesh(1))
