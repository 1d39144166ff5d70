"""Real dialogues against transformers, the training template of TRL, and `datasets`. For `make parity`."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fine_tuning import read_examples, write_lines

from gemma_jax.data import source as source_module
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

pytestmark = pytest.mark.skipif(
    not os.environ.get("GEMMA_JAX_PARITY"), reason="`make parity` installs transformers and trl"
)


@pytest.fixture(scope="module")
def theirs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real tokenizer in transformers."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("theirs")
    shutil.copy(shared_data / "gemma_tokenizer" / "tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("corpus", ["oasst_en100/en_100_messages_best_path", "chat_fastchat_dummy/messages"])
def test_tokens_and_trained_tokens_of_real_dialogues(shared_data: Path, theirs: Any, corpus: str) -> None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    templates = Path(spec.submodule_search_locations[0]) / "chat_templates"
    plain, training = ((templates / f"{name}.jinja").read_text() for name in ("gemma", "gemma_training"))
    tokenizer = Tokenizer.load(shared_data / "gemma_tokenizer" / "tokenizer.model")
    path = shared_data / f"{corpus}.jsonl"
    examples = read_examples(str(path), tokenizer, sequence_length=100_000)
    dialogues = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    for dialogue, example in zip(dialogues, examples, strict=True):
        ids = theirs.apply_chat_template(dialogue, chat_template=plain, return_dict=False)
        assert [tokenizer.bos_id, *example.ids.tolist()] == ids
        encoded = theirs.apply_chat_template(
            dialogue, chat_template=training, return_dict=True, return_assistant_tokens_mask=True
        )
        assert encoded["input_ids"] == ids
        assert [0, *(example.weights > 0).astype(int).tolist()] == encoded["assistant_masks"]


def test_the_datasets_package_reads_the_same_examples(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(source_module, "SHARD_BYTES", 2000)
    folder = tmp_path / "some"
    folder.mkdir()
    records = [{"prompt": f"naïve {n}", "completion": "x" * (n + 1)} for n in range(200)]
    lines = write_lines(folder, records)
    for spec in (f"hf:{folder}", f"hf:{folder}:train", f"hf:{folder}:default:train"):
        found, expected = (read_examples(each, tokenizer) for each in (spec, lines))
        assert [example.ids.tolist() for example in found] == [example.ids.tolist() for example in expected]
    write_lines(folder, [*records, {"prompt": "p", "completion": ""}])
    with pytest.raises(UserError, match=naming(f"hf:{folder}", "row 200", "turn 2")):
        read_examples(f"hf:{folder}", tokenizer)
    with pytest.raises(UserError, match=naming(f"hf:{folder}:nowhere", "nowhere", "train")):
        read_examples(f"hf:{folder}:nowhere", tokenizer)
