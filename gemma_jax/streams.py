"""Safe standard streams: they may be closed, full, without a reader, or have a limited encoding.

Standard error is for a person who watches. Text that cannot be written there is dropped, and never ends a
run. Standard output is the purpose of a command, so a failure there raises `OutputLost`.
"""

import contextlib
import io
import os
import select
import sys
from typing import TextIO


class OutputLost(Exception):
    """Standard output cannot be written; the `__cause__`, an OSError, has the reason.

    This is not a subclass of OSError, because rich and argparse handle that in their own ways.
    """


class _Stream(io.FileIO):
    """Standard output or error. Each write is complete; only the first failure of standard output raises."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._failure_matters = number == 1

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]  # any buffer, says typeshed
        left = memoryview(data)
        try:
            while left:
                written = super().write(left)
                if written is None:  # another process that shares the pipe made it non-blocking
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            # Raised only once: Python writes the remaining output at exit, and would print another error.
            if self._failure_matters:
                self._failure_matters = False
                raise OutputLost from error
        return len(data)


def guard_streams() -> None:
    """Makes the standard streams of this process safe to use, except those that have been replaced.

    Characters that an encoding does not have are written as `\\u2026`. Bytes of standard input that are not
    text are read as lone surrogates, which the tokenizer refuses with a one-sentence error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened would get this number, and C++ output would go into it.
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
    """Returns a stream that replaces Python's own one, which is None if it was closed."""
    made = io.TextIOWrapper(_Stream(number), stream.encoding if stream else "utf-8", "backslashreplace")
    if isinstance(stream, io.TextIOWrapper):
        made.reconfigure(line_buffering=stream.line_buffering, write_through=stream.write_through)
    return made


def tell_terminal(text: str) -> None:
    """Prints a line to standard error, if that is a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    """Prints what the program is doing to standard error, if that is a terminal."""
    tell_terminal(f"{text} ...")


def write_now(text: str) -> None:
    """Writes to standard error without Python's buffers, which a signal handler may have interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
