"""The loop around a step: what it saves, logs and does when a loss is not finite. The step is a stand-in."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax.checkpoint.record import RunRecord
from gemma_jax.config import PRESETS, PretrainConfig, replace
from gemma_jax.data.loader import BatchIterator
from gemma_jax.data.packing import Batch, empty_rows
from gemma_jax.errors import UserError
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.evaluation import Evaluator
from gemma_jax.training.goodput import Goodput
from gemma_jax.training.hardware import training_flops_a_token
from gemma_jax.training.loop import RunServices, Trainer
from gemma_jax.training.metrics import RunLog, read_metrics
from gemma_jax.training.stability import Stability
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import Metrics

CONFIG = replace(
    PretrainConfig(steps=10, model=PRESETS["gemma_tiny"]),
    {"data.batch_size": 2, "data.sequence_length": 8, "checkpoint.every": 4}
    | {"logging.every": 1, "stability.skip_nonfinite": 0},
)


class Store:
    """Remembers what is saved instead of writing it."""

    def __init__(self) -> None:
        self.positions: dict[int, RunRecord] = {}
        self.saved: dict[int, tuple[float, int]] = {}

    def save(self, position: RunRecord, parts: dict[str, Any]) -> None:
        self.positions[position.step] = position
        self.saved[position.step] = float(parts["params"]["w"].get_value()), position.rows_seen

    def wait(self) -> None:
        pass

    def steps(self) -> list[int]:
        return sorted(self.saved)


def state_of_step(step: int) -> TrainState:
    """A state whose only parameter is the number of steps done."""
    trainable = nnx.State({"w": nnx.Param(jnp.float32(step))})
    return TrainState(jnp.int32(step), nnx.State({}), trainable, jnp.float32(0))


def counting_step(
    loss: Callable[[int], float] = lambda step: 2.0, norm: Callable[[int], float] = lambda step: 1.0
):
    """Returns a step that adds 1 to the parameter; `loss` and `norm` compute its metrics from its number."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new = state_of_step(int(state.step) + 1)
        number = int(new.step)
        tokens = float(np.sum(batch.loss_weights))
        metrics = {"loss": loss(number), "accuracy": 0.5, "grad_norm": norm(number), "learning_rate": 0.1}
        return dataclasses.replace(new, opt_state=state.opt_state + 0), {
            name: jnp.float32(x) for name, x in (metrics | {"tokens": tokens}).items()
        }

    return step


def held_out(measure: Callable[..., Any], every: int = 1, name: str = "held_out") -> Evaluator:
    return Evaluator(name, every, measure)


def run(
    run_dir: Path,
    step: Any,
    config: PretrainConfig = CONFIG,
    read: Callable[[int], Batch] | None = None,
    start: int = 0,
    **more: Any,
) -> tuple[Store, list[Any], TrainState | None]:
    """Trains with stand-ins. Returns the store, the steps whose failure was shown, and the last state."""
    store, replayed = Store(), []
    run_dir.mkdir(exist_ok=True)
    log = RunLog(run_dir, config.steps, start)
    rows = empty_rows(2, 8, 0)._replace(loss_weights=np.ones((2, 8), np.float32))
    services: dict[str, Any] = {
        "show_failure": lambda step, first_row, params: replayed.append(step) or "",
        "stability": Stability(config.stability),
        "goodput": Goodput(time.monotonic(), {}),
    } | more
    end: TrainState | None = None
    with BatchIterator(read or (lambda row: rows), 0, 2) as batches:
        try:
            all_services = RunServices(
                store=store,
                log=log,
                flops_a_token=training_flops_a_token(config.model, config.data.sequence_length),
                **services,
            )  # type: ignore[arg-type]  # a stand-in for the store
            trainer = Trainer(config, cpu_mesh(1), step, batches, all_services)
            end = trainer.train(state_of_step(start))
        except UserError as error:
            replayed.append(error)
    return store, replayed, end


def test_what_is_saved_and_logged(tmp_path: Path) -> None:
    store, _, end = run(tmp_path, counting_step(loss=lambda step: 10.0 - step))
    assert end is not None and int(end.step) == 10
    assert store.saved == {4: (4, 8), 8: (8, 16), 10: (10, 20)}
    entries = read_metrics(tmp_path)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(s, 10.0 - s) for s in range(1, 11)]
    assert entries[-1]["tokens"] == 10 * 2 * 8 and entries[-1]["accuracy"] == 0.5
    for entry in entries[2:]:
        wanted = entry["tokens_per_second"] * training_flops_a_token(CONFIG.model, 8)
        assert entry["flops_per_second"] == pytest.approx(wanted) and wanted > 0
        assert "flops_utilisation" not in entry  # nobody knows the peak of this CPU
        assert entry["peak_memory_bytes"] > 10**7


