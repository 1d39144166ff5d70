"""Runs that start from a checkpoint of another run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_pretrain import saved_arrays

from gemma_jax.cli import main
from gemma_jax.training.metrics import read_metrics
from tests.messages import naming


@pytest.fixture
def source(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a run of 8 steps with checkpoints after 4 and 8, which a test may damage."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def files(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}


def test_a_fork_that_changes_nothing_ends_as_its_source_and_leaves_that_alone(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, fork = files(source), source.parent / "fork"
    arguments = ["pretrain", str(source), "--fork_from", f"{source}/checkpoints/4", "--run_dir", str(fork)]
    assert main(arguments) == 0
    assert re.search(naming("resuming", fork, 4, 8), capsys.readouterr().err)
    assert json.loads((fork / "config.json").read_text())["fork_from"] == f"{source}/checkpoints/4"
    expected, actual = saved_arrays(source, 8), saved_arrays(fork, 8)
    assert expected.keys() == actual.keys() and len(expected) > 30
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    losses = {e["step"]: e["loss"] for e in read_metrics(source) if "loss" in e}
    assert {e["step"]: e["loss"] for e in read_metrics(fork) if "loss" in e} == {
        s: losses[s] for s in (5, 6, 7, 8)
    }
    assert files(source) == before


def test_a_fork_goes_its_own_way_and_is_resumed_without_its_source(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = source.parent / "fork"
    own = ["--optimizer.learning_rate", "0.02", "--steps", "10", "--data.sequence_length", "16"]
    command = ["pretrain", str(source), "--run_dir", str(fork), *own]
    assert main([*command, "--fork_from", str(source)]) == 0
    # The newest step of the run that was named, kept from then on.
    assert json.loads((fork / "config.json").read_text())["fork_from"] == f"{source}/checkpoints/8"
    assert [e["step"] for e in read_metrics(fork) if "loss" in e] == [9, 10]
    assert sorted(p.name for p in (fork / "checkpoints").iterdir()) == ["10", "8"]
    capsys.readouterr()
    assert main(["replay", str(fork), "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["parameters_of_step"] == 8
    assert main(["replay", str(fork), "8"]) == 2
    assert re.search(naming("step 8", fork, f"{source}/checkpoints/8"), capsys.readouterr().err)
    shutil.rmtree(source / "checkpoints")
    # By the same command, and by the run itself; another origin is a mistake.
    for steps, words in ((11, [*command, "--fork_from", str(source)]), (12, ["pretrain", str(fork)])):
        assert main([*words, "--steps", str(steps)]) == 0
        assert re.search(naming("resuming", fork, steps - 1, steps), capsys.readouterr().err)
    assert main([*command, "--fork_from", "elsewhere"]) == 2
    told = naming("fork_from", f"'{source}/checkpoints/8'", "'elsewhere'", "--run_dir")
    assert re.search(told, capsys.readouterr().err)


REFUSED = {
    "nothing there": ("--fork_from /nowhere", "/nowhere random:PRESET"),
    "itself": ("--run_dir {run} --existing_run overwrite", "fork_from run_dir --run_dir"),
    "another run": ("--run_dir {run}", "fork_from '' --existing_run"),
    "model": ("--model.num_layers 3", "model.num_layers 2 3 --model.num_layers"),
    "tokenizer": ("--tokenizer.path a", "tokenizer.path '' 'a' --tokenizer.path"),
    "optimizer": ("--optimizer.name lion", "optimizer.name 'adamw' 'lion' --optimizer.name"),
}


def test_forks_that_do_not_fit_end_in_one_sentence_and_harm_nothing(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(source)
    for arguments, told in REFUSED.values():
        words = ["--fork_from", str(source), "--run_dir", str(source.parent / "fork"), "--steps", "9"]
        words += [word.format(run=source) for word in arguments.split()]
        capsys.readouterr()
        assert main(["pretrain", str(source), *words]) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and re.search(naming("error: ", *told.split()), lines[0]), lines
        assert not (source.parent / "fork").exists() and files(source) == before


def test_a_damaged_origin_is_refused_and_a_longer_context_is_allowed(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = source.parent / "fork"
    words = ["pretrain", str(source), "--fork_from", str(source), "--run_dir", str(fork), "--steps", "9"]
    longer = ["--model.context_length", "512", "--model.rope_base", "5e4", "--data.sequence_length", "512"]
    assert main([*words, *longer]) == 0
    shutil.rmtree(fork)
    array = max((source / "checkpoints/8/params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    capsys.readouterr()
    assert main(words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(naming("checkpoints/8", "damaged", "params/"), last)
