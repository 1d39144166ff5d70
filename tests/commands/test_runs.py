"""The table of runs."""

import json
import re
from pathlib import Path

import pytest

from gemma_jax.cli import main
from gemma_jax.config import PretrainConfig, to_json
from tests.messages import naming


def make_run(folder: Path, steps: int, *entries: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(PretrainConfig(steps=steps)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def training(step: int, loss: float, seconds: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "tokens": 1000 * step, "seconds": seconds}


def held_out(step: int, loss: float, seconds: float) -> dict[str, float]:
    return {"step": step, "held_out_loss": loss, "held_out_bits_per_byte": loss / 2, "seconds": seconds}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two runs, one run that has not started, and other files and folders."""
    runs = tmp_path / "runs"
    entries = [training(10, 5.0, 60), held_out(10, 4.0, 70), training(20, 3.25, 3700)]
    make_run(runs / "first", 1000, *entries)
    make_run(runs / "sweep" / "deep" / "second", 40, training(40, 2.5, 30), held_out(40, 2.25, 31))
    make_run(runs / "waiting", 7)
    make_run(runs / "first" / "checkpoints" / "10", 3)  # nothing is looked for inside a run
    (runs / "loop").symlink_to(runs, target_is_directory=True)
    (runs / "published").mkdir()
    (runs / "published" / "config.json").write_text('{"model_type": "gemma"}')
    (runs / "broken").mkdir()
    (runs / "broken" / "config.json").write_text("{")
    (runs / "mistyped").mkdir()
    (runs / "mistyped" / "config.json").write_text('{"experiment": "pretrain", "stepz": 3}')
    return runs


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["run", "step", "loss", "held-out", "bits/byte", "tokens", "time"],
        ["first", "20/1,000", "3.250", "4.000", "(step", "10)", "2.000", "(step", "10)", "20,000", "1h01m"],
        ["sweep/deep/second", "40/40", "2.500", "2.250", "1.125", "40,000", "31s"],
        ["waiting", "0/7", "-", "-", "-", "-", "-"],
    ]
    broken, mistyped = err.splitlines()
    assert "broken/config.json" in broken
    assert "stepz" in mistyped


def test_the_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curves.png"
    assert main(["runs", str(folder), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert re.search(naming("first", "sweep/deep/second", picture), capsys.readouterr().err)
