"""Reads and writes the config.json and generation_config.json beside published weights.

These files are untrusted, and come from several versions of transformers, which use different keys for the
same setting. A key that contradicts Gemma is refused by name; keys that do not affect what the model computes
are ignored.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_jax.config import TransformerConfig, validate_model
from gemma_jax.errors import UserError
from gemma_jax.paths import read_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TANH = "gelu_pytorch_tanh"

_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context_length": "max_position_embeddings",
}
# The values that transformers uses if a key is missing or null; all other keys are required.
_DEFAULTS = {"head_dim": 256, "context_length": 8192}
# Allowed values; each of these keys may also be missing or null. Every value of hidden_act means the tanh
# approximation: the first files that Google published have "gelu".
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", TANH),
    "hidden_activation": (TANH,),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False,),
}


class _Shown(reprlib.Repr):
    def repr_memoryview(self, array: memoryview, level: int) -> str:  # an array in a GGUF file
        return self.repr_list(array[: self.maxlist + 1].tolist(), level)


_shown = _Shown()
_shown.maxstring = _shown.maxother = 100
shown = _shown.repr  # shortens a value from an untrusted file, for a message


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a small JSON file.

    Raises:
      UserError: The content is not an object, or `read_json` raises it.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not {shown(data)}.")
    return data


def read_config(path: Path) -> TransformerConfig:
    """Read the model config from a config.json.

    Raises:
      UserError: It is not a Gemma of the first generation, or a key contradicts one; the message names it.
    """
    data = {key: value for key, value in read_object(path).items() if value is not None}
    if data.get("model_type") != "gemma":
        raise UserError(
            f"{path} has model_type {shown(data.get('model_type'))}, but only 'gemma' (Gemma 1, 1.1 "
            "and CodeGemma) is supported; give a checkpoint of one of these."
        )
    for key, allowed in _ALLOWED.items():
        value = data.get(key, allowed[0])
        if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            choices = " or ".join(map(json.dumps, allowed))
            raise UserError(
                f"{path} has {key} {shown(value)}, but it is {choices} in a Gemma that is supported."
            )
    fields: dict[str, Any] = {}
    for field, key in _KEYS.items():
        value = data.get(key, _DEFAULTS.get(field))
        if type(value) is not int:
            raise UserError(f"{path} has {key} {shown(value)}, but it must be an integer.")
        fields[field] = value
    epsilon = _number(data.get("rms_norm_eps", 1e-6), "rms_norm_eps", path)
    return described_model(path, rope_base=_rope_base(data, path), norm_epsilon=epsilon, **fields)


def described_model(path: Path, **fields: Any) -> TransformerConfig:
    """Returns the model config with these fields, which a file describes.

    Raises:
      UserError: A field has no valid value.
    """
    config = TransformerConfig(**fields)
    try:
        validate_model(config)
    except UserError as error:
        raise UserError(f"{path} describes no Gemma: {error}") from error
    return config


def _number(value: Any, key: str, path: Path) -> float:
    if type(value) not in (int, float) or not -1e300 < value < 1e300:
        raise UserError(f"{path} has {key} {shown(value)}, but it must be a number.")
    return float(value)


def _rope_base(data: dict[str, Any], path: Path) -> float:
    """Find rope_theta: at the top level in old files, in rope_parameters in new ones; 10,000 if absent.

    rope_parameters used to be called rope_scaling, and its rope_type used to be called type.
    """
    bases = {"rope_theta": data["rope_theta"]} if "rope_theta" in data else {}
    for section in ("rope_parameters", "rope_scaling"):
        rope = data.get(section, {})
        if not isinstance(rope, dict):
            raise UserError(f"{path} has {section} {shown(rope)}, but it must be an object.")
        for key, value in rope.items():
            if key == "rope_theta" and value is not None:
                bases[f"{section}.rope_theta"] = value
            elif value is not None and (key not in ("rope_type", "type") or value != "default"):
                raise UserError(
                    f"{path} has {section}.{shown(key)[1:-1]} {shown(value)}, which is not "
                    "supported: Gemma's positions are not scaled."
                )
    numbers = {key: _number(value, key, path) for key, value in bases.items()}
    if len(set(numbers.values())) > 1:
        told = " and ".join(f"{key} {value:g}" for key, value in numbers.items())
        raise UserError(f"{path} has {told}, which contradict each other; remove the wrong one.")
    return next(iter(numbers.values()), 10_000.0)


def write_config(
    folder: Path, config: TransformerConfig, dtype: str, quantization: Mapping[str, Any] | None = None
) -> None:
    """Write a config.json for weights of `dtype` that old and new versions of transformers can read.

    `quantization` describes weights that another library has quantised.
    """
    data = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **{key: getattr(config, field) for field, key in _KEYS.items()},
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "hidden_act": TANH,
        "hidden_activation": TANH,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": dtype,
        **({"quantization_config": quantization} if quantization else {}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n")


def write_generation_config(folder: Path, end_tokens: tuple[int, ...]) -> None:
    """Write generation_config.json, which lists the tokens that end a generation."""
    ends = end_tokens[0] if len(end_tokens) == 1 else list(end_tokens)
    data = {"bos_token_id": 2, "eos_token_id": ends, "pad_token_id": 0}
    (folder / GENERATION_FILE).write_text(json.dumps(data, indent=2) + "\n")
