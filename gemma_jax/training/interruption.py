"""Ending a run well when somebody asks for it."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

# sysexits.h EX_TEMPFAIL: "try again later", which launchers restart on
STOPPED_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class StopSignals:
    """Within this context SIGTERM and Ctrl-C ask for a stop after the step; a second Ctrl-C ends at once.

    Python calls a signal's handler only when the main thread is between two calls into XLA, which can be a
    whole step or compilation away. So a thread reads the numbers of the signals from a pipe
    (`signal.set_wakeup_fd`), tells at once that one was heard, and ends the process at the second Ctrl-C.
    """

    told = "saving after this step; Ctrl-C again ends at once"

    def __init__(self) -> None:
        self.requested = False
        # Two threads hear of a signal, and the handler of one can interrupt that of another.
        self._telling = threading.RLock()

    def __enter__(self) -> Self:
        self._pipe, write = os.pipe()
        self._write = write
        os.set_blocking(write, False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            if number in SIGNALS:
                if heard and number == signal.SIGINT:
                    os._exit(128 + number)
                heard = True
                self._hear(number)

    def _hear(self, number: int) -> None:
        with self._telling:
            before, self.requested = self.requested, True
            if not before:
                # Not print: the signal may have come in the middle of one.
                cursor = SHOW_CURSOR if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
                os.write(2, f"{cursor}\n{signal.Signals(number).name}: {self.told}\n".encode())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The same signal as in `_listen`, or the only notice of it while orbax's event loop has the pipe.
        self._hear(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class EndSignals(StopSignals):
    """For the time before training: SIGTERM and Ctrl-C end the program with STOPPED_STATUS.

    Without unwinding, for an exception from a signal can come in a callback that swallows it. Nothing is
    lost: all that is written meanwhile is written whole or not at all, so that a run can be killed.
    """

    told = "ending before the first step; the same command begins again"

    def _hear(self, number: int) -> None:
        super()._hear(number)
        os._exit(STOPPED_STATUS)
