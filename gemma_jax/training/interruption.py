"""Ending a run well when somebody asks for it."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Self

# sysexits.h EX_TEMPFAIL: "try again later", which launchers restart on
STOPPED_STATUS = 75


class StopSignals:
    """Within this context SIGTERM and Ctrl-C ask for a stop after the step; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.requested = True
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this step; Ctrl-C again ends at once", file=sys.stderr)
