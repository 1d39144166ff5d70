"""Ending a run well when somebody asks for it."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Self

from gemma_jax.errors import RESTART_STATUS
from gemma_jax.streams import write_now

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when a terminal is closed
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


def _heard(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """These, but without SIGHUP where it is ignored already, as under nohup."""
    return [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class StopSignals:
    """Within this context SIGNALS ask for a stop after the step; a second Ctrl-C ends at once.

    Python calls a signal's handler only when the main thread is between two calls into XLA, which can be a
    whole step or compilation away. So a thread reads the numbers of the signals from a pipe
    (`signal.set_wakeup_fd`), reports at once that it received one, and ends the process on the second Ctrl-C.
    """

    told = "saving after this step; Ctrl-C again ends at once"
    signals: tuple[signal.Signals, ...] = SIGNALS

    def __init__(self) -> None:
        self._requested = False
        # Two threads hear of a signal, and the handler of one can interrupt that of another.
        self._telling = threading.RLock()

    def requested(self) -> bool:
        """Whether a signal has asked for a stop."""
        return self._requested

    def __enter__(self) -> Self:
        self._pipe, write = os.pipe()
        self._write = write
        os.set_blocking(write, False)
        self._before = {number: signal.signal(number, self._handle) for number in _heard(self.signals)}
        self._wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._write)
        os.close(self._pipe)

    def _listen(self) -> None:
        heard = False
        while number := os.read(self._pipe, 1)[0]:
            if number in self._before:
                if heard and number == signal.SIGINT:
                    os._exit(128 + number)
                heard = True
                self._hear(number)

    def _hear(self, number: int) -> None:
        with self._telling:
            before, self._requested = self._requested, True
            if not before:
                # Not print: the signal may have come in the middle of one.
                cursor = SHOW_CURSOR if os.isatty(2) else ""
                write_now(f"{cursor}\n{signal.Signals(number).name}: {self.told}\n")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The same signal as in `_listen`, or the only notice of it while orbax's event loop has the pipe.
        self._hear(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class EndSignals(StopSignals):
    """For the time before and after training: SIGNALS end the program with RESTART_STATUS.

    Without unwinding, for an exception from a signal can come in a callback that swallows it. Nothing is
    lost: all that is written meanwhile is written whole or not at all, so that a run can be killed.
    """

    told = "ending; the same command resumes from what is saved"

    def __init__(self) -> None:
        super().__init__()
        # A notebook must outlive an interrupted cell, and Python's own handler sees to that.
        if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
            self.signals = (signal.SIGTERM, signal.SIGHUP)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        # Python and jax take a while to end: a stopped run must not look like one that was killed meanwhile.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if self._before.get(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, frame: os._exit(RESTART_STATUS))
                # Near its end Python restores default handlers, but not those of ignored signals.
                atexit.register(signal.signal, number, signal.SIG_IGN)

    def _hear(self, number: int) -> None:
        super()._hear(number)
        os._exit(RESTART_STATUS)


class JobStopSignals:
    """StopSignals of a job of several processes: a signal to one stops all of them after the same step.

    jax's preemption service hears SIGTERM from `jax.distributed.initialize` on, tells the others, and finds
    the step that none of them has passed. A handler of Python for SIGTERM would take its place, so there is
    none here, and Ctrl-C and SIGHUP are handed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._requested = False

    def requested(self) -> bool:
        """Whether this is where all stop; to be asked equally often by every process of the job."""
        from jax.experimental import multihost_utils

        self._asked += 1
        self._requested = self._requested or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._requested

    def __enter__(self) -> Self:
        handed_on = _heard((signal.SIGINT, signal.SIGHUP))
        self._before = {number: signal.signal(number, self._handle) for number in handed_on}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        write_now(f"\n{name}: all processes save after one of the next steps; Ctrl-C again ends at once\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
