"""Hugging Face directories made by hand, byte by byte: independent of the code that reads them."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]

# Multi-query, and heads of their own with heads x head_dim other than the width, as the 7B has it.
MULTI_QUERY = {
    "model_type": "gemma",
    "vocab_size": 500,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "gelu_pytorch_tanh",
}
MULTI_HEAD = MULTI_QUERY | {"num_key_value_heads": 4, "hidden_size": 24, "num_hidden_layers": 3}
TYPES = {"float32": ("F32", np.float32), "float16": ("F16", np.float16)}
TYPES["bfloat16"] = ("BF16", ml_dtypes.bfloat16)


def random_tensors(config: dict[str, Any], dtype: str = "float32", seed: int = 0) -> Tensors:
    """What transformers saves for a model of this config."""
    rng = np.random.default_rng(seed)
    D, F, H = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (N * H, D),
            f"{layer}self_attn.k_proj.weight": (K * H, D),
            f"{layer}self_attn.v_proj.weight": (K * H, D),
            f"{layer}self_attn.o_proj.weight": (D, N * H),
            f"{layer}mlp.gate_proj.weight": (F, D),
            f"{layer}mlp.up_proj.weight": (F, D),
            f"{layer}mlp.down_proj.weight": (D, F),
            f"{layer}input_layernorm.weight": (D,),
            f"{layer}post_attention_layernorm.weight": (D,),
        }
    shapes["model.norm.weight"] = (D,)
    return {
        name: (rng.normal(size=shape) / np.sqrt(D)).astype(TYPES[dtype][1]) for name, shape in shapes.items()
    }


def safetensors_bytes(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {np.dtype(dtype): name for name, dtype in TYPES.values()} | {np.dtype(np.int32): "I32"}
    data = b""
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        data += x.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_huggingface(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """A directory as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: x for i, (name, x) in enumerate(tensors.items()) if i % shards == shard}
        (folder / file).write_bytes(safetensors_bytes(part))
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
