"""Ends a run cleanly when a signal asks for it."""

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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP is sent when a terminal is closed
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


def _heard(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Returns the signals to handle: all of these, except SIGHUP if it is already ignored, as under nohup."""
    return [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class StopSignals:
    """Context in which SIGNALS request a stop after the current step; a second Ctrl-C exits at once.

    Python calls a signal handler only when the main thread is between two calls into XLA, which can be a
    whole step or compilation away. Therefore a thread reads the signal numbers from a pipe
    (`signal.set_wakeup_fd`), reports each signal at once, and ends the process on the second Ctrl-C.
    """

    told = "saving after this step; Ctrl-C again ends at once"
    signals: tuple[signal.Signals, ...] = SIGNALS

    def __init__(self) -> None:
        self._requested = False
        # Both threads handle a signal, and the handler of one signal can interrupt that of another.
        self._telling = threading.RLock()

    def requested(self) -> bool:
        """Whether a signal has requested a stop."""
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
                # Do not use print: the signal may have interrupted a print.
                cursor = SHOW_CURSOR if os.isatty(2) else ""
                write_now(f"{cursor}\n{signal.Signals(number).name}: {self.told}\n")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # `_listen` has usually handled this signal already. While orbax's event loop has taken over the
        # wakeup pipe, only this handler receives it.
        self._hear(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class EndSignals(StopSignals):
    """Context for the time before and after training: SIGNALS end the program with RESTART_STATUS.

    The process exits without unwinding, because an exception from a signal handler can be raised in a
    callback that swallows it. Nothing is lost: every file is written whole or not at all.
    """

    told = "ending; the same command resumes from what is saved"

    def __init__(self) -> None:
        super().__init__()
        # Interrupting a cell must not end the notebook, so Python's own handler of SIGINT stays.
        if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
            self.signals = (signal.SIGTERM, signal.SIGHUP)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        # Python and jax take a while to exit. A signal in that time must still end with RESTART_STATUS, so
        # that the stopped run does not look like one that was killed.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if self._before.get(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, frame: os._exit(RESTART_STATUS))
                # Near its exit Python restores the default handlers, but leaves ignored signals ignored.
                atexit.register(signal.signal, number, signal.SIG_IGN)

    def _hear(self, number: int) -> None:
        super()._hear(number)
        os._exit(RESTART_STATUS)


class JobStopSignals:
    """StopSignals for a job of several processes: a signal to one stops all of them after the same step.

    From `jax.distributed.initialize` on, jax's preemption service handles SIGTERM: it notifies the other
    processes and agrees with them on a step that none has passed. A Python handler for SIGTERM would replace
    that service, so there is none here; Ctrl-C and SIGHUP are forwarded as SIGTERM.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._requested = False

    def requested(self) -> bool:
        """Whether all processes stop now. Every process of the job must call this equally often."""
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
