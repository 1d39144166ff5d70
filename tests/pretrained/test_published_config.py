"""config.json in all its variants, and values in it that are rejected."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_jax.config import PRESETS, replace
from gemma_jax.errors import UserError
from gemma_jax.pretrained.published_config import read_config, write_config
from tests.messages import naming

# As google/gemma-2b has it since February 2024, read from descriptions of it.
GEMMA_2B = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}


def read(tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Any:
    data = {key: value for key, value in (GEMMA_2B | changes).items() if key not in without}
    (tmp_path / "config.json").write_text(json.dumps(data))
    return read_config(tmp_path / "config.json")


@pytest.mark.parametrize(("changes", "without"), [
    ({}, ()),  # as published
    ({"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}, ()),
    ({"hidden_act": "gelu_pytorch_tanh"}, ("hidden_activation",)),
    ({}, ("hidden_act", "hidden_activation", "max_position_embeddings", "rms_norm_eps")),
    (dict.fromkeys(("hidden_act", "tie_word_embeddings", "attention_bias", "head_dim", "rms_norm_eps")), ()),
    ({}, ("rope_theta", "rope_scaling")),
    ({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, ("rope_theta", "rope_scaling")),
    ({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, ()),
    ({"rope_scaling": {"type": "default", "factor": None}}, ()),
    ({"use_bidirectional_attention": None}, ()),
    ({"use_bidirectional_attention": False}, ()),
])  # fmt: skip
def test_every_dialect_means_the_same(
    tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...]
) -> None:
    assert read(tmp_path, changes, without) == PRESETS["gemma_2b"]


def test_other_bases_are_read_from_either_place(tmp_path: Path) -> None:
    assert read(tmp_path, {"rope_theta": 5e5}).rope_base == 5e5
    assert read(tmp_path, {"rope_parameters": {"rope_theta": 5e5}}, ("rope_theta",)).rope_base == 5e5


@pytest.mark.parametrize(("key", "value"), [
    ("model_type", "gemma2"), ("model_type", None), ("model_type", ["gemma"]),
    ("hidden_activation", "gelu"),  # the exact one, not its tanh approximation
    ("hidden_act", "relu"), ("tie_word_embeddings", False), ("attention_bias", True),
    ("use_bidirectional_attention", True),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_parameters", {"rope_type": "default", "factor": 2.0}),
    ("rope_parameters", {"rope_theta": 5e5}),  # beside another rope_theta
    ("rope_parameters", [1]), ("rope_theta", "10000"), ("rms_norm_eps", float("inf")),
    ("hidden_size", 2048.0), ("num_hidden_layers", True), ("hidden_size", None),
])  # fmt: skip
def test_what_is_no_gemma_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"config\.json.* {key}"):
        read(tmp_path, {key: value})


def test_a_shape_that_no_gemma_has_is_refused(tmp_path: Path) -> None:
    for key, value, field in [
        ("num_hidden_layers", 0, "model.num_layers"),
        ("vocab_size", 2**40, "model.vocab_size"),
        ("num_key_value_heads", 3, "model.num_kv_heads"),
    ]:
        with pytest.raises(UserError, match=naming("config.json", field, value)):
            read(tmp_path, {key: value})


def test_what_is_no_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff{}", b"[" * 100_000, b"[]", b" " * (2**20 + 1)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json"):
            read_config(path)
    path.unlink()
    with pytest.raises(UserError, match=naming(path)):
        read_config(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for name in ("gemma_2b", "gemma_7b", "gemma_tiny"):
        config = replace(PRESETS[name], {"vocab_multiple": 128, "rope_base": 12_345.0, "norm_epsilon": 1e-5})
        write_config(tmp_path, config, "bfloat16")
        assert read_config(tmp_path / "config.json") == config
