"""`gemma finetune` from a checkpoint to a model that is sampled, exported and resumed."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.errors import UserError
from gemma_jax.testing import assert_same
from gemma_jax.training.metrics import read_metrics
from tests.commands.processes import Runs, last_arrays, losses, wait_for
from tests.messages import naming
from tests.tiny_finetuning import config_file
from tests.tiny_run import config_file as base_config
from tests.tiny_run import write_corpus

IDS = np.random.default_rng(0).integers(3, 400, (4, 12))
IDS[:2, 4] = 106, 107


@pytest.fixture(scope="module")
def tuned(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA over int8, to be read only; its config file is beside it."""
    folder = tmp_path_factory.mktemp("tuned")
    assert main(["finetune", config_file(folder, tiny_run, quantization="int8")]) == 0
    return folder / "run"


def test_an_adapter_is_saved_alone_and_resumed(tuned: Path, tiny_run: Path, tmp_path: Path) -> None:
    arrays = last_arrays(tuned, 8)
    trained = {name for name in arrays if name.startswith("params.")}
    projections = ("attention.q", "attention.k", "attention.v", "attention.o")
    projections += ("feed_forward.gate", "feed_forward.up", "feed_forward.down")
    expected = {f"params.blocks.{name}.{last}" for name in projections for last in "ab"}
    assert trained == expected | {"params.embedding.rows"}
    size = sum(x.nbytes for name, x in arrays.items() if name in trained)
    on_disk = sum(path.stat().st_size for path in (tuned / "checkpoints" / "8").rglob("*") if path.is_file())
    assert on_disk < 3.3 * size + 200_000  # the adapter and two moments
    losses = {e["step"]: e["held_out_loss"] for e in read_metrics(tuned) if "held_out_loss" in e}
    assert losses[8] < losses[4] and all(
        "held_out_token_accuracy" in e for e in read_metrics(tuned) if "held_out_loss" in e
    )

    # Stopped after four steps, and resumed on other devices: the same bits on the same mesh.
    command = ["finetune", str(tuned.parent / "config.json"), "--run_dir", str(tmp_path / "again")]
    assert (
        main([*command, "--data.cache_dir", str(tuned.parent / "cache"), "--checkpoint.keep_last", "9"]) == 0
    )
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    assert main(command) == 0
    for name, x in last_arrays(tmp_path / "again", 8).items():
        np.testing.assert_array_equal(x, arrays[name], err_msg=name)
    assert main(["replay", str(tuned), "3"]) == 0


def test_the_adapter_is_used_and_merged(tuned: Path, tiny_run: Path, tmp_path: Path) -> None:
    base = Gemma.from_pretrained(tiny_run, quantization="int8", adapters={"tuned": tuned})
    expected = Gemma.from_pretrained(tuned).logits(IDS)
    assert np.linalg.norm(expected - base.logits(IDS)) > 0.01 * np.linalg.norm(expected)
    both = base.logits(IDS, adapter=["tuned", "", "tuned", ""])
    assert_same(both[::2], expected[::2], 1e-6)
    assert_same(both[1::2], base.logits(IDS)[1::2], 1e-6)
    rows = [list(map(int, row)) for row in IDS]
    scores = np.array(base.score(rows, adapter="tuned"))
    of_logits = np.asarray(jax.nn.log_softmax(expected[:, :-1], axis=-1))
    assert_same(scores, np.take_along_axis(of_logits, IDS[:, 1:, None], -1)[..., 0], 1e-5)
    said = base.generate(["alpha beta", "gamma"], adapter=["tuned", ""], max_new_tokens=5)
    alone = Gemma.from_pretrained(tuned).generate(["alpha beta"], max_new_tokens=5)
    assert said[0].token_ids == alone[0].token_ids
    assert said[1].token_ids == base.generate(["gamma"], max_new_tokens=5)[0].token_ids

    merged, peft = tmp_path / "merged", tmp_path / "peft"
    assert main(["convert", str(tuned), str(merged), "--merge"]) == 0
    assert_same(Gemma.from_pretrained(merged).logits(IDS), expected, 1e-5)
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [1, 107]
    assert Gemma.from_pretrained(merged).instruction_tuned
    assert main(["convert", str(tuned), str(peft), "--format", "peft"]) == 0
    again = Gemma.from_pretrained(tiny_run, quantization="int8", adapters={"peft": peft})
    assert_same(again.logits(IDS, adapter="peft"), expected, 1e-6)
    gguf = tmp_path / "gguf"
    assert main(["convert", str(tuned), str(gguf), "--merge", "--format", "gguf"]) == 0
    assert_same(Gemma.from_pretrained(gguf).logits(IDS), expected, 0.02)
    onto = tmp_path / "onto"
    assert main(["convert", str(tuned), str(onto), "--merge_onto", str(tiny_run)]) == 0
    dense = Gemma.from_pretrained(tiny_run, adapters={"tuned": tuned})
    assert_same(Gemma.from_pretrained(onto).logits(IDS), dense.logits(IDS, adapter="tuned"), 1e-5)


