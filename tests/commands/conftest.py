"""Processes that must not outlive a test that fails."""

import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture
def cleanup() -> Iterator[list[subprocess.Popen[str]]]:
    """Those that are put here are killed in the end."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()
