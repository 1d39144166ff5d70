"""`gemma chat` as a person calls it: from a pipe, and in a terminal."""

import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import MeshConfig
from tests.messages import naming

# Ctrl-C reaches the programs whose controlling terminal it is typed on.
IN_THIS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "gemma_jax.cli", *sys.argv[1:]])
"""
SETTINGS = ("--max_new_tokens", "5", "--mesh.cpu_devices", "1")


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose name says that it is instruction-tuned."""
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "tiny-it"))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Returns a function that puts text on standard input, as a pipe would."""

    def put(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return put


def answers(run: Path, *messages: str) -> list[str]:
    chat = Gemma.from_pretrained(run, mesh=MeshConfig(cpu_devices=1)).chat(max_new_tokens=5)
    return [chat.send(message) for message in messages]


def test_a_pipe_is_answered_line_by_line(
    run: Path, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("  /1\r\n\n/1/2")
    assert main(["chat", str(run), *SETTINGS]) == 0
    expected = answers(run, "  /1", "/1/2")
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_commands_reset_and_save(
    run: Path, tmp_path: Path, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a dialogue.jsonl"
    typed(f"1\n/save {file}\n/reset\n2\n/save {file}\n/help\n")
    assert main(["chat", str(run), *SETTINGS]) == 0
    [line] = file.read_text(encoding="utf-8").splitlines()
    [two] = answers(run, "2")
    assert json.loads(line)["messages"] == [
        {"role": "user", "content": "2"},
        {"role": "model", "content": two},
    ]
    assert re.search(naming(2, file, "anew", 2, file, "/save FILE"), capsys.readouterr().err)


def test_in_a_pipe_a_mistake_ends_it(
    run: Path, tmp_path: Path, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for line, told in [
        ("/rest", naming("/rest", "/reset")),
        ("/save", naming("/save", "/save dialogue.jsonl")),
        (f"/save {taken}", naming(taken, "already")),
        (f"/save {tmp_path / 'no' / 'where'}", naming(tmp_path / "no" / "where", "written")),
        ("1 and 2 " * 200, naming("context", 256, "reset")),
        ("half a character: \udcff", naming("U+DCFF")),
    ]:
        typed(f"{line}\n1\n")
        assert main(["chat", str(run), *SETTINGS]) == 2
        captured = capsys.readouterr()
        [sentence] = captured.err.splitlines()
        assert re.search("^error: .*" + told, sentence) and captured.out == ""
    assert taken.read_text() == "mine"


@pytest.mark.slow
def test_a_real_terminal_with_a_real_ctrl_c(run: Path) -> None:
    """Ctrl-C stops an answer at most, never the program; Ctrl-D ends it with status 0."""
    keyboard, terminal = os.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", IN_THIS_TERMINAL, "chat", str(run), "--max_new_tokens", "200"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    os.close(terminal)

    def shown_until(mark: str) -> str:
        """Returns the output of a terminal up to a mark; fails if the mark never appears."""
        screen, end = "", time.monotonic() + 120
        while mark not in screen:
            assert time.monotonic() < end and select.select([keyboard], [], [], 120)[0], screen
            screen += os.read(keyboard, 1).decode("utf-8", "replace")
        return screen

    try:
        shown_until("> ")
        os.write(keyboard, b"1 and 2\n")
        shown_until("1 and 2\r\n")
        os.write(keyboard, b"\x03")
        # Where the key meets it depends on the machine: typing, compiling, answering, or done already.
        shown_until("> ")
        os.write(keyboard, b"/rest\n")
        assert "/reset" in shown_until("> ")
        os.write(keyboard, b"/help\n")
        shown_until("/save FILE")
        shown_until("> ")
        os.write(keyboard, b"\x04")
        assert program.wait(60) == 0
    finally:
        program.kill()
        os.close(keyboard)
