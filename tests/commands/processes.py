"""Starts training runs as separate processes: single ones, and jobs of several processes."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma_jax.training.metrics import read_metrics
from tests.tiny_run import config_file, write_corpus

REPOSITORY = Path(__file__).parents[2]
STEPS = 80
WIDE = ("--compute.dtype", "float64", "--compute.param_dtype", "float64")
Arrays = dict[str, np.ndarray]


class Runs:
    """Starts runs of one config, each in its own run directory."""

    command = "pretrain"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_corpus(folder / "corpus")
        changes = {"steps": STEPS, "checkpoint.every": 1, "evaluation.every": 20}
        config_file(folder, folder / "corpus", **changes)

    def environment(self, cache: str = "programs") -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        return environment | {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, run: str, *arguments: str, cache: str = "programs") -> subprocess.Popen[str]:
        config = str(self.folder / "config.json")
        return subprocess.Popen(
            [
                sys.executable,
                "train.py",
                self.command,
                config,
                "--run_dir",
                str(self.folder / run),
                *arguments,
            ],
            cwd=REPOSITORY,
            env=self.environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, run: str, *arguments: str) -> str:
        """Waits for a run to end successfully, and returns what it wrote to standard error."""
        status, said = ended(self.start(run, *arguments), 120)
        assert status == 0, said
        return said

    def steps(self, run: str) -> list[int]:
        """Returns the steps in the run's log of training metrics."""
        return [int(entry["step"]) for entry in read_metrics(self.folder / run) if "loss" in entry]

    def checkpoints(self, run: str) -> list[str]:
        folder = self.folder / run / "checkpoints"
        try:
            return [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return []

    def arrays(self, run: str) -> Arrays:
        return last_arrays(self.folder / run)


def last_arrays(run: Path, step: int = STEPS) -> Arrays:
    """Returns the arrays of the checkpoint of a step, loaded with orbax instead of our own code."""
    from orbax.checkpoint import v1 as ocp

    folder = run / "checkpoints" / str(step)
    arrays = json.loads((folder / "run" / "data.json").read_text())["record"]["arrays"]
    wanted = {
        part: {name: np.empty(array["shape"], array["dtype"]) for name, array in tree.items()}
        for part, tree in arrays.items()
    }
    loaded = ocp.load_checkpointables(folder, wanted)
    return {f"{part}.{name}": x for part, tree in loaded.items() for name, x in tree.items()}


def ended(process: subprocess.Popen[str], within: float) -> tuple[int, str]:
    """Returns the exit status of a process and what it wrote to standard error.

    Fails if the process does not end within so many seconds.
    """
    try:
        _, said = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
        raise AssertionError(f"still running after {within} s: {said}") from None
    return process.returncode, said


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], within: float = 60) -> None:
    until = time.monotonic() + within
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.002)


def assert_same_bits(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys() and len(expected) > 30
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def losses(runs: Runs, run: str) -> list[tuple[int, float]]:
    return [(int(e["step"]), e["loss"]) for e in read_metrics(runs.folder / run) if "loss" in e]


class Job:
    """A job of several processes on this machine, in float64. Each writes its standard error to a file."""

    def __init__(
        self,
        runs: Runs,
        run: str,
        count: int,
        *arguments: str,
        own: dict[int, list[str]] | None = None,
        row_seconds: float = 0.0,
    ):
        """Starts the processes.

        Args:
          runs: The runs that this job belongs to.
          run: The name of the job's run directory.
          count: The number of processes; a single one is started without options for several hosts.
          *arguments: Arguments of all processes.
          own: Additional arguments of single processes, by their index.
          row_seconds: The least time that reading a row takes.
        """
        self.said_in = [runs.folder / f"{run}.{count}.{index}.log" for index in range(count)]
        port = free_port()
        self.processes = []
        for index in range(count):
            config = str(runs.folder / "config.json")
            hosts = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.index", str(index)]
            hosts += ["--hosts.count", str(count), "--hosts.heartbeat_seconds", "10"]
            command = ["pretrain", config, "--run_dir", str(runs.folder / run), *WIDE, *arguments]
            command += (hosts if count > 1 else []) + (own or {}).get(index, [])
            rows = runs.folder / f"{run}.{count}.{index}.rows"
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", RECORDING, str(rows), str(row_seconds), *command],
                    cwd=REPOSITORY,
                    env=runs.environment() | {"JAX_ENABLE_X64": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=self.said_in[index].open("w"),
                    text=True,
                )
            )

    def ended(self, within: float) -> list[int]:
        """Returns the exit statuses of all processes. Fails if they do not end within so many seconds."""
        until = time.monotonic() + within
        try:
            return [process.wait(max(until - time.monotonic(), 0)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within} s: {self.said()}") from None
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.said_in)


# Runs `gemma ARGUMENTS` and writes the index of each training row that it reads to a file.
RECORDING = """
import sys, time
from gemma_jax.cli import main
from gemma_jax.data.rows import PackedRows

path, row_seconds, *arguments = sys.argv[1:]
file, read_into = open(path, "w", buffering=1), PackedRows.read_into

def recorded(self, batch, slot, row, bos_id):
    if self.split == "train":
        print(row, file=file)
        time.sleep(float(row_seconds))
    return read_into(self, batch, slot, row, bos_id)

PackedRows.read_into = recorded
sys.exit(main(arguments))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
