"""transformers reads our exports without a warning, and computes the same. For `make parity`."""

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import ComputeConfig, MeshConfig
from gemma_jax.pretrained import huggingface as huggingface_module
from gemma_jax.testing import relative_difference, tiny_gemma
from gemma_jax.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    not os.environ.get("GEMMA_JAX_PARITY"), reason="`make parity` installs transformers"
)
ROWS = np.random.default_rng(0).integers(4, 500, (2, 12))


@pytest.fixture(autouse=True)
def complaints() -> Iterator[list[str]]:
    """Collects the warnings that transformers logs while a test runs; there must be none."""
    from transformers.utils import logging as theirs

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    theirs.add_handler(listener)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield said
    theirs.remove_handler(listener)
    assert said == []


def theirs(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [{"num_kv_heads": 1}, {"num_kv_heads": 4, "embed_dim": 24}])
@pytest.mark.parametrize("shard_bytes", [30_000, 5_000_000_000])
def test_a_model_made_here_computes_the_same_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, heads: dict[str, int], shard_bytes: int
) -> None:
    import torch

    monkeypatch.setattr(huggingface_module, "SHARD_BYTES", shard_bytes)
    made = tiny_gemma(vocab_size=500, vocab_multiple=128, **heads)
    made.save_pretrained(tmp_path / "out", dtype=dtype)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    assert theirs(tmp_path / "out", dtype).dtype == getattr(torch, dtype)
    model = theirs(tmp_path / "out", "float32")
    ours = Gemma.from_pretrained(tmp_path / "out", mesh=MeshConfig(cpu_devices=1), compute=ComputeConfig())
    with torch.no_grad():
        logits = model(torch.from_numpy(ROWS)).logits.numpy()
    assert logits.shape == (2, 12, 500)
    assert relative_difference(ours.logits(ROWS), logits) < 1e-5


def test_the_safetensors_package_reads_the_files(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    made = tiny_gemma()
    made.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ours = huggingface_module.SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == ours.tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, ours[name])


def test_there_and_back_through_every_form(tmp_path: Path) -> None:
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    model = GemmaForCausalLM(GemmaConfig(**sizes, **heads, max_position_embeddings=256)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    for source, destination, form in [("a", "b", "flax"), ("b", "c", "run"), ("c", "d", "huggingface")]:
        assert main(["convert", str(tmp_path / source), str(tmp_path / destination), "--format", form]) == 0
    again = theirs(tmp_path / "d", "bfloat16")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.config.head_dim == 16 and again.config.max_position_embeddings == 256


def test_the_tokenizer_and_the_turns_are_the_same_there(tmp_path: Path, shared_data: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(shared_data / "gemma_tokenizer" / "tokenizer.model")
    made = tiny_gemma(vocab_size=256_000, embed_dim=16, hidden_dim=16, num_layers=1)
    gemma = Gemma(made.spec, made.params, tokenizer, end_tokens=(1, 107))
    gemma.save_pretrained(tmp_path / "it")
    there = AutoTokenizer.from_pretrained(tmp_path / "it")
    for text in (
        "Hello  world",
        "\n\n\tdef f(x):\n        return x",
        "naïve 日本語 🦙",
        "<start_of_turn>user",
    ):
        assert there(text)["input_ids"] == [2, *tokenizer.encode(text)], text
    turns = [("user", " Hi there\n"), ("assistant", "Hello!"), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    told = "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    told += "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    ids = there.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [2, *tokenizer.encode(told)]
    model = theirs(tmp_path / "it", "float32")
    assert model.generation_config.eos_token_id == [1, 107]