def test_an_adapter_of_other_weights(
    tuned: Path, tiny_run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    command = [
        "pretrain",
        base_config(tmp_path, corpus),
        "--run_dir",
        str(other),
        "--seed",
        "5",
        "--steps",
        "4",
    ]
    assert main(command) == 0
    with pytest.raises(UserError, match=naming(tuned, tiny_run)):
        Gemma.from_pretrained(other, adapters={"tuned": tuned})
    with pytest.raises(UserError, match=naming("nobody", "tuned")):
        Gemma.from_pretrained(tiny_run, adapters={"tuned": tuned}).generate(["a"], adapter="nobody")
    with pytest.raises(UserError, match=naming(tiny_run)):
        Gemma.from_pretrained(other, adapters={"tuned": tiny_run})

    # The base changes under a run.
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(tiny_run, base)
    config = config_file(tmp_path, base)
    assert main(["finetune", config, "--run_dir", str(run)]) == 0
    shutil.rmtree(base)
    shutil.copytree(other, base)
    capsys.readouterr()
    assert main(["finetune", config, "--run_dir", str(run), "--steps", "9"]) == 2
    assert str(base) in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "merged"), "--merge"]) == 2
    assert str(base) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--init_from", ""], "init_from"),
        (["--init_from", "nowhere/at/all"], "nowhere/at/all"),
        (["--lora.rank", "0", "--quantization", "int8"], "int8"),
        (["--lora.targets", "query"], "query"),
        (["--objective", "dpo", "--data.format", "dialogue"], "dialogue"),
        (["--quantization", "int3"], "int3"),
    ],
)
def test_mistakes(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], named: str
) -> None:
    assert main(["finetune", config_file(tmp_path, tiny_run), *changes]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_all_weights_and_early_stopping(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, tiny_run)
    full = ["--lora.rank", "0", "--optimizer.learning_rate", "1.0"]
    early = ["--evaluation.every", "1", "--evaluation.patience", "2", "--evaluation.prompts", "alpha beta"]
    assert main(["finetune", config, *full, *early]) == 0
    evaluated = [e["held_out_loss"] for e in read_metrics(tmp_path / "run") if "held_out_loss" in e]
    assert len(evaluated) < 8 and min(evaluated[-2:]) >= min(evaluated[:-2])
    assert "alpha beta ->" in capsys.readouterr().err
    assert main(["finetune", config, *full, *early]) == 0  # complete
    assert len([e for e in read_metrics(tmp_path / "run") if "held_out_loss" in e]) == len(evaluated)
    assert Gemma.from_pretrained(tmp_path / "run").instruction_tuned


def test_preferences_begin_at_their_reference(tuned: Path, tiny_run: Path, tmp_path: Path) -> None:
    """A run that starts from an adapter has that adapter as its reference; the margin grows."""
    config = config_file(tmp_path, tuned, objective="dpo")
    assert main(["finetune", config, "--quantization", "int8", "--steps", "16", "--lora.dropout", "0"]) == 0
    log = read_metrics(tmp_path / "run")
    first = next(entry for entry in log if entry["step"] == 1 and "loss" in entry)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-5
    )
    margins = [entry["held_out_rewards/margins"] for entry in log if "held_out_loss" in entry]
    assert margins[-1] > margins[0] > 0
    assert Gemma.from_pretrained(tmp_path / "run").logits(IDS).shape == (4, 12, 430)


def test_preferences_with_all_weights(tiny_run: Path, tmp_path: Path) -> None:
    """Every batch carries the log-probabilities of the model that training began with."""
    config = config_file(tmp_path, tiny_run, objective="dpo")
    full = ["--lora.rank", "0", "--optimizer.learning_rate", "3e-3"]
    assert main(["finetune", config, *full, "--steps", "4"]) == 0
    assert main(["finetune", config, *full, "--steps", "12"]) == 0
    log = [entry for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert log[-1]["rewards/margins"] > log[3]["rewards/margins"] > 0


class FinetuneRuns(Runs):
    command = "finetune"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "base").mkdir()
        write_corpus(folder / "corpus")
        assert main(["pretrain", base_config(folder / "base", folder / "corpus")]) == 0
        config_file(folder, folder / "base" / "run", **{"steps": 60, "checkpoint.every": 2})


@pytest.mark.slow
def test_kills_on_changing_meshes_lose_nothing(tmp_path: Path, cleanup: list[subprocess.Popen[str]]) -> None:
    runs, rng = FinetuneRuns(tmp_path), random.Random(0)
    runs.finish("undisturbed")
    meshes = [
        ["--mesh.cpu_devices", "1"],
        ["--mesh.cpu_devices", "4"],
        ["--mesh.cpu_devices", "4", "--mesh.tensor", "2"],
    ]
    for number in range(5):
        process = runs.start("killed", *meshes[number % 3])
        cleanup.append(process)
        before = len(runs.steps("killed"))
        wait_for(process, lambda before=before: len(runs.steps("killed")) > before + rng.randint(1, 6), 120)
        process.kill()
        process.communicate()
    runs.finish("killed")
    resumed, expected = dict(losses(runs, "killed")), dict(losses(runs, "undisturbed"))
    assert resumed.keys() == expected.keys()
    np.testing.assert_allclose([*resumed.values()], [*expected.values()], rtol=2e-4)
