"""Which signals are taken. Real runs: tests/commands."""

import signal
import sys

import pytest

from gemma_jax.training.interruption import EndSignals, StopSignals


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
