"""The `gemma` command itself: which commands there are, and how mistakes and bugs end."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from gemma_jax import __version__, cli
from gemma_jax.cli import main
from gemma_jax.weights import native


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
        assert callable(importlib.import_module(f"gemma_jax.commands.{name.replace('-', '_')}").run)


def test_version_names_the_devices_and_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    *lines, kernels = capsys.readouterr().out.splitlines()
    assert lines == [f"gemma_jax {__version__}", f"jax {jax.__version__}", "devices: 8 cpu"]
    assert kernels == f"sampling on CPU: {native.kernels()}"


@pytest.mark.parametrize("error", [KeyError("a bug"), BrokenPipeError("of a worker")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(arguments: object, prog: str) -> int:
        raise error

    monkeypatch.setattr("gemma_jax.commands.runs.run", run)
    with pytest.raises(type(error)):
        main(["runs"])


def test_a_bucket_that_cannot_be_reached_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("no route to\nhost")
    monkeypatch.setattr(importlib.import_module("gemma_jax.commands.runs"), "run", Mock(side_effect=error))
    assert main(["runs", "gs://somewhere"]) == 2
    assert "no route to host" in capsys.readouterr().err


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gemma_jax.cli", "--help"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(writer)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


def shell(command: str, **environment: str) -> tuple[int, str]:
    """Exit status and standard error of a line of bash in which `gemma` is this one."""
    line = f"gemma() {{ '{sys.executable}' -m gemma_jax.cli \"$@\"; }}; set -o pipefail; {command}"
    run = subprocess.run(
        ["bash", "-c", line],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize("command", ["--help", "pretrain --help", "runs {runs}"])
@pytest.mark.parametrize(
    ("to", "status", "told"),
    [
        ("| true", 128 + signal.SIGPIPE, None),
        (">/dev/full", 2, "standard output"),
        (">&-", 0, None),
        ("2>&- >/dev/null", 0, None),
        (">&- 2>&- <&-", 0, None),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_streams_that_cannot_be_written(
    tiny_run: Path, command: str, to: str, status: int, told: str | None, unbuffered: str
) -> None:
    line = f"gemma {command.format(runs=tiny_run)} {to}"
    found, errors = shell(line, PYTHONUNBUFFERED=unbuffered)
    assert found == status, errors
    assert told in errors and len(errors.splitlines()) == 1 if told else errors == ""


def test_a_mistake_keeps_its_status_where_standard_error_is_full_or_closed() -> None:
    assert shell("gemma nonsense 2>/dev/full")[0] == shell("gemma nonsense 2>&-")[0] == 2


def test_what_an_encoding_does_not_have_is_escaped(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "é日").symlink_to(tiny_run)
    for encoding in ("ascii", "latin-1"):
        status, errors = shell(f"gemma runs {tmp_path} | grep -aq u65e5", PYTHONIOENCODING=encoding)
        assert (status, errors) == (0, "")
