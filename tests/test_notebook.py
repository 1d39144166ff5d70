"""The notebooks run from top to bottom, with a tiny model and without Jupyter."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma_jax import Gemma
from gemma_jax.config import FinetuneConfig, load, replace
from gemma_jax.testing import assert_same
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.metrics import read_metrics
from tests.pretrained import published

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-it"
    config = published.MULTI_QUERY | {"vocab_size": 387, "max_position_embeddings": 4096}
    published.write_huggingface(folder, config, published.random_tensors(config, "bfloat16"))
    texts = [f"{a} and {b}\n" for a in range(60) for b in range(60)]
    Tokenizer.train(texts, config["vocab_size"], folder / "tokenizer.model")
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path) -> list[str]:
    """Lets cells run in an empty folder with the tiny checkpoint; returns the list of what they display."""
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.HTML = display.Image = str  # stand-ins
    display.display = shown.append
    interactive = ModuleType("IPython")
    interactive.version_info = (9, 0)  # matplotlib asks for it
    monkeypatch.setitem(sys.modules, "IPython", interactive)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("GEMMA_JAX_CHECKPOINT", str(checkpoint))
    monkeypatch.chdir(tmp_path)
    return shown


def run_cells(name: str) -> dict[str, Any]:
    """Returns the variables after all cells."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in NOTEBOOKS[name]["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), names)
    return names


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_stored_without_outputs(name: str) -> None:
    assert NOTEBOOKS[name]["nbformat"] == 4
    for cell in NOTEBOOKS[name]["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_one_repository_is_named_everywhere() -> None:
    texts = [json.dumps(notebook) for notebook in NOTEBOOKS.values()]
    texts += [(ROOT / file).read_text(encoding="utf-8") for file in ("setup.py", "README.md")]
    named = [re.findall(r"github(?:\.com)?/([\w-]+/gemma_jax)", text) for text in texts]
    assert [*map(len, named[:2])] == [2, 2] and all(named) and len(set(sum(named, []))) == 1


@pytest.mark.slow
def test_sampling(checkpoint: Path, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = run_cells("sample")
    assert names["gemma"].compute.param_dtype == "bfloat16"
    printed = capsys.readouterr().out
    assert all(prompt in printed for prompt in names["prompts"])
    assert [message["role"] for message in names["chat"].history] == ["user", "model"] * 2
    assert len(shown) == 3 and all("<span title=" in page for page in shown)


@pytest.mark.slow
def test_finetuning(
    checkpoint: Path,
    shown: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quotes = tmp_path / "quotes.jsonl"
    quotes.write_text("".join(json.dumps({"quote": f"{n} and {n + 1}"}) + "\n" for n in range(200)))
    steps = ["--steps", "16", "--evaluation.every", "8", "--optimizer.learning_rate", "0.02"]
    row = ["--data.sequence_length", "64", "--data.held_out", "0.2", "--data.cache_dir", f"{tmp_path}/cache"]
    monkeypatch.setenv("GEMMA_JAX_QUOTES", str(quotes))
    monkeypatch.setenv("GEMMA_JAX_SETTINGS", " ".join([*steps, *row]))
    names = run_cells("finetune")

    of_file, _ = load("finetune_quotes_colab", FinetuneConfig)
    here = {"init_from": str(checkpoint), "data.sources": (str(quotes),)}
    assert names["config"] == replace(of_file, here)
    losses = [entry["held_out_loss"] for entry in read_metrics("runs/quotes") if "held_out_loss" in entry]
    assert losses[-1] < losses[0] < 6  # log(387) = 5.96 at random
    texts = [[made.text for made in names[kind]] for kind in ("before", "without", "after")]
    assert texts[0] == texts[1] != texts[2]
    assert shown == ["runs/quotes/loss.png"] and Path(shown[0]).is_file()
    assert "⟦0 and 1<eos>⟧" in capsys.readouterr().out

    again = Gemma.from_pretrained(checkpoint, dtype="bfloat16", adapters={"peft": "quotes-peft"})
    ids = [[2, 5, 9, 300, 17]]
    expected = names["gemma"].logits(ids, adapter="quotes")
    assert_same(again.logits(ids, adapter="peft"), expected, 1e-6)
