"""The `gemma` command itself: which commands there are, and how mistakes and bugs end."""

import importlib
import os
import signal
import subprocess
import sys

import pytest

from gemma_jax import cli
from gemma_jax.cli import main
from gemma_jax.errors import UserError


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output and meaning in output for name, meaning in cli.COMMANDS.items())


def test_every_command_is_there() -> None:
    for name in cli.COMMANDS:
        assert callable(importlib.import_module(f"gemma_jax.commands.{name}").run)


def test_a_program_of_some_commands_has_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample"], prog="python train.py", commands=["pretrain"]) == 2
    assert "python train.py has no command 'sample'" in capsys.readouterr().err
    assert main([], prog="python train.py", commands=["pretrain"]) == 0
    assert "sample" not in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "told"), [
    (["pretrian"], "gemma has no command 'pretrian'; did you mean pretrain?"),
    (["pretrain"], "name a config first: gemma pretrain CONFIG"),
    (["pretrain", "--steps", "5"], "name a config first: gemma pretrain CONFIG"),
    (["pretrain", "demo", "--a\nb", "5"], "unknown option --a b"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {told}") and captured.out == ""


def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("gemma_jax.commands.pretrain")

    def fails(error: Exception) -> None:
        def run(arguments: object, prog: str) -> int:
            raise error

        monkeypatch.setattr(module, "run", run)

    fails(KeyError("a bug"))
    with pytest.raises(KeyError):
        main(["pretrain"])
    fails(UserError("two\nlines"))
    assert main(["pretrain"]) == 2
    assert capsys.readouterr().err == "error: two lines\n"


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = """
import sys
from gemma_jax import cli

class Command:
    def run(*_):
        print("text")
        return 0

cli.importlib.import_module = lambda _: Command
sys.exit(cli.run_command("sample", [], "gemma sample"))
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(writer)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


def test_another_broken_pipe_is_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    class Command:
        @staticmethod
        def run(*_: object) -> int:
            raise BrokenPipeError("of a worker")

    monkeypatch.setattr(cli.importlib, "import_module", lambda _: Command)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.run_command("inspect", [], "gemma inspect")