def test_the_replay_finds_the_memory_of_the_state_free(tmp_path: Path) -> None:
    config = replace(CONFIG, {"steps": 3})
    bare, states = counting_step(loss=lambda step: math.nan if step == 1 else 1.0), []

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new, metrics = bare(state, batch)
        states.append(new)
        return new, metrics

    freed: list[bool] = []
    run(
        tmp_path,
        step,
        config,
        show_failure=lambda step, first_row, params: (
            freed.extend(x.is_deleted() for x in jax.tree.leaves(states[-1])) or ""
        ),
    )
    assert freed == [False, False, True]  # the step and the parameters are there


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    config = replace(CONFIG, {"stability.skip_nonfinite": 2})
    bad = {2, 5, 6, 9}
    step = counting_step(loss=lambda step: math.nan if step in bad else 1.0)
    stability = Stability(config.stability)
    store, replayed, end = run(tmp_path, step, config, stability=stability)
    assert end is not None and int(end.step) == 10 and replayed == []
    assert (stability.skipped_steps, stability.not_finite_in_a_row) == (4, 0)
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries if "loss" in entry] == sorted(set(range(1, 11)) - bad)
    assert [entry["skipped_steps"] for entry in entries if "loss" not in entry] == [1, 2, 3, 4]
    assert store.positions[8].history["skipped_steps"] == 3
    assert store.positions[8].history["not_finite_in_a_row"] == 0


def test_evaluators_have_intervals_of_their_own_and_measure_anything(tmp_path: Path) -> None:
    """What is measured at a step that is saved is in its record."""
    evaluators = [
        held_out(lambda params, stop: {"a": float(params["w"].get_value())}, 3, "first"),
        held_out(lambda params, stop: {"b": 0.25, "c": 0.5}, 4, "second"),
    ]
    store, _, _ = run(tmp_path, counting_step(), evaluators=evaluators)
    entries = read_metrics(tmp_path)
    assert [(e["step"], e["a"]) for e in entries if "a" in e] == [(3, 3), (6, 6), (9, 9), (10, 10)]
    assert [(e["step"], e["b"], e["c"]) for e in entries if "b" in e] == [(s, 0.25, 0.5) for s in (4, 8, 10)]
    measured = {step: position.evaluations for step, position in store.positions.items()}
    second = {"second": {"b": 0.25, "c": 0.5}}
    assert measured == {4: second, 8: second, 10: {"first": {"a": 10.0}, **second}}


def test_an_evaluation_that_is_cut_off_stops_the_run_at_its_step(tmp_path: Path) -> None:
    done = held_out(lambda params, stop: {"a": 1.0}, 3, "done")
    cut_off = held_out(lambda params, stop: None, 3, "cut_off")
    store, _, end = run(tmp_path, counting_step(), evaluators=[done, cut_off])
    assert end is not None and int(end.step) == 3
    assert {step: p.evaluations for step, p in store.positions.items()} == {3: {"done": {"a": 1.0}}}
    # The run that goes on owes the one that was cut off.
    measured: list[tuple[str, float]] = []

    def recorded(name: str) -> Evaluator:
        def measure(params: Any, stop_requested: Callable[[], bool]) -> dict[str, float]:
            measured.append((name, float(params["w"].get_value())))
            return {name: 1.0}

        return held_out(measure, 3, name)

    evaluators, evaluated = [recorded("done"), recorded("cut_off")], store.positions[3].evaluations
    run(tmp_path, counting_step(), start=3, evaluators=evaluators, evaluated=evaluated)
    assert [step for name, step in measured if name == "cut_off"] == [3, 6, 9, 10]
    assert [step for name, step in measured if name == "done"] == [6, 9, 10]


def test_chosen_steps_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start") or start(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop") or stop())
    step = counting_step(loss=lambda step: happened.append(step) or 1.0)
    run(tmp_path, step, replace(CONFIG, {"profile": "4:6", "run_dir": str(tmp_path)}))
    assert happened == [1, 2, 3, "start", 4, 5, 6, "stop", 7, 8, 9, 10]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
