"""The time of a run by what it was spent on, over several processes."""

import pytest

from gemma_jax.training import goodput
from gemma_jax.training.goodput import Goodput, seconds_before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    return now


def test_seconds_by_kind(clock: list[float]) -> None:
    account = Goodput(90.0, {})
    clock[0] = 130.0
    account.step_ended(waited=5.0, finite=True)  # the first step compiles: all of it is the start
    for finite in (True, True, False):
        clock[0] += 10
        account.step_ended(waited=2.0, finite=finite)
    clock[0] += 7
    account.record("evaluating")
    clock[0] += 3
    account.record("saving")
    assert account.entry() == {
        "goodput": 16 / 80,
        "seconds_steps": 16,
        "seconds_starting": 40,
        "seconds_waiting": 6,
        "seconds_evaluating": 7,
        "seconds_saving": 3,
        "seconds_lost": 8,
    }


def test_steps_that_are_done_again_are_lost(clock: list[float]) -> None:
    account = Goodput(100.0, {})
    entries = []
    for step in range(1, 7):
        clock[0] += 10
        account.step_ended(0.0, finite=True)
        entries += [{"step": step, **account.entry()}, {"step": step, "held_out_loss": 1.0}]
    # Killed after step 6, and resumed from step 4.
    before = seconds_before(entries, 4)
    assert (before["starting"], before["steps"], before["lost"]) == (10, 30, 20)
    resumed = Goodput(clock[0], before)
    clock[0] += 20
    resumed.step_ended(0.0, finite=True)
    assert resumed.entry()["goodput"] == 30 / 80
    assert seconds_before([], 0) == {} == seconds_before([{"step": 3, "loss": 1.0}], 3)
