"""The `gemma` command itself: which commands there are, and how mistakes and bugs end."""

import importlib
import os
import signal
import subprocess
import sys

import jax
import pytest

from gemma_jax import __version__, cli
from gemma_jax.cli import main


@pytest.mark.parametrize("prog", ["gemma", "python train.py"])
@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage_names_the_program_and_its_commands(
    prog: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [] if prog == "gemma" else ["pretrain"]
    assert main(arguments, prog=prog, commands=names) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"usage: {prog} COMMAND")
    for name, line in zip(names or cli.COMMANDS, lines, strict=True):
        assert line.split()[0] == name and f": {prog} {name} " in line
        assert callable(importlib.import_module(f"gemma_jax.commands.{name}").run)


def test_version_names_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gemma_jax {__version__}\njax {jax.__version__}\ndevices: 8 cpu\n"


@pytest.mark.parametrize("error", [KeyError("a bug"), BrokenPipeError("of a worker")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(arguments: object, prog: str) -> int:
        raise error

    monkeypatch.setattr("gemma_jax.commands.runs.run", run)
    with pytest.raises(type(error)):
        main(["runs"])


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gemma_jax.cli", "--help"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(writer)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")
