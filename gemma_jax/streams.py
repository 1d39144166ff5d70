"""The border to the standard streams: they may be closed, full, without a reader, or of a narrow encoding.

What is written to standard error is for a person who watches, and is lost where it cannot be written: it
never ends a run. Standard output is what a command is for, so a failure there is an `OutputLost`.
"""

import contextlib
import io
import os
import select
import sys
from typing import TextIO


class OutputLost(Exception):
    """Standard output cannot be written; its cause, an OSError, says why.

    It is no OSError, because rich and argparse have answers of their own to those.
    """


class _Stream(io.FileIO):
    """Standard output or error, to which everything is written, or one failure is raised."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._failure_matters = number == 1

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]  # any buffer, says typeshed
        left = memoryview(data)
        try:
            while left:
                written = super().write(left)
                if written is None:  # whoever shares the pipe has made it non-blocking
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            # Only once: Python writes what is left when it ends, and would complain.
            if self._failure_matters:
                self._failure_matters = False
                raise OutputLost from error
        return len(data)


def guard_streams() -> None:
    """Make the standard streams of this process safe to write to; what has replaced them is left alone.

    Characters that an encoding does not have are written as `\\u2026`. Bytes of standard input that are no
    text are read as lone surrogates, which the tokenizer refuses in a sentence.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened would have this number, and what C++ prints in it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # it stays open
    elif sys.stdin is sys.__stdin__ and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(2, sys.stderr)


def _guarded(number: int, stream: TextIO | None) -> TextIO:
    """A stream in the place of Python's own, which is None where it was closed."""
    made = io.TextIOWrapper(_Stream(number), stream.encoding if stream else "utf-8", "backslashreplace")
    if isinstance(stream, io.TextIOWrapper):
        made.reconfigure(line_buffering=stream.line_buffering, write_through=stream.write_through)
    return made


def progress(text: str) -> None:
    """Say on standard error what a step of several seconds does, where a person watches a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"{text} ...", file=sys.stderr, flush=True)


def write_now(text: str) -> None:
    """Write to standard error past Python's buffers, as the handler of a signal must, which interrupts."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
