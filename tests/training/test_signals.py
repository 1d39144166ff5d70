"""Which signals are taken, and how the processes of a job agree on a stop. Real runs: tests/commands."""

import os
import signal
import sys

import pytest
from jax.experimental import multihost_utils

from gemma_jax.training.interruption import EndSignals, JobStopSignals, StopSignals


def test_a_notebook_keeps_its_own_answer_to_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training EndSignals ends the process, which there is the kernel."""
    monkeypatch.delattr(sys, "ps1", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with EndSignals():
        assert signal.getsignal(signal.SIGINT) != before
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    with EndSignals():
        assert signal.getsignal(signal.SIGINT) == before
    with StopSignals() as stop:  # while it trains, an interrupt saves there too
        assert signal.getsignal(signal.SIGINT) != before and not stop.requested()


def test_all_processes_of_a_job_ask_in_step_and_a_stop_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def reached(number: int) -> bool:
        """As jax answers: True once, for the number that was agreed upon."""
        asked.append(number)
        return number == 3

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    before = signal.getsignal(signal.SIGTERM)
    with JobStopSignals() as stop:
        # A handler of Python would take the signal away from jax.
        assert signal.getsignal(signal.SIGTERM) == before
        assert [stop.requested() for _ in range(5)] == [False, False, True, True, True]
    assert asked == [1, 2, 3]


def test_an_interrupt_of_one_process_is_handed_to_jax(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[int, int]] = []
    with JobStopSignals():
        monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert "all processes save" in capfd.readouterr().err
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends at once
