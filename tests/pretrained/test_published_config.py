"""config.json in all its dialects, and what it must not say."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_jax.config import PRESETS, replace
from gemma_jax.errors import UserError
from gemma_jax.pretrained.published_config import read_config, write_config

# As google/gemma-2b has it since February 2024, read from descriptions of it.
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


def read(tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Any:
    data = {key: value for key, value in (GEMMA_2B | changes).items() if key not in without}
    (tmp_path / "config.json").write_text(json.dumps(data))
    return read_config(tmp_path / "config.json")


SAME: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "as published": ({}, ()),
    "the tanh approximation by its name": ({"hidden_activation": "gelu_pytorch_tanh"}, ()),
    "in hidden_act": ({"hidden_act": "gelu_pytorch_tanh"}, ("hidden_activation",)),
    "no activation at all": ({}, ("hidden_act", "hidden_activation")),
    "nulls": (
        {"hidden_act": None, "tie_word_embeddings": None, "attention_bias": None, "head_dim": None},
        (),
    ),
    "rope_parameters": (
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        ("rope_theta", "rope_scaling"),
    ),
    "both the same": ({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, ()),
    "epsilon null": ({"rms_norm_eps": None}, ()),
    "one direction": ({"use_bidirectional_attention": None}, ()),
}


@pytest.mark.parametrize(("changes", "without"), SAME.values(), ids=SAME)
def test_every_dialect_means_the_same(
    tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...]
) -> None:
    assert read(tmp_path, changes, without) == PRESETS["gemma_2b"]


def test_other_bases_are_read_from_either_place(tmp_path: Path) -> None:
    assert read(tmp_path, {"rope_theta": 5e5}).rope_base == 5e5
    assert read(tmp_path, {"rope_parameters": {"rope_theta": 5e5}}, ("rope_theta",)).rope_base == 5e5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "gemma2"}, "model_type 'gemma2', but only 'gemma'"),
    "erf": ({"hidden_activation": "gelu"}, "hidden_activation 'gelu', but it is \"gelu_pytorch_tanh\""),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings False, but it is true"),
    "bias": ({"attention_bias": True}, "attention_bias True, but it is false"),
    "two directions": ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config .* but it is absent"),
    "scaled by a factor": (
        {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
        "rope_parameters.factor 2.0",
    ),
    "two bases": (
        {"rope_parameters": {"rope_theta": 5e5}},
        "rope_theta 10000 and rope_parameters.rope_theta 500000",
    ),
    "infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps inf, but it must be a number"),
    "size of another kind": ({"hidden_size": 2048.0}, "hidden_size 2048.0, but it must be an integer"),
    "no layers": ({"num_hidden_layers": 0}, "describes no Gemma: model.num_layers is 0"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "which does not divide"),
}


@pytest.mark.parametrize(("changes", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_gemma_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        read(tmp_path, changes)
    assert "config.json" in str(error.value)


def test_what_is_no_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, told in [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * (2**20 + 1), "is larger than"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=told):
            read_config(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_config(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for name in ("gemma_2b", "gemma_7b", "gemma_tiny"):
        config = replace(PRESETS[name], {"vocab_multiple": 128, "rope_base": 12_345.0, "norm_epsilon": 1e-5})
        write_config(tmp_path, config, "bfloat16")
        assert read_config(tmp_path / "config.json") == config
