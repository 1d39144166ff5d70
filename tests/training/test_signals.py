"""Which signals are taken. Real runs: tests/commands."""

import os
import signal
import subprocess
import sys

import pytest

from gemma_jax.errors import RESTART_STATUS
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


def test_a_signal_that_was_ignored_from_the_start_stays_so() -> None:
    """As nohup has SIGHUP ignored; otherwise a closed terminal saves the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


ENDS = """
import atexit, os, signal, time
from gemma_jax.errors import RESTART_STATUS
from gemma_jax.training.interruption import EndSignals
class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
late = Late()
with EndSignals():
    pass
{when}
raise SystemExit(75)
"""


@pytest.mark.parametrize("when", ["", "signal.raise_signal(signal.SIGTERM)"])
def test_a_signal_after_the_end_changes_no_status(when: str) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS.format(when=when)], check=False, timeout=60)
    assert ended.returncode == RESTART_STATUS
