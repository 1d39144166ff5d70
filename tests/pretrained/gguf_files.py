"""GGUF files as llama.cpp's own package writes them."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from gemma_jax.pretrained.gguf import GGUFWeights
from gemma_jax.pretrained.layout import in_order

KEYS: dict[str, Any] = {
    "block_count": 1,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "context_length": 64,
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
SHAPES = {f"blk.0.{name}.weight": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
SHAPES |= {f"blk.0.{name}.weight": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
SHAPES |= {"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "output_norm.weight": (32,)}
SHAPES |= {"token_embd.weight": (8, 32)}


def write(
    path: Path,
    keys: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    kind: str = "F32",
    architecture: str = "gemma",
    alignment: int = 0,
) -> Path:
    """A file of one small layer; a key of None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (
        {f"{architecture}.{key}": value for key, value in KEYS.items()} | (keys or {})
    ).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(key, value)
    rng = np.random.default_rng(0)
    for name, shape in (SHAPES | (shapes or {})).items():
        x = rng.normal(size=shape).astype(np.float32)
        type_ = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kind]
        data = x if type_.name in ("F32", "I8") else quantize(x, type_)
        writer.add_tensor(name, data.astype(np.int8) if type_.name == "I8" else data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path: Path) -> None:
    """All that can be read of a file."""
    weights = GGUFWeights(path)
    for place in in_order(weights.config):
        weights.get(*place)
    weights.end_tokens()
    assert math.isfinite(weights.config.norm_epsilon) and math.isfinite(weights.config.rope_base)
    weights.tokenizer()
