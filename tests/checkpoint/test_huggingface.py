"""Hugging Face directories: every number in its place, and each way in which one can be wrong."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.checkpoint.pretrained import open_checkpoint
from gemma_jax.config import ComputeConfig, MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.sharding import named_arrays
from gemma_jax.testing import cpu_mesh
from tests.checkpoint.published import MULTI_HEAD, MULTI_QUERY, random_tensors, write_huggingface

ONE = MeshConfig(cpu_devices=1)


def load(folder: Path, devices: int = 1, tensor: int = 1, dtype: Any = "float32") -> dict[str, jax.Array]:
    mesh = cpu_mesh(devices, tensor=tensor)
    return named_arrays(open_checkpoint(folder).params(ComputeConfig(param_dtype=dtype), mesh))


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
