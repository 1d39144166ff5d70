"""Kills the processes that a test started, even if the test fails."""

import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture
def cleanup() -> Iterator[list[subprocess.Popen[str]]]:
    """A list of processes, all of which are killed after the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()
