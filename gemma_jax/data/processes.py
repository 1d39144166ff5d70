"""One function for many numbers, in several processes of this Python.

Not multiprocessing: its processes run the user's own script again, and live on when their parent is killed.
These end with their parent, once they have done what they are at.
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
    """Calls `function` for all numbers, in this order; what is yielded waits for the call of one of them.

    It raises the UserError that the function raised there. Leaving the block ends the processes.
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
        start_new_session=True,  # Ctrl-C is for the parent
    )
    assert process.stdin
    pickle.dump(function, process.stdin)
    process.stdin.flush()
    return process


def _ask(process: subprocess.Popen[bytes], number: int) -> None:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):  # reported below
        process.stdin.write(b"%d\n" % number)
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a process ended with status {process.wait()} at number {number}")
    if mistake := json.loads(answer):
        raise UserError(mistake)


def serve() -> None:
    """What the processes run: the function for each number that their parent writes, until it is gone."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is no answer
    function = pickle.load(sys.stdin.buffer)  # noqa: S301  # our own parent wrote it
    for line in sys.stdin.buffer:
        mistake = ""
        try:
            function(int(line))
        except UserError as error:
            mistake = str(error)
        print(json.dumps(mistake), file=answers, flush=True)
