"""notebooks/sample.ipynb runs from top to bottom, with a tiny model and without Jupyter."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma_jax.tokenizer import Tokenizer
from tests.pretrained import published

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "notebooks" / "sample.ipynb").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-it"
    config = published.MULTI_QUERY | {"vocab_size": 387, "max_position_embeddings": 4096}
    published.write_huggingface(folder, config, published.random_tensors(config, "bfloat16"))
    texts = [f"{a} and {b}\n" for a in range(60) for b in range(60)]
    Tokenizer.train(texts, config["vocab_size"], folder / "tokenizer.model")
    return folder


def test_it_is_stored_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_one_repository_is_named_everywhere() -> None:
    named = re.findall(r"github(?:\.com)?/([\w-]+/gemma_jax)", json.dumps(NOTEBOOK))
    for file in ("setup.py", "README.md"):
        named += re.findall(r"github(?:\.com)?/([\w-]+/gemma_jax)", (ROOT / file).read_text(encoding="utf-8"))
    assert len(named) == 4 and len(set(named)) == 1


@pytest.mark.slow
def test_every_cell_runs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.HTML = str  # a stand-in
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("GEMMA_JAX_CHECKPOINT", str(checkpoint))
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
    assert names["gemma"].compute.param_dtype == "bfloat16"
    printed = capsys.readouterr().out
    assert all(prompt in printed for prompt in names["prompts"])
    assert [message["role"] for message in names["chat"].history] == ["user", "model"] * 2
    assert len(shown) == 3 and all("<span title=" in page for page in shown)
