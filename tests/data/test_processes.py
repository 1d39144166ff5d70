"""Functions that run in other processes: the order of calls, errors, and how the processes end."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_jax.data.processes import in_processes
from gemma_jax.errors import UserError
from tests.messages import naming


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < until, f"process {pid} lives on"
        time.sleep(0.05)


def leave_a_note(folder: Path, number: int) -> None:
    print("this is no answer")
    if number == 1000:
        raise UserError("a thousand is too much;\nchoose less")
    if number == 1001:
        os._exit(3)
    with (folder / str(number)).open("a") as file:
        file.write(f"{os.getpid()}\n")


def test_mistakes_come_back_as_they_were_and_ends_are_told(tmp_path: Path) -> None:
    with in_processes(functools.partial(leave_a_note, tmp_path), [1, 1000, 2], 1) as finished:
        with pytest.raises(UserError, match="^a thousand is too much;\nchoose less$"):
            finished(1000)
        finished(2)
    notes = [path.read_text().splitlines() for path in tmp_path.iterdir()]
    assert len(notes) == 2 and all(len(note) == 1 for note in notes)
    wait_until_gone(int(notes[0][0]))
    with (
        in_processes(functools.partial(leave_a_note, tmp_path), [1001], 1) as finished,
        pytest.raises(RuntimeError, match=naming(3, 1001)),
    ):
        finished(1001)


PARENT = """
import functools, pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_processes import leave_a_note
from gemma_jax.data.processes import in_processes

with in_processes(functools.partial(leave_a_note, pathlib.Path(sys.argv[2])), range(2), 1) as finished:
    finished(1)
    print("done", flush=True)
    sys.stdin.read()
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent), str(tmp_path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"done\n"
    (pid,) = {int(path.read_text()) for path in tmp_path.iterdir()}
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_until_gone(pid)
