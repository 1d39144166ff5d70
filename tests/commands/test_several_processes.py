"""Jobs of several processes train as one process does, read separate rows, and stop and fail together."""

import collections
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma_jax.training.metrics import read_metrics
from tests.commands.processes import STEPS, Job, Runs, last_arrays, losses
from tests.messages import naming

pytestmark = pytest.mark.slow

SIZE = 8  # rows in a batch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> dict[int, float]:
    """The losses of one process on eight devices."""
    job = Job(runs, "undisturbed", 1, "--mesh.cpu_devices", "8", "--checkpoint.every", "1000")
    assert job.ended(120) == [0], job.said()
    return dict(losses(runs, "undisturbed"))


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """A list of jobs that are killed after the test, even if it fails."""
    started: list[Job] = []
    yield started
    for job in started:
        for process in job.processes:
            process.kill()
            process.wait()


def assert_same_run(runs: Runs, run: str, expected: dict[int, float]) -> None:
    """Checks that each step ran once with the loss of the undisturbed run, and that the results are equal."""
    actual = losses(runs, run)
    assert collections.Counter(step for step, _ in actual) == dict.fromkeys(range(1, STEPS + 1), 1)
    for step, loss in actual:
        assert abs(loss - expected[step]) < 1e-8 * expected[step], step
    one, other = last_arrays(runs.folder / "undisturbed"), last_arrays(runs.folder / run)
    assert one.keys() == other.keys() and len(one) > 30
    for name, value in one.items():
        assert value.dtype in (np.float64, np.int32), name
        difference = np.linalg.norm(other[name] - value) / max(np.linalg.norm(value), 1e-300)
        assert difference < 1e-8, (name, difference)


def rows_read(path: Path) -> list[int]:
    return list(map(int, path.read_text().split()))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one_does_and_read_their_own_rows(
    runs: Runs, undisturbed: dict[int, float], jobs: list[Job], count: int
) -> None:
    run = f"by-{count}"
    job = Job(runs, run, count, "--mesh.cpu_devices", "4", "--checkpoint.every", "30")
    jobs.append(job)
    assert job.ended(240) == [0] * count, job.said()
    assert_same_run(runs, run, undisturbed)
    # Together the processes read the rows that one alone reads, each its part of every batch.
    one = np.array(rows_read(runs.folder / "undisturbed.1.0.rows")[: STEPS * SIZE]).reshape(STEPS, SIZE)
    part = SIZE // count
    for index in range(count):
        read = rows_read(runs.folder / f"{run}.{count}.{index}.rows")
        assert len(read) <= (STEPS + 4) * part  # the batches that were read ahead
        own = np.array(read[: STEPS * part]).reshape(STEPS, part)
        np.testing.assert_array_equal(own, one[:, index * part : (index + 1) * part])
    # The first one alone writes the log.
    first, *others = (path.read_text() for path in job.said_in)
    assert f"step {STEPS}/{STEPS}" in first and "done" in first
    assert not any("step " in said or "done" in said for said in others)


# Devices, processes, and which of them is told to stop.
LEGS = ((8, 1, 0), (4, 2, 1), (2, 1, 0), (8, 2, 0), (4, 4, 2), (8, 1, None))


def test_a_run_preempted_on_changing_meshes_ends_as_if_undisturbed(
    runs: Runs, undisturbed: dict[int, float], jobs: list[Job]
) -> None:
    run = "preempted"
    for leg, (devices, count, told) in enumerate(LEGS):
        before = len(losses(runs, run))
        # Slow enough that the second in which jax hears of a signal is a few steps.
        slow = 0.0 if told is None else 0.04
        arguments = ("--mesh.cpu_devices", str(devices), "--checkpoint.every", "1000")
        job = Job(runs, run, count, *arguments, row_seconds=slow)
        jobs.append(job)
        if told is None:
            assert job.ended(120) == [0], job.said()
            break
        until = time.monotonic() + 120
        while len(losses(runs, run)) < before + 2:
            assert all(process.poll() is None for process in job.processes), job.said()
            assert time.monotonic() < until, job.said()
            time.sleep(0.05)
        job.processes[told].send_signal(signal.SIGTERM)
        assert job.ended(60) == [75] * count, job.said()
        assert re.search(r"stopped.* step \d+", job.said_in[0].read_text())
        assert len(losses(runs, run)) < STEPS, f"leg {leg} was too fast: give the test more steps"
    assert_same_run(runs, run, undisturbed)
    # What the log says of the goodput goes on over all its processes.
    told_by_log = [entry for entry in read_metrics(runs.folder / run) if "goodput" in entry]
    for kind in ("steps", "starting", "saving"):
        seconds = [entry[f"seconds_{kind}"] for entry in told_by_log]
        assert seconds == sorted(seconds) and seconds[0] < seconds[-1], kind


