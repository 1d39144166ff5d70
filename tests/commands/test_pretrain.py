"""Runs that are started, stopped, resumed and damaged as by a user."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma_jax.cli import main
from gemma_jax.errors import RESTART_STATUS
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training import interruption
from gemma_jax.training.metrics import read_metrics
from tests.messages import naming
from tests.tiny_run import config_file


class StopAfter:
    """Replaces the signal handlers: requests a stop after so many steps."""

    steps = 0

    def __init__(self) -> None:
        self.left = self.steps

    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def __enter__(self) -> "StopAfter":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def saved_arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    loaded = ocp.load_checkpointables(run / "checkpoints" / str(step), {"params": None, "opt_state": None})
    return {f"{part}.{name}": np.asarray(x) for part, tree in loaded.items() for name, x in tree.items()}


def test_a_stopped_run_resumes_to_bitwise_the_same_end(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, corpus)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["pretrain", config, "--run_dir", str(whole)]) == 0

    with monkeypatch.context() as patch:
        patch.setattr(interruption, "StopSignals", type("StopAfter3", (StopAfter,), {"steps": 3}))
        assert main(["pretrain", config, "--run_dir", str(parts)]) == RESTART_STATUS == 75
    assert [entry["step"] for entry in read_metrics(parts) if "loss" in entry][-1] == 3
    assert re.search(r"stopped.* step 3\b", capsys.readouterr().err)
    assert main(["pretrain", config, "--run_dir", str(parts)]) == 0
    assert "resuming" in capsys.readouterr().err

    expected, actual = saved_arrays(whole, 8), saved_arrays(parts, 8)
    assert expected.keys() == actual.keys() and len(expected) > 30
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)

    def numbers(run: Path) -> list[dict[str, float]]:
        """Returns the metrics, without measurements of the machine and entries on stopping and resuming."""
        of_training = ("step", "loss", "grad_norm", "learning_rate", "tokens", "held_out_loss")
        entries = [entry for entry in read_metrics(run) if {"loss", "held_out_loss"} & entry.keys()]
        return [{name: entry[name] for name in of_training if name in entry} for entry in entries]

    assert len(numbers(parts)) == 10
    assert numbers(parts) == numbers(whole)


def test_a_run_is_complete_goes_on_and_is_overwritten_only_when_asked_for(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    there = ("--run_dir", "run")
    held_out = [entry for entry in read_metrics(run) if "held_out_loss" in entry]
    assert [entry["step"] for entry in held_out] == [4, 8]
    assert held_out[1]["held_out_bits_per_byte"] < held_out[0]["held_out_bits_per_byte"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    before = sorted((p, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*"))
    assert main(["pretrain", "run", *there]) == 0
    assert "complete" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*")) == before
    assert main(["pretrain", "run", *there, "--steps", "10"]) == 0
    assert "resuming" in capsys.readouterr().err
    other = ("--optimizer.learning_rate", "0.5")
    assert main(["pretrain", "run", *there, *other]) == 2
    told = naming("optimizer.learning_rate", 0.01, 0.5, "--existing_run overwrite")
    assert re.search(told, capsys.readouterr().err)
    assert main(["pretrain", "run", *there, *other, "--existing_run", "overwrite"]) == 0
    assert "starting" in capsys.readouterr().err


OVERFLOW = [
    *("--optimizer.learning_rate", "2e9", "--optimizer.clip_norm", "0", "--optimizer.warmup_steps", "0"),
    *("--compute.dtype", "float32"),
]


def test_too_many_steps_that_are_not_finite_end_the_run_and_name_the_layers(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step makes the parameters so large that no later step has a finite loss."""
    changes = ["--stability.skip_nonfinite", "3", "--checkpoint.every", "2"]
    assert main(["pretrain", config_file(tmp_path, corpus), *OVERFLOW, *changes]) == 2
    *shown, last = capsys.readouterr().err.strip().splitlines()
    told = [re.findall(r"\d+", line) for line in shown if re.search(r"step \d+ .*skipped.* nan ", line)]
    # The step, how many there are in a row, and how many in all.
    assert told == [["2", "1", "1"], ["3", "2", "2"], ["4", "3", "3"]]
    named = naming("error: ", "step 5", "nan", 4, "blocks.attention.q", "optimizer.learning_rate")
    assert re.search(named, last)
    assert any(re.search(naming("parameters", "step 4"), line) for line in shown)
    # Four rows, each with the text of its documents and where they are from.
    report = "\n".join(shown)
    assert any(re.search("^" + naming("step 5", 32, 39), line) for line in shown) and "spoilt" in report
    assert len([line for line in shown if re.search(r"^row \d+ .*\bnan\b", line)]) == 4
    assert all(f"{corpus}/" in line for line in shown if line.startswith("  segment"))
    texts = [path.read_text() for path in corpus.glob("*.txt")]
    quoted = [line.removeprefix("  │ ").removesuffix("<eos>") for line in shown if line.startswith("  │ ")]
    assert len(quoted) > 4 and all(any(line in text for text in texts) for line in quoted)
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
    assert [entry["step"] for entry in read_metrics(run) if "loss" in entry] == [1]
    # What was saved remembers how many steps in a row there were, so a resumed run ends at the same step.
    assert main(["pretrain", str(run)]) == 2
    assert re.search(named, capsys.readouterr().err.strip().splitlines()[-1])


