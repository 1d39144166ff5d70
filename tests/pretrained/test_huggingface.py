"""Hugging Face directories: every value is loaded to the right place, and faulty directories are rejected."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.config import ComputeConfig, MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.sharding import named_arrays
from gemma_jax.testing import cpu_mesh
from tests.messages import naming
from tests.pretrained.published import (
    MULTI_HEAD,
    MULTI_QUERY,
    Tensors,
    random_tensors,
    safetensors_bytes,
    write_huggingface,
)

ONE = MeshConfig(cpu_devices=1)


def load(folder: Path, devices: int = 1, tensor: int = 1, dtype: Any = "float32") -> dict[str, jax.Array]:
    mesh = cpu_mesh(devices, tensor=tensor)
    found = open_checkpoint(folder)
    return named_arrays(found.params(ModelSpec(found.config, ComputeConfig(param_dtype=dtype), mesh)))


@pytest.mark.parametrize(("config", "shards", "dtype"), [
    (MULTI_QUERY, 1, "float32"), (MULTI_HEAD, 3, "bfloat16"), (MULTI_QUERY, 3, "float16"),
])  # fmt: skip
def test_every_number_is_in_its_place(
    tmp_path: Path, config: dict[str, Any], shards: int, dtype: str
) -> None:
    tensors = random_tensors(config, dtype)
    loaded = load(write_huggingface(tmp_path, config, tensors, shards))
    H, heads = config["head_dim"], {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    same = np.testing.assert_array_equal
    embedding = np.asarray(loaded["embedding"])
    assert embedding.shape == (512, config["hidden_size"])  # rounded up to vocab_multiple
    same(embedding[:500], tensors["model.embed_tokens.weight"].astype(np.float32))
    assert not embedding[500:].any()
    same(loaded["final_norm"], tensors["model.norm.weight"])
    for i in range(config["num_hidden_layers"]):
        layer = {name: np.asarray(x[i]) for name, x in loaded.items() if name.startswith("blocks.")}

        def theirs(name: str, i: int = i) -> np.ndarray:
            return tensors[f"model.layers.{i}.{name}.weight"]

        for ours, name in [("q", "q"), ("k", "k"), ("v", "v")]:
            for head in range(heads["q" if ours == "q" else "k"]):
                rows = theirs(f"self_attn.{name}_proj")[head * H : (head + 1) * H]
                same(layer[f"blocks.attention.{ours}"][:, head], rows.T)
        for head in range(heads["q"]):
            columns = theirs("self_attn.o_proj")[:, head * H : (head + 1) * H]
            same(layer["blocks.attention.o"][head], columns.T)
        for name in ("gate", "up", "down"):
            same(layer[f"blocks.feed_forward.{name}"], theirs(f"mlp.{name}_proj").T)
        same(layer["blocks.attention_norm"], theirs("input_layernorm"))
        same(layer["blocks.feed_forward_norm"], theirs("post_attention_layernorm"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_devices_hold_what_one_holds_each_only_its_shard(tmp_path: Path, dtype: str) -> None:
    config = MULTI_HEAD | {"hidden_size": 32}
    write_huggingface(tmp_path, config, random_tensors(config, "bfloat16"), 2)
    on_one, on_eight = load(tmp_path, dtype=dtype), load(tmp_path, 8, tensor=2, dtype=dtype)
    for name, x in on_eight.items():
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, on_one[name], err_msg=name)
        assert x.addressable_shards[0].data.size * (4 if "norm" in name else 8) == x.size, name


def test_a_model_without_a_tokenizer_takes_token_ids_and_says_what_is_missing(tmp_path: Path) -> None:
    write_huggingface(tmp_path, MULTI_QUERY, random_tensors(MULTI_QUERY))
    gemma = Gemma.from_pretrained(tmp_path, mesh=ONE)
    assert gemma.logits([[2, 5, 6]]).shape == (1, 3, 500)
    assert len(gemma.generate([[2, 5, 6]], max_new_tokens=2)[0].token_ids) <= 2
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        gemma.generate(["text"])


GATE = "model.layers.1.mlp.gate_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(("tensor", "file"), [
    (GATE, "../outside.safetensors"), (GATE, "/etc/passwd.safetensors"), (GATE, "config.json"), (GATE, 7),
    (GATE, "model-00009.safetensors"), (GATE, SHARD), ("model.x", SHARD), (GATE, None),
])  # fmt: skip
def test_an_index_cannot_lead_astray(tmp_path: Path, tensor: str, file: Any) -> None:
    """The index names a path outside the folder, another kind of file, or a file without the tensor."""
    tensors = random_tensors(MULTI_QUERY)
    folder = write_huggingface(tmp_path / "model", MULTI_QUERY, tensors, 3)
    (tmp_path / "outside.safetensors").write_bytes(safetensors_bytes({GATE: tensors[GATE]}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    place = index["weight_map"].pop(tensor, SHARD)
    if file is not None:
        index["weight_map"][tensor] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=re.escape(place if file is None else str(file))):
        open_checkpoint(folder)


def test_a_missing_or_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path, MULTI_QUERY, random_tensors(MULTI_QUERY), 3)
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:-1])
    with pytest.raises(UserError, match=naming(SHARD, "whole")):
        open_checkpoint(folder)
    (folder / SHARD).unlink()
    with pytest.raises(UserError, match=naming("model.safetensors.index.json", f"'{SHARD}'")):
        open_checkpoint(folder)


EMBEDDING = "model.embed_tokens.weight"
BIAS, THIRD_NORM = "model.layers.1.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"
FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "missing": (lambda t: {name: x for name, x in t.items() if name != GATE}, (GATE, "(64, 32)")),
    "extra": (lambda t: t | {BIAS: np.zeros(64, np.float32)}, (f"{BIAS}'", "(64,)")),
    "a layer too many": (lambda t: t | {THIRD_NORM: np.zeros(32, np.float32)}, (THIRD_NORM,)),
    "mis-shaped": (
        lambda t: t | {GATE: t[GATE].T.copy()},
        (f"{GATE}'", "(32, 64)", "(64, 32)"),
    ),
    "wrong kind": (
        lambda t: t | {GATE: t[GATE].astype(np.int32)},
        (f"'{GATE}'", "I32", "F32"),
    ),
    "untied": (
        lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1},
        ("lm_head.weight", "(500, 32)", EMBEDDING, "(500, 32)"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_are_not_those_of_the_config_are_named(tmp_path: Path, fault: str) -> None:
    change, told = FAULTS[fault]
    write_huggingface(tmp_path, MULTI_QUERY, change(random_tensors(MULTI_QUERY)))
    with pytest.raises(UserError, match=naming(*told)):
        open_checkpoint(tmp_path)


def test_a_tied_head_and_old_buffers_may_be_there(tmp_path: Path) -> None:
    tensors = random_tensors(MULTI_QUERY)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_huggingface(tmp_path, MULTI_QUERY, tensors)
    assert open_checkpoint(tmp_path).weights is not None


def test_a_config_of_another_size_contradicts_the_tensors(tmp_path: Path) -> None:
    write_huggingface(tmp_path, MULTI_QUERY | {"num_hidden_layers": 10**8}, random_tensors(MULTI_QUERY))
    with pytest.raises(UserError, match=naming(THIRD_NORM, "(32,)")):
        open_checkpoint(tmp_path)
    write_huggingface(tmp_path, MULTI_QUERY | {"hidden_size": 48}, random_tensors(MULTI_QUERY))
    with pytest.raises(UserError, match=naming(f"{EMBEDDING}'", "(500, 32)", "(500, 48)")):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("value", "devices"), [(np.nan, 1), (-np.inf, 8)])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, devices: int) -> None:
    tensors = random_tensors(MULTI_QUERY, "bfloat16")
    tensors[GATE][5, 7] = value
    write_huggingface(tmp_path, MULTI_QUERY, tensors)
    with pytest.raises(UserError, match=naming(GATE, "NaN")):
        load(tmp_path, devices)


def test_another_kind_of_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=naming(tmp_path, "checkpoint")):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=naming("model_type", "'llama'")):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MULTI_QUERY))
    with pytest.raises(UserError, match=naming("model.safetensors", ".bin")):
        open_checkpoint(tmp_path)
