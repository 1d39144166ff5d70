"""`gemma replay` rebuilds and prints the batch of a past step."""

import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gemma_jax.cli import main
from gemma_jax.commands.replay_report import print_report
from gemma_jax.config import DataConfig
from gemma_jax.data.loader import Loader, prepare
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.metrics import read_metrics
from gemma_jax.training.replay import Replay
from tests.messages import naming


def replayed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """The JSON lines of `gemma replay`."""
    capsys.readouterr()
    assert main(["replay", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_step_after_a_checkpoint_has_the_numbers_that_the_run_logged(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, *rows = replayed(capsys, tiny_run, 5, "--rows", 0)
    logged = next(entry for entry in read_metrics(tiny_run) if entry["step"] == 5)
    assert summary["parameters_of_step"] == 4 and summary["logged"] == logged
    assert summary["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert summary["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    # By layer: two layers, and what is not stacked has one norm.
    norms = summary["grad_norms"]
    assert len(norms) == 11 and len(norms["blocks.attention.q"]) == 2
    assert isinstance(norms["embedding"], float) and isinstance(norms["final_norm"], float)
    squares = sum(float(np.sum(np.square(norm))) for norm in norms.values())
    assert math.sqrt(squares) == pytest.approx(logged["grad_norm"], rel=1e-5)
    # The mean over all tokens is the loss, and each segment's mean is its tokens'.
    segments = [segment for row in rows for segment in row["segments"]]
    losses = np.concatenate([segment["token_losses"] for segment in segments])
    assert losses.mean() == pytest.approx(logged["loss"], rel=1e-5)
    for segment in segments:
        assert segment["loss"] == pytest.approx(np.mean(segment["token_losses"]), rel=1e-5)
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    assert sorted(row["row"] for row in rows) == list(range(32, 40))


def test_segments_are_the_text_at_the_place_that_is_named(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.load(tiny_run / "tokenizer.model")
    _, *rows = replayed(capsys, tiny_run, 2, "--rows", 0)
    segments = [segment for row in rows for segment in row["segments"]]
    assert len(segments) > 4
    for segment in segments:
        document = Path(segment["place"]).read_text(encoding="utf-8")
        body = [*tokenizer.encode(document), tokenizer.eos_id]
        assert segment["token_ids"] == body[segment["start"] : segment["stop"]]
        assert segment["text"].removesuffix("<eos>") in document
        assert segment["loss_weights"] == [1.0] * len(segment["token_ids"])


def test_every_step_before_the_first_checkpoint_has_the_first_parameters(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (summary,) = replayed(capsys, tiny_run, 1)[:1]
    assert summary["parameters_of_step"] == 0
    assert summary["loss"] == pytest.approx(summary["logged"]["loss"], rel=1e-6)
    (summary,) = replayed(capsys, tiny_run, 2)[:1]
    assert summary["parameters_of_step"] == 0
    assert abs(summary["loss"] - summary["logged"]["loss"]) > 1e-3
    # The checkpoint of a step comes after it.
    assert [replayed(capsys, tiny_run, step)[0]["parameters_of_step"] for step in (4, 8)] == [0, 4]


def test_a_step_that_is_to_come_and_another_mesh(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "longer"))
    config = json.loads((run / "config.json").read_text()) | {"steps": 11}
    (run / "config.json").write_text(json.dumps(config))
    on_two = replayed(capsys, run, 10)
    on_four = replayed(capsys, run, 10, "--mesh.cpu_devices", 4, "--mesh.tensor", 2)
    assert on_two[0]["logged"] is None and on_two[0]["parameters_of_step"] == 8
    assert on_four[0]["loss"] == pytest.approx(on_two[0]["loss"], rel=1e-5)
    assert [row["row"] for row in on_four[1:]] == [row["row"] for row in on_two[1:]]


Read = tuple[Loader, Tokenizer]


@pytest.fixture
def loader(tiny_run: Path) -> Read:
    config = DataConfig(
        sources=(f"{tiny_run.parent}/corpus/*.txt",),
        sequence_length=64,
        batch_size=4,
        held_out=0.0,
        cache_dir=str(tiny_run.parent / "cache"),
    )
    tokenizer = Tokenizer.load(tiny_run / "tokenizer.model")
    return prepare(config, tokenizer, 0).train, tokenizer


def report(loader: Read, replay: Replay) -> str:
    screen = io.StringIO()
    print_report(replay, *loader, 0, Console(file=screen, width=80, highlight=False))
    return screen.getvalue()


def with_losses(loader: Read, losses: np.ndarray, first_row: int = 0) -> Replay:
    """A batch with invented losses."""
    # numpy arrays replace those of the device.
    norms = {"embedding": np.float32(3.0), "blocks.q": np.array([4.0, 12.0], np.float32)}
    batch = loader[0].batch(first_row, 4)
    return Replay(7, 3, first_row, batch, losses.astype(np.float32), float(losses.mean()), norms, None)


def test_rows_that_are_not_finite_come_first_and_tokens_are_marked(loader: Read) -> None:
    losses = np.full((4, 64), 2.0)
    losses[1] = 5.0
    losses[2, 3] = np.nan
    losses[3, 0] = np.inf
    replay = with_losses(loader, losses)
    assert replay.rows_by_loss(0) == [2, 3, 1, 0] and replay.rows_by_loss(1) == [2]
    assert replay.gradient_norm == pytest.approx(13.0)
    shown = report(loader, replay)
    assert " nan⟧" in shown and " inf⟧" in shown and "1 of " in shown
    assert "  embedding 3\n  blocks.q 4 12\n" in shown
    # All of a batch: marks would hide the text, and say nothing.
    spoilt = report(loader, with_losses(loader, np.full((4, 64), np.nan)))
    assert "spoilt" in spoilt
    assert "⟦" not in spoilt.partition("│")[2] and re.search(r"\b(\d+) of \1 losses\b", spoilt)


def test_tokens_without_weight_are_told_and_do_not_count(loader: Read) -> None:
    losses = np.full((4, 64), 1.0)
    losses[0, :4] = 1000.0
    replay = with_losses(loader, losses)
    replay.batch.loss_weights[0, :4] = 0
    assert replay.row_loss(0) == 1.0
    text = re.split(r"(?m)^row 0\b", report(loader, replay))[1]
    bracketed = re.search(r"⟨([^⟩]*)⟩", text.replace("\n  │ ", "\n"))
    ids = replay.batch.targets[0, :4].tolist()
    assert bracketed and bracketed[1] == loader[1].decode(ids) and "⟦" not in bracketed[0]
    replay.batch.loss_weights[:] = 0
    assert replay.row_loss(0) == 0.0


def test_documents_cannot_control_the_terminal(loader: Read) -> None:
    shown = ""
    for first in range(0, loader[0].num_rows, 4):
        shown += report(loader, with_losses(loader, np.ones((4, 64)), first))
    assert "QXJ ж☃ ZZZ" in re.sub(r"⟦([^⟧]*) \d+\.\d⟧", r"\1", shown)  # pieces of bytes, too
    assert "\x1b" not in shown and "\x07" not in shown
    assert "\\x1b" in re.sub(r" \d+\.\d⟧|⟦", "", shown)


def test_data_that_has_changed_is_not_taken_for_what_the_run_saw(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_run.parent / "corpus", corpus)
    config = json.loads((run / "config.json").read_text())
    config["data"]["sources"] = [f"{corpus}/*.txt"]
    (run / "config.json").write_text(json.dumps(config))
    statistics = json.loads((run / "data.json").read_text())
    statistics["corpora"][0]["name"] = f"{corpus}/*.txt"
    (run / "data.json").write_text(json.dumps(statistics))
    assert main(["replay", str(run), "5"]) == 0  # a copy of the corpus will do
    (corpus / "7.txt").write_text("something else")
    assert main(["replay", str(run), "5"]) == 2
    assert re.search(naming(f"{corpus}/*.txt", run), capsys.readouterr().err)