def test_a_layer_that_exceeds_float16_is_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--compute.dtype", "float16", "--stability.skip_nonfinite", "0"]
    assert main(["pretrain", config_file(tmp_path, corpus), *OVERFLOW, *changes]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(naming("error: ", "step 2", "layer 0", "float16", "float32"), last)


def test_a_run_in_float16_is_resumed_with_its_loss_scale_and_in_another_dtype(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = [config_file(tmp_path, corpus), "--compute.dtype", "float16", "--logging.every", "1"]
    assert main(["pretrain", *half, "--steps", "3"]) == 0
    assert main(["pretrain", *half, "--steps", "4"]) == 0
    scales = [e["loss_scale"] for e in read_metrics(tmp_path / "run") if "loss_scale" in e]
    assert len(scales) == 4 and len(set(scales)) == 1
    assert main(["pretrain", half[0], "--compute.dtype", "float32", "--steps", "5"]) == 0
    assert main(["pretrain", *half, "--steps", "6"]) == 0
    losses = [e["loss"] for e in read_metrics(tmp_path / "run") if "loss" in e]
    assert len(losses) == 6 and losses[5] < losses[0]


def test_a_run_does_not_go_on_with_other_data(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "corpus"
    shutil.copytree(corpus, other, ignore=shutil.ignore_patterns("cache"))
    config = config_file(tmp_path, other)
    assert main(["pretrain", config, "--steps", "4"]) == 0
    # Copied back: other times of the files, but the same documents.
    for path in other.glob("*.txt"):
        path.touch()
    assert main(["pretrain", config, "--steps", "5"]) == 0
    (other / "1.txt").write_text("alpha beta gamma")
    assert main(["pretrain", config, "--steps", "6"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(naming(f"{other}/*.txt", tmp_path / "run"), last)
    assert main(["pretrain", config, "--steps", "4", "--existing_run", "overwrite"]) == 0


def test_a_run_does_not_go_on_or_fork_with_another_tokenizer(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    given, run = tmp_path / "given.model", tmp_path / "run"
    Tokenizer.train(texts, 430, given)
    command = ["pretrain", config_file(tmp_path, corpus), "--tokenizer.path", str(given)]
    assert main([*command, "--steps", "4"]) == 0
    own = (run / "tokenizer.model").read_bytes()
    Tokenizer.train([text.upper() for text in texts] + texts[:9], 430, given)
    fork = ["--run_dir", str(tmp_path / "fork"), "--fork_from", str(run)]
    for more in ([], fork):
        assert main([*command, "--steps", "5", *more]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(naming(run, "tokenizer.path", run / "tokenizer.model"), last)
    assert (run / "tokenizer.model").read_bytes() == own
    given.write_bytes(own)
    assert main([*command, "--steps", "5"]) == 0


# Any loss above the median of the four before it is a spike, so there are some.
JUMPY = [
    *("--stability.spike_threshold", "0.01", "--stability.spike_window", "4", "--stability.spike_steps", "1"),
    *("--stability.max_rollbacks", "50", "--stability.skip_batches", "1"),
    *(
        "--steps",
        "30",
        "--checkpoint.every",
        "4",
        "--evaluation.every",
        "0",
        "--optimizer.learning_rate",
        "3e-3",
    ),
]


def test_a_run_that_is_taken_back_goes_on_with_later_data_and_so_does_one_that_is_stopped(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, corpus)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["pretrain", config, *JUMPY, "--run_dir", str(whole)]) == 0
    reports = [line for line in capsys.readouterr().err.splitlines() if "spike" in line]
    # Each names the step of the spike and the step to which the run goes back.
    assert len(reports) >= 2 and all(len(re.findall(r"step \d+", line)) == 2 for line in reports)
    entries = read_metrics(whole)
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 31))
    # The batch of every step is found again, after the gaps too.
    starts = {entry["step"]: entry["first_row"] for entry in entries if "first_row" in entry}
    assert all(row > step * 8 for step, row in starts.items())
    last = max(starts)
    for step in (1, last, last + 1):
        assert main(["replay", str(whole), str(step), "--json", "--rows", "1"]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[0])
        (logged,) = [entry for entry in entries if entry["step"] == step and "loss" in entry]
        expected = starts[last] if step == last + 1 else summary["first_row"]
        assert summary["first_row"] == expected
        if summary["parameters_of_step"] == step - 1:
            assert summary["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    # A run that is stopped before, between and amid the spikes comes to the same end.
    for steps in (22, 6, 3, 1000):
        monkeypatch.setattr(interruption, "StopSignals", type("Stop", (StopAfter,), {"steps": steps}))
        status = main(["pretrain", config, *JUMPY, "--run_dir", str(parts)])
        assert status == (75 if steps < 1000 else 0)
    assert [(e["step"], e["loss"]) for e in read_metrics(parts) if "loss" in e] == [
        (e["step"], e["loss"]) for e in entries if "loss" in e
    ]
