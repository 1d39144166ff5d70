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
from etils import epath

from gemma_jax.config import PRESETS, PretrainConfig, replace
from gemma_jax.data.loader import BatchIterator
from gemma_jax.data.packing import Batch, empty_rows
from gemma_jax.errors import UserError
from gemma_jax.testing import cpu_mesh
from gemma_jax.training import loop
from gemma_jax.training.goodput import KINDS, Goodput
from gemma_jax.training.hardware import training_flops_a_token
from gemma_jax.training.loop import Clock, train
from gemma_jax.training.metrics import RunLog, read_metrics
from gemma_jax.training.profile import Profiler
from gemma_jax.training.stability import Gap, RollBack, Stability
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import StepMetrics

CONFIG = replace(
    PretrainConfig(steps=10, model=PRESETS["gemma_tiny"]),
    {"data.batch_size": 2, "data.sequence_length": 8, "checkpoint.every": 4, "evaluation.every": 0}
    | {"logging.every": 1, "stability.skip_nonfinite": 0},
)


class Store:
    """Remembers what is saved instead of writing it."""

    def __init__(self) -> None:
        self.saved: dict[int, tuple[float, int]] = {}
        self.histories: dict[int, dict[str, Any]] = {}

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        rows_seen: int,
        history: dict[str, Any],
        **_: object,
    ) -> None:
        self.saved[step] = float(params), rows_seen
        self.histories[step] = history

    def wait(self) -> None:
        pass

    def steps(self) -> list[int]:
        return sorted(self.saved)


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
    state: TrainState | None = None,
    **more: Any,
) -> tuple[Store, list[int], TrainState | None]:
    """Train with stand-ins; gives the store, the steps that were replayed, and the last state."""
    store, replayed = Store(), []
    state = state or TrainState(jnp.int32(0), jnp.float32(0), jnp.float32(0))
    run_dir.mkdir(exist_ok=True)
    log = RunLog(run_dir, config.steps, int(state.step))
    rows = empty_rows(2, 8, 0)._replace(loss_weights=np.ones((2, 8), np.float32))
    end: TrainState | None = None
    with BatchIterator(read or (lambda row: rows), 0, 2) as batches:
        try:
            options: dict[str, Any] = {
                "evaluate": None,
                "replay": lambda step, first_row, params: replayed.append(step) or "",
                "stability": Stability(config.stability),
                "goodput": Goodput(time.monotonic(), {}),
                "profiler": Profiler(range(0), epath.Path(run_dir)),
            } | more
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
        replay=lambda step, first_row, params: (
            freed.extend(x.is_deleted() for x in jax.tree.leaves(states[-1])) or ""
        ),
    )
    assert freed == [False, False, True]  # the step and the parameters are there


def test_a_stop_saves_the_step_it_comes_after(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    store, _, end = run(tmp_path, counting_step(), stop_requested=lambda: next(asked))
    assert end is not None and int(end.step) == 3 and store.saved == {3: (3, 6)}
    *steps, stopped = read_metrics(tmp_path)
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert stopped["step"] == 3 and stopped["seconds_saving"] >= steps[-1]["seconds_saving"]


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
    assert store.histories[8]["skipped_steps"] == 3 and store.histories[8]["not_finite_in_a_row"] == 0


def test_one_step_too_many_that_is_not_finite_ends_the_run_before_the_next(tmp_path: Path) -> None:
    config = replace(CONFIG, {"stability.skip_nonfinite": 2})
    done: list[int] = []
    bare = counting_step(loss=lambda step: math.nan if step >= 4 else 1.0)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        done.append(int(state.step) + 1)
        return bare(state, batch)

    _, (replayed, error), _ = run(tmp_path, step, config)
    assert replayed == 6 and "the last of 3 such steps in a row" in str(error)
    assert done == [1, 2, 3, 4, 5, 6]  # so the parameters are still those that step 6 began with


def test_a_spike_takes_the_run_back_and_past_the_data_that_made_it(tmp_path: Path) -> None:
    changes = {"spike_threshold": 5.0, "spike_window": 4, "spike_steps": 2, "skip_batches": 3}
    config = replace(CONFIG, {f"stability.{name}": value for name, value in changes.items()} | {"steps": 20})
    step = counting_step(loss=lambda step: 9.0 if step >= 14 else 2.0 + 0.01 * (step % 3))
    with pytest.raises(RollBack) as caught:
        run(tmp_path, step, config)
    # Seen at step 15, the second high one; step 12 was saved before it began.
    back = caught.value
    assert (back.step, back.to) == (15, 12)
    assert back.gap == Gap(12, (15 - 12 + 3) * 2)


def test_an_evaluation_that_is_cut_off_stops_the_run_at_its_step(tmp_path: Path) -> None:
    config = replace(CONFIG, {"evaluation.every": 3})
    store, _, end = run(tmp_path, counting_step(), config, evaluate=lambda params, stop_requested: None)
    assert end is not None and int(end.step) == 3 and list(store.saved) == [3]
    measured: list[float] = []

    def evaluate(params: Any, stop_requested: Callable[[], bool]) -> dict[str, float]:
        measured.append(float(params))
        return {"held_out_loss": 1.0, "held_out_bits_per_byte": 1.0}

    # The run that goes on owes it.
    state = TrainState(jnp.int32(3), jnp.float32(3), jnp.float32(0))
    run(tmp_path, counting_step(), config, state=state, evaluate=evaluate, evaluate_first=True)
    assert measured == [3, 6, 9, 10]
    held_out = [entry["step"] for entry in read_metrics(tmp_path) if "held_out_loss" in entry]
    assert held_out == [3, 6, 9, 10]


def test_where_the_time_goes(tmp_path: Path) -> None:
    config = replace(CONFIG, {"evaluation.every": 5, "checkpoint.every": 5})
    bare = counting_step(loss=lambda step: math.nan if step == 7 else 1.0)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        time.sleep(0.3 if state.step == 0 else 0.02)
        return bare(state, batch)

    def evaluate(params: Any, stop_requested: Callable[[], bool]) -> dict[str, float]:
        time.sleep(0.1)
        return {"held_out_loss": 1.0, "held_out_bits_per_byte": 1.0}

    config = replace(config, {"stability.skip_nonfinite": 1})
    run(tmp_path, step, config, evaluate=evaluate)
    last = [entry for entry in read_metrics(tmp_path) if "goodput" in entry][-1]
    assert last["seconds_starting"] >= 0.3 and last["seconds_evaluating"] >= 0.1
    # Eight steps count; a step's numbers are read when the next one was started, so the first has two sleeps.
    assert last["seconds_steps"] >= 7 * 0.02 and last["seconds_lost"] >= 0.02
    total = sum(last[f"seconds_{kind}"] for kind in KINDS)
    assert last["goodput"] == pytest.approx(last["seconds_steps"] / total, abs=0.01)


def test_chosen_steps_are_traced(tmp_path: Path) -> None:
    profiler = Profiler(range(4, 7), epath.Path(tmp_path / "profile"))
    traced: list[int] = []
    bare = counting_step()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        if profiler._tracing:
            traced.append(int(state.step) + 1)
        return bare(state, batch)

    run(tmp_path, step, profiler=profiler)
    assert traced == [4, 5, 6]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
