"""The config.json and generation_config.json that stand beside published weights, in and out.

They are untrusted, and were written by several versions of transformers, which say the same in different
keys. What contradicts Gemma is refused by its name; what says nothing of the model's function is ignored.
"""

import json
import reprlib
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
# What transformers takes where a key is missing or null; the others have to be there.
_DEFAULTS = {"head_dim": 256, "context_length": 8192}
# Each of these keys may be missing or null. The tanh approximation is meant by every value of hidden_act:
# "gelu" stands in the first files that Google published.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", TANH),
    "hidden_activation": (TANH,),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False,),
    "quantization_config": (),
}
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 100
shown = _shown.repr  # a value of an untrusted file, for a message


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
      UserError: as `read_json` does, or it is not an object.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not {shown(data)}.")
    return data


def read_config(path: Path) -> TransformerConfig:
    """The shape that a config.json describes.

    Raises:
      UserError: no Gemma of the first generation, or a key that contradicts one; it is named.
    """
    data = read_object(path)
    if data.get("model_type") != "gemma":
        raise UserError(
            f"{path} has model_type {shown(data.get('model_type'))}, but only 'gemma' (Gemma 1, 1.1 "
            "and CodeGemma) is supported; give a checkpoint of one of these."
        )
    for key, allowed in _ALLOWED.items():
        value = data.get(key)
        if value is not None and not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            choices = " or ".join(map(json.dumps, allowed)) or "absent"
            raise UserError(
                f"{path} has {key} {shown(value)}, but it is {choices} in a Gemma that is supported."
            )
    fields: dict[str, Any] = {}
    for field, key in _KEYS.items():
        value = data.get(key)
        if value is None and field in _DEFAULTS:
            value = _DEFAULTS[field]
        if type(value) is not int:
            raise UserError(f"{path} has {key} {shown(value)}, but it must be an integer.")
        fields[field] = value
    fields["rope_base"] = _rope_base(data, path)
    epsilon = data.get("rms_norm_eps")
    fields["norm_epsilon"] = _number(1e-6 if epsilon is None else epsilon, "rms_norm_eps", path)
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
    """Of rope_theta, on its own (old files) or in rope_parameters (new ones); 10,000 where it is nowhere.

    The same object was called rope_scaling before, and its rope_type once type.
    """
    bases = {"rope_theta": data["rope_theta"]} if data.get("rope_theta") is not None else {}
    for section in ("rope_parameters", "rope_scaling"):
        rope = data.get(section)
        if rope is None:
            continue
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


def write_config(folder: Path, config: TransformerConfig, dtype: str) -> None:
    """Write config.json for weights of `dtype`, for old and new versions of transformers."""
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
    }
    (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n")


def write_generation_config(folder: Path, end_tokens: tuple[int, ...]) -> None:
    """Write generation_config.json, which says where a generation ends."""
    ends = end_tokens[0] if len(end_tokens) == 1 else list(end_tokens)
    data = {"bos_token_id": 2, "eos_token_id": ends, "pad_token_id": 0}
    (folder / GENERATION_FILE).write_text(json.dumps(data, indent=2) + "\n")