def test_processes_go_back_after_a_spike_as_one_does(runs: Runs, jobs: list[Job]) -> None:
    jumpy = ("--stability.spike_threshold", "0.01", "--stability.spike_window", "4")
    jumpy += ("--stability.spike_steps", "1", "--stability.skip_batches", "1", "--steps", "30")
    jumpy += ("--stability.max_rollbacks", "50", "--optimizer.learning_rate", "3e-3")
    jumpy += ("--checkpoint.every", "4", "--evaluation.every", "0", "--mesh.cpu_devices", "4")
    found: list[list[tuple[int, float]]] = []
    for count in (1, 2):
        job = Job(runs, f"jumpy-{count}", count, *jumpy)
        jobs.append(job)
        assert job.ended(180) == [0] * count, job.said()
        assert re.search(r"spike.* step \d+.* step \d+", job.said_in[0].read_text())
        found.append(losses(runs, f"jumpy-{count}"))
    assert [step for step, _ in found[0]] == [step for step, _ in found[1]] == list(range(1, 31))
    for (_, one), (_, two) in zip(*found, strict=True):
        assert abs(one - two) < 1e-8 * one


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_killed_ends_the_others(
    runs: Runs, undisturbed: dict[int, float], jobs: list[Job], gone: int
) -> None:
    run = f"killed-{gone}"
    job = Job(runs, run, 2, "--mesh.cpu_devices", "4", "--steps", "100000", "--evaluation.every", "0")
    jobs.append(job)
    until = time.monotonic() + 120
    while len(losses(runs, run)) < 5:
        assert time.monotonic() < until and all(p.poll() is None for p in job.processes), job.said()
        time.sleep(0.05)
    job.processes[gone].kill()
    statuses = job.ended(60)
    assert statuses[gone] == -signal.SIGKILL
    # Either a computation failed first, or jax noticed the silence and aborted.
    assert statuses[1 - gone] in (75, -signal.SIGABRT)
    said = job.said_in[1 - gone].read_text()
    assert "another" in said, said  # process, in our words, or task, in those of jax


def test_a_process_that_fails_ends_the_others_and_says_why(
    runs: Runs, undisturbed: dict[int, float], jobs: list[Job], tmp_path: Path
) -> None:
    run, cache = "robbed", tmp_path / "cache"
    arguments = ("--mesh.cpu_devices", "4", "--steps", "100000", "--evaluation.every", "0")
    shutil.copytree(runs.folder / "cache", cache)
    job = Job(runs, run, 2, *arguments, own={1: ["--data.cache_dir", str(cache)]})
    jobs.append(job)
    until = time.monotonic() + 120
    while len(losses(runs, run)) < 5:
        assert time.monotonic() < until and all(p.poll() is None for p in job.processes), job.said()
        time.sleep(0.05)
    for path in (cache / "tokens").rglob("*"):
        if path.is_file():
            os.truncate(path, 100)
    first, second = job.ended(60)
    said = job.said_in[1].read_text()
    assert second == 2 and re.search(naming("error: ", cache), said) and "Traceback" not in said, said
    assert first in (75, -signal.SIGABRT)


def test_a_mistake_is_told_by_each_process_before_they_meet(runs: Runs, jobs: list[Job]) -> None:
    job = Job(runs, "mistaken", 2, "--mesh.cpu_devices", "8", "--mesh.tensor", "3")
    jobs.append(job)
    assert job.ended(60) == [2, 2]
    assert job.said().count("error: ") == 2
