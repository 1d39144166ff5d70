"""A task of its own on the public pieces: another objective, a frozen base, and what else a run must do."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gemma_jax.checkpoint.record import run_record
from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    replace,
)
from gemma_jax.data.loader import prepare
from gemma_jax.data.packing import Batch
from gemma_jax.errors import RESTART_STATUS, UserError
from gemma_jax.model import Transformer
from gemma_jax.sharding import named_arrays, put_batch
from gemma_jax.testing import cpu_mesh
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.evaluation import Evaluator
from gemma_jax.training.loss import LossSettings, next_token_loss
from gemma_jax.training.metrics import read_metrics
from gemma_jax.training.objectives import Recipe, Sums, WeightedSum, pretraining
from gemma_jax.training.optimizer import make_optimizer
from gemma_jax.training.run import Task, run_training
from gemma_jax.training.run_directory import as_existing
from gemma_jax.training.state import abstract_train_state
from gemma_jax.training.step import make_train_step, sums_and_gradients
from gemma_jax.weights import Context
from tests.messages import naming

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho".split()  # noqa: SIM905
TRAINED = {"blocks.attention.q", "final_norm"}
CONFIG = PretrainConfig(
    steps=8,
    model=replace(PRESETS["gemma_tiny"], {"vocab_size": 430}),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, accumulation_steps=2),
    mesh=MeshConfig(cpu_devices=2),
    checkpoint=CheckpointConfig(every=4),
    logging=LoggingConfig(every=1),
)


def lucky_targets(model: Transformer, batch: Batch, context: Context) -> Sums:
    """Cross entropy of every other target, each row weighted by a random number."""
    assert context.key is not None
    hidden = model(batch.tokens, batch.positions, batch.segment_ids, context)
    luck = jax.random.uniform(context.key, batch.targets.shape[:1])
    weights = batch.loss_weights * (batch.targets % 2) * luck[:, None]
    settings = LossSettings(model.config.vocab_size, 16, 0, 0.0)
    loss, _ = next_token_loss(hidden, model.embedding, batch.targets, weights, settings)
    rows = jnp.float32(len(luck))
    return {"loss": WeightedSum(loss, jnp.sum(weights)), "chance": WeightedSum(jnp.sum(luck), rows)}


def recipe_of(config: PretrainConfig, mesh: Mesh) -> Recipe:
    optimizer = make_optimizer(config.optimizer, config.steps)
    return Recipe(
        config, pretraining(config, mesh).model, lucky_targets, optimizer, TRAINED.__contains__, True
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 80)), encoding="utf-8")
    data = DataConfig(
        sources=(f"{folder}/*.txt",), sequence_length=32, batch_size=8, cache_dir=str(folder / "cache")
    )
    texts = (" ".join(rng.choice(WORDS, 80)) for _ in range(60))
    Tokenizer.train(texts, 430, folder / "tokenizer.model")
    return replace(
        CONFIG,
        {"tokenizer.path": str(folder / "tokenizer.model"), "data.cache_dir": data.cache_dir}
        | {"data.sources": data.sources, "data.sequence_length": 32, "data.batch_size": 8},
    )


def train(config: PretrainConfig, run_dir: Path, measure: Callable[[Any], None]) -> int:
    """Runs the task; `measure` is called with all parameters after every step."""
    config = as_existing(replace(config, {"run_dir": str(run_dir)}))

    def choose(config: PretrainConfig, mesh: Mesh) -> Task:
        recipe = recipe_of(config, mesh)
        tokenizer = Tokenizer.load(config.tokenizer.path)
        evaluator = Evaluator(
            "seen", 1, lambda params, stop: measure(jax.device_get(named_arrays(params))) or {}
        )
        dataset = prepare(config.data, tokenizer, config.seed)
        return Task(recipe, dataset, tokenizer, [evaluator], initial=lambda: recipe.model.init(7))

    return run_training(config, choose, time.monotonic())


def test_a_frozen_base_and_another_objective(config: PretrainConfig, tmp_path: Path) -> None:
    seen: list[dict[str, np.ndarray]] = []
    assert train(config, tmp_path / "whole", seen.append) == 0
    base = jax.device_get(named_arrays(recipe_of(config, cpu_mesh(2)).model.init(7)))
    for name, value in base.items():
        unchanged = [np.array_equal(params[name], value) for params in seen]
        assert unchanged == [name not in TRAINED] * 8, name

    # Stopped by a signal after three steps, and resumed.
    steps = iter(range(1, 9))
    stop = lambda _: os.kill(os.getpid(), signal.SIGTERM) if next(steps) == 3 else None  # noqa: E731
    assert train(config, tmp_path / "parts", stop) == RESTART_STATUS
    assert train(config, tmp_path / "parts", seen.append) == 0
    for name, value in seen[7].items():
        np.testing.assert_array_equal(seen[-1][name], value, err_msg=name)
    numbers = [
        [
            (e["step"], e["loss"], e["chance"], e["grad_norm"])
            for e in read_metrics(tmp_path / run)
            if "loss" in e
        ]
        for run in ("whole", "parts")
    ]
    assert numbers[0] == numbers[1] and len({luck for _, _, luck, _ in numbers[0]}) == 8

    # A checkpoint holds what is trained alone.
    record = run_record(tmp_path / "whole" / "checkpoints" / "8")
    assert record.arrays["params"].keys() == TRAINED
    moments = [name for name, array in record.arrays["opt_state"].items() if array.shape]
    assert len(moments) == 2 * len(TRAINED) and all(any(t in m for t in TRAINED) for m in moments)


def test_what_is_frozen_costs_no_gradient(config: PretrainConfig) -> None:
    mesh = cpu_mesh(2)
    batch = put_batch(Batch(*(np.ones((8, 32), t) for t in ("i4", "i4", "f4", "i4", "i4"))), 8, mesh)
    config = replace(config, {"optimizer.accumulation_steps": 1})
    frozen, whole = recipe_of(config, mesh), pretraining(config, mesh)
    key = Context(jax.random.key(0))
    first, sums, gradients = jax.jit(sums_and_gradients(frozen))(frozen.model.init(0), batch, key)
    assert named_arrays(gradients).keys() == TRAINED
    # The first sum is minimised, whatever its name.
    assert float(first.weight) == float(sums["loss"].weight) != float(sums["chance"].weight)
    flops = []
    for recipe in (frozen, whole):
        state = abstract_train_state(recipe)
        compiled = make_train_step(recipe).lower(state, batch).compile()
        flops.append(compiled.cost_analysis()["flops"])
        results = jax.tree.leaves(jax.tree.map(lambda x: x.size, state))
        assert compiled.memory_analysis().alias_size_in_bytes >= 4 * sum(results) / mesh.size / 2
    assert flops[0] < 0.8 * flops[1]


def test_overwriting_deletes_a_run_and_nothing_else(config: PretrainConfig, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "final.tex").write_text("x")
    config = replace(config, {"existing_run": "overwrite", "steps": 2})
    with pytest.raises(UserError, match=naming(home, "thesis", "--run_dir")):
        train(config, home, lambda params: None)
    # Beside a run it stays, when the run is deleted.
    assert train(replace(config, {"existing_run": "resume"}), home, lambda params: None) == 0
    (home / "loss.png").write_text("old")
    (home / "metrics.jsonl").write_text('{"step": 1, "loss": 77.0}\n')
    assert train(replace(config, {"seed": 1}), home, lambda params: None) == 0
    assert 77.0 not in [entry.get("loss") for entry in read_metrics(home)]
    assert (home / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (home / "thesis" / "final.tex").read_text() == "x"
