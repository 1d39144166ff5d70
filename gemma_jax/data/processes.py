"""Calls one function for many numbers, in several Python processes.

Python's multiprocessing is not used: its processes run the user's own script again, and keep running when
their parent is killed. The processes here end after their parent, once they have finished the current call.
"""

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from gemma_jax.errors import UserError

_SERVE = "from gemma_jax.data.processes import serve; serve()"


@contextlib.contextmanager
def in_processes(
    function: Callable[[int], None], numbers: Sequence[int], processes: int
) -> Iterator[Callable[[int], None]]:
    """Starts the calls of `function` for all numbers, in this order, in `processes` processes.

    Yields a function that takes one of the numbers and waits until its call has finished. It raises the
    UserError that this call raised, if any. Leaving the block ends the processes.
    """
    started = [_start(function) for _ in range(processes)]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for process in started:
        idle.put(process)

    def call(number: int) -> None:
        process = idle.get()
        try:
            _ask(process, number)
        finally:
            idle.put(process)

    with ThreadPoolExecutor(processes) as threads:
        calls = {number: threads.submit(call, number) for number in numbers}
        try:
            yield lambda number: calls[number].result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.kill()
                process.communicate()


def _start(function: Callable[[int], None]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # so that Ctrl-C interrupts the parent only
    )
    assert process.stdin
    pickle.dump(function, process.stdin)
    process.stdin.flush()
    return process


def _ask(process: subprocess.Popen[bytes], number: int) -> None:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):  # the missing answer is reported below
        process.stdin.write(b"%d\n" % number)
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a process ended with status {process.wait()} at number {number}")
    if mistake := json.loads(answer):
        raise UserError(mistake)


def serve() -> None:
    """The main loop of a process: calls the function for each number that the parent writes to it."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps other output out of the answers
    function = pickle.load(sys.stdin.buffer)  # noqa: S301  # our own parent wrote it
    for line in sys.stdin.buffer:
        mistake = ""
        try:
            function(int(line))
        except UserError as error:
            mistake = str(error)
        print(json.dumps(mistake), file=answers, flush=True)
