"""The loop around a step: what it saves, logs and does when a loss is not finite. The step is a stand-in."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.config import PRESETS, PretrainConfig, replace
from gemma_jax.data.loader import BatchIterator
from gemma_jax.data.packing import Batch, empty_rows
from gemma_jax.errors import UserError
from gemma_jax.testing import cpu_mesh
from gemma_jax.training import loop
from gemma_jax.training.hardware import training_flops_a_token
from gemma_jax.training.loop import Clock, train
from gemma_jax.training.metrics import RunLog, read_metrics
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import StepMetrics

CONFIG = replace(
    PretrainConfig(steps=10, model=PRESETS["gemma_tiny"]),
    {"data.batch_size": 2, "data.sequence_length": 8, "checkpoint.every": 4, "evaluation.every": 0}
    | {"logging.every": 1},
)


class Store:
    """Remembers what is saved instead of writing it."""

    def __init__(self) -> None:
        self.saved: dict[int, tuple[float, int]] = {}

    def save(self, step: int, params: Any, opt_state: Any, rows_seen: int, **_: object) -> None:
        self.saved[step] = float(params), rows_seen

    def wait(self) -> None:
        pass


def counting_step(
    loss: Callable[[int], float] = lambda step: 2.0, norm: Callable[[int], float] = lambda step: 1.0
):
    """A step that adds 1 to the parameter; `loss` and `norm` say what its number has."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        number = int(state.step) + 1
        numbers = (loss(number), norm(number), 0.1, float(np.sum(batch.loss_weights)))
        new = TrainState(state.step + 1, state.params + 1, state.opt_state)
        return new, StepMetrics(*(jnp.float32(x) for x in numbers))

    return step


def run(
    run_dir: Path,
    step: Any,
    config: PretrainConfig = CONFIG,
    read: Callable[[int], Batch] | None = None,
    **more: Any,
) -> tuple[Store, list[int], TrainState | None]:
    """Train with stand-ins; gives the store, the steps that were replayed, and the last state."""
    store, replayed = Store(), []
    state = TrainState(jnp.int32(0), jnp.float32(0), jnp.float32(0))
    run_dir.mkdir(exist_ok=True)
    log = RunLog(run_dir, config.steps, 0)
    rows = empty_rows(2, 8, 0)._replace(loss_weights=np.ones((2, 8), np.float32))
    end: TrainState | None = None
    with BatchIterator(read or (lambda row: rows), 0, 2) as batches:
        try:
            options = {"evaluate": None, "replay": replayed.append} | more
            end = train(config, cpu_mesh(1), state, step, batches, store=store, log=log, **options)
        except UserError as error:
            replayed.append(error)
    return store, replayed, end


def test_what_is_saved_and_logged(tmp_path: Path) -> None:
    store, _, end = run(tmp_path, counting_step(loss=lambda step: 10.0 - step))
    assert end is not None and int(end.step) == 10
    assert store.saved == {4: (4, 8), 8: (8, 16), 10: (10, 20)}
    entries = read_metrics(tmp_path)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(s, 10.0 - s) for s in range(1, 11)]
    assert entries[-1]["tokens"] == 10 * 2 * 8
    for entry in entries[2:]:
        wanted = entry["tokens_per_second"] * training_flops_a_token(CONFIG.model, 8)
        assert entry["flops_per_second"] == pytest.approx(wanted) and wanted > 0
        assert "flops_utilisation" not in entry  # nobody knows the peak of this CPU
        assert entry["peak_memory_bytes"] > 10**7


def test_utilisation_is_of_all_devices_of_the_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "peak_flops", lambda devices: 1e9 * len(list(devices)))
    run(tmp_path, counting_step())
    last = read_metrics(tmp_path)[-1]
    assert last["flops_utilisation"] == pytest.approx(last["flops_per_second"] / 1e9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["loss", "norm"])
@pytest.mark.parametrize("at", [4, 6, 10])  # at a save, between saves, at the end
def test_a_number_that_is_not_finite_ends_the_run_at_its_step(
    tmp_path: Path, bad: float, which: str, at: int
) -> None:
    step = counting_step(**{which: lambda step: bad if step == at else 1.0})
    store, (replayed, error), end = run(tmp_path, step)
    assert replayed == at and f"step {at}" in str(error) and end is None
    assert list(store.saved) == [step for step in (4, 8) if step < at]
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, at))


def test_the_replay_finds_the_memory_of_the_state_free(tmp_path: Path) -> None:
    config = replace(CONFIG, {"steps": 3})
    bare, states = counting_step(loss=lambda step: math.nan if step == 1 else 1.0), []

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        new, metrics = bare(state, batch)
        states.append(new)
        return new, metrics

    freed: list[bool] = []
    run(
        tmp_path,
        step,
        config,
        replay=lambda step: freed.extend(x.is_deleted() for x in jax.tree.leaves(states[-1])),
    )
    assert freed == [True] * 3


def test_a_stop_saves_the_step_it_comes_after(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    store, _, end = run(tmp_path, counting_step(), stop_requested=lambda: next(asked))
    assert end is not None and int(end.step) == 3 and store.saved == {3: (3, 6)}
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]


def test_input_that_is_waited_for_is_told_a_step(tmp_path: Path) -> None:
    rows = empty_rows(2, 8, 0)

    def slowly(row: int) -> Batch:
        time.sleep(0.02)
        return rows

    config = replace(CONFIG, {"logging.every": 5, "checkpoint.every": 100})
    run(tmp_path / "slow", counting_step(), config, slowly)
    run(tmp_path / "fast", counting_step(), config, lambda row: rows)
    slow, fast = (read_metrics(tmp_path / name)[-1] for name in ("slow", "fast"))
    assert slow["step"] == 10 and 0.01 < slow["input_wait_seconds"] < 0.03
    assert slow["input_wait_share"] > 0.5
    assert fast["input_wait_seconds"] < 0.005


def test_the_clock_counts_the_latest_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = 0.0, Clock()
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    assert clock.tokens_per_second == clock.seconds_a_step == 0
    clock.step_ended(100)  # the first one compiles: since when, nobody knows
    for _ in range(10):
        now += 1.0
        clock.step_ended(100)
    assert clock.tokens_per_second == 100 and clock.seconds_a_step == 1
    now += 1000.0
    clock.pause()
    now += 1000.0
    clock.step_ended(100)
    assert clock.seconds_a_step == 1
    for _ in range(50):  # the machine becomes slower
        now += 2.0
        clock.step_ended(100)
    assert clock.tokens_per_second == 50 and clock.seconds_a_step == 2
