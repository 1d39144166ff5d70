"""Hugging Face directories: every number in its place, and each way in which one can be wrong."""

import json
import re
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
from gemma_jax.pretrained.safetensors import SafetensorsFile
from gemma_jax.sharding import named_arrays
from gemma_jax.testing import cpu_mesh
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [MULTI_QUERY, MULTI_HEAD], ids=["multi-query", "multi-head"])
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
    with pytest.raises(UserError, match=r"no tokenizer\.model beside it"):
        gemma.generate(["text"])


def edit_index(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


GATE = "model.layers.1.mlp.gate_proj.weight"
SHARD = "model-00002-of-00003.safetensors"
INDEX_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "outside": ({GATE: "../outside.safetensors"}, f"names '../outside.safetensors' for '{GATE}', but"),
    "another kind of file": ({GATE: "config.json"}, "names 'config.json'"),
    "not there": ({GATE: "model-00009.safetensors"}, "names 'model-00009.safetensors', which is missing"),
    "wrong shard": ({GATE: SHARD}, f"names '{SHARD}' for '{GATE}', which is not in that file"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "told"), INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_an_index_cannot_lead_astray(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    tensors = random_tensors(MULTI_QUERY)
    folder = write_huggingface(tmp_path / "model", MULTI_QUERY, tensors, 3)
    (tmp_path / "outside.safetensors").write_bytes(safetensors_bytes({GATE: tensors[GATE]}))
    assert GATE not in SafetensorsFile(folder / SHARD).tensors
    edit_index(folder, changes)
    with pytest.raises(UserError, match=re.escape(told)):
        open_checkpoint(folder)


def test_a_missing_or_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path, MULTI_QUERY, random_tensors(MULTI_QUERY), 3)
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:-1])
    with pytest.raises(UserError, match=rf"{SHARD} is not a whole safetensors file"):
        open_checkpoint(folder)
    (folder / SHARD).unlink()
    with pytest.raises(UserError, match=rf"names '{SHARD}', which is missing"):
        open_checkpoint(folder)


def tensor_fault(tensors: Tensors, fault: str) -> Tensors:
    match fault:
        case "missing":
            return {name: x for name, x in tensors.items() if name != GATE}
        case "extra":
            return tensors | {"model.layers.1.self_attn.q_proj.bias": np.zeros(64, np.float32)}
        case "mis-shaped":
            return tensors | {GATE: tensors[GATE].T.copy()}
        case "wrong kind":
            return tensors | {GATE: tensors[GATE].astype(np.int32)}
        case "untied":
            return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    raise AssertionError(fault)


@pytest.mark.parametrize(("fault", "told"), [
    ("missing", f"{GATE} of shape (64, 32), which "),
    ("extra", "holds 'model.layers.1.self_attn.q_proj.bias' of shape (64,), which is no part of"),
    ("mis-shaped", f"{GATE} has shape (32, 64) in "),
    ("wrong kind", "is int32; give weights of float32, bfloat16, float16"),
    ("untied", "lm_head.weight of shape (500, 32) in "),
])  # fmt: skip
def test_tensors_that_are_not_those_of_the_config_are_named(tmp_path: Path, fault: str, told: str) -> None:
    write_huggingface(tmp_path, MULTI_QUERY, tensor_fault(random_tensors(MULTI_QUERY), fault))
    with pytest.raises(UserError, match=re.escape(told)) as error:
        open_checkpoint(tmp_path)
    if fault == "mis-shaped":
        assert "but (64, 32) by" in str(error.value)


def test_a_tied_head_and_old_buffers_may_be_there(tmp_path: Path) -> None:
    tensors = random_tensors(MULTI_QUERY)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_huggingface(tmp_path, MULTI_QUERY, tensors)
    assert open_checkpoint(tmp_path).weights is not None


def test_a_config_of_another_size_contradicts_the_tensors(tmp_path: Path) -> None:
    write_huggingface(tmp_path, MULTI_QUERY | {"num_hidden_layers": 10**8}, random_tensors(MULTI_QUERY))
    with pytest.raises(UserError, match=r"model\.layers\.2\.input_layernorm\.weight of shape \(32,\), which"):
        open_checkpoint(tmp_path)
    write_huggingface(tmp_path, MULTI_QUERY | {"hidden_size": 48}, random_tensors(MULTI_QUERY))
    with pytest.raises(UserError, match=r"embed_tokens\.weight has shape \(500, 32\) in .*, but \(500, 48\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = random_tensors(MULTI_QUERY, "bfloat16")
    tensors[GATE][5, 7] = value
    write_huggingface(tmp_path, MULTI_QUERY, tensors)
    with pytest.raises(UserError, match=re.escape(GATE) + " in .* holds NaN or infinity"):
        load(tmp_path)
    with pytest.raises(UserError, match=re.escape(GATE) + " in .* holds NaN or infinity"):
        load(tmp_path, 8, tensor=2)


def test_another_kind_of_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="model_type 'llama'"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MULTI_QUERY))
    with pytest.raises(UserError, match=r"pickled \.bin files are not read"):
        open_checkpoint(tmp_path)
