"""Weights that bitsandbytes has quantised, as transformers saves them in safetensors: NF4 and int8.

For NF4, `X.weight` holds two codes in each byte, the first in the high half, along the rows of torch's
[outputs, inputs] matrix. Beside it are `X.weight.absmax`, the scales of blocks of 64, and
`X.weight.quant_state.bitsandbytes__nf4`, JSON that describes the weight. With nested quantisation the scales
are bytes, and `.nested_absmax`, `.nested_quant_map` and the JSON's nested_offset belong to them. For int8,
`X.SCB` holds the largest magnitude of each row. The embedding is not quantised. Source: bitsandbytes 0.50,
functional.QuantState.

Shape legend: C contracted axes, O output axes, G blocks of an output channel.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.paths import parse_json
from gemma_jax.pretrained.published_config import shown
from gemma_jax.weights.nf4 import NESTED_BLOCK, NF4_BLOCK, NF4_VALUES, dynamic_map, nested_scales
from gemma_jax.weights.nf4 import nf4_arrays as quantize_nf4

NF4_STATE = ".quant_state.bitsandbytes__nf4"
STATE_BYTES = 256  # of the JSON that we write, padded with spaces
# The ends of the names of tensors that only belong to a quantised weight, besides its state.
PARTS = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".SCB", ".weight_format")
CONFIG = {  # in config.json
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}

Tensors = Callable[[str], np.ndarray | None]


def quantization_of(data: Mapping[str, Any], path: Path) -> str:
    """Returns the kind of weights that a config.json describes: nf4, int8, or an empty text for dense ones.

    Raises:
      UserError: They are quantised in a way that is not supported.
    """
    config = data.get("quantization_config")
    if config is None:
        return ""
    if isinstance(config, dict) and config.get("quant_method") == "bitsandbytes":
        if config.get("load_in_8bit") is True:
            return "int8,embedding=dense"
        if config.get("load_in_4bit") is True and config.get("bnb_4bit_quant_type") == "nf4":
            return "nf4,embedding=dense"
    raise UserError(
        f"{path} has quantization_config {shown(config)}; of quantised weights only bitsandbytes' nf4 and "
        "int8 and GGUF files are supported."
    )


def is_part(name: str) -> bool:
    """Whether a tensor only belongs to a quantised weight."""
    return name.endswith(PARTS) or NF4_STATE.removesuffix("nf4") in name


def nf4_arrays(tensors: Tensors, name: str, where: str) -> dict[str, np.ndarray]:
    """Reads a weight in NF4 as the arrays of `weights.nf4.NF4`, for one layer.

    Args:
      tensors: Returns the tensor of a name, or None if there is none.
      name: The name of the weight.
      where: The weight and its file, for messages.

    Raises:
      UserError: The tensors contradict their quant_state or each other, or are of another kind of NF4.
    """
    outputs, inputs, state = nf4_state(tensors, name, where)
    blocks = inputs // NF4_BLOCK
    is_nested = "nested_offset" in state
    parts: dict[str, np.ndarray] = {}
    for suffix, (dtype, shape) in _parts(outputs, inputs, is_nested).items():
        found, size = tensors(name + suffix), math.prod(shape)
        if found is None or found.dtype != dtype or found.size != size:
            about = "missing" if found is None else f"{found.dtype} of {found.size:,}"
            raise _wrong(where, f"{suffix or 'its tensor'} is {about}, not {np.dtype(dtype)} of {size:,}")
        parts[suffix] = found.reshape(-1)
    for suffix, values in ((".quant_map", NF4_VALUES), (".nested_quant_map", dynamic_map())):
        if suffix in parts and not np.allclose(parts[suffix], values, atol=1e-6):
            raise _wrong(where, f"{suffix} has other values than bitsandbytes'")
    suffix = ".nested_absmax" if is_nested else ".absmax"
    scales = parts[suffix]
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise _wrong(where, f"{suffix} has scales that are negative or not finite")
    codes = np.stack([parts[""] >> 4, parts[""] & 15], -1).view(np.int8) - 8
    by_channel = codes.reshape(outputs, blocks, NF4_BLOCK).transpose(2, 1, 0)
    arrays = {"codes": by_channel.astype(ml_dtypes.int4)}
    absmax = parts[".absmax"].reshape(outputs, blocks).T
    if not is_nested:
        return arrays | {key: np.asarray(x) for key, x in jax.jit(nested_scales)(absmax).items()}
    return arrays | {
        "absmax": absmax,
        "nested": scales,
        "offset": np.asarray(state["nested_offset"], np.float32),
        "rows": np.arange(outputs, dtype=np.int32),
        "columns": np.arange(blocks, dtype=np.int32),
    }


def _wrong(where: str, reason: str) -> UserError:
    return UserError(f"{where} is not a whole NF4 weight: {reason}; copy or quantise it again.")


def nf4_state(tensors: Tensors, name: str, where: str) -> tuple[int, int, dict[str, Any]]:
    """Returns the outputs and inputs of a weight in NF4, and its quant_state.

    Raises:
      UserError: The state is missing, or is not of a kind that `nf4_arrays` reads.
    """
    raw = tensors(name + NF4_STATE)
    if raw is None or raw.dtype != np.uint8 or raw.size > 2**16:
        raise _wrong(where, f"{NF4_STATE} is missing, or not a short text")
    state = parse_json(raw.tobytes().decode(errors="replace"), f"{name}{NF4_STATE}")
    if not isinstance(state, dict):
        raise _wrong(where, f"{NF4_STATE} is not a JSON object")
    wanted = {"quant_type": "nf4", "blocksize": NF4_BLOCK}
    if "nested_offset" in state:
        wanted["nested_blocksize"] = NESTED_BLOCK
        offset = state["nested_offset"]
        if type(offset) not in (int, float) or not 0 <= offset < math.inf:
            raise _wrong(where, f"its quant_state has nested_offset {shown(offset)}, which is no scale")
    for key, value in wanted.items():
        if (found := state.get(key)) != value:
            raise _wrong(where, f"its quant_state has {key} {shown(found)}, but {value} is supported")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise _wrong(where, f"its quant_state has shape {shown(shape)}, which is not that of a matrix")
    if shape[1] % NF4_BLOCK:
        raise _wrong(where, f"its rows of {shape[1]} are not a multiple of the block of {NF4_BLOCK}")
    return shape[0], shape[1], state


def int8_arrays(codes: np.ndarray, scales: np.ndarray, where: str) -> dict[str, np.ndarray]:
    """Returns a row-wise int8 weight as the arrays of `weights.quantized.Integer`, for one layer.

    Args:
      codes: [outputs, inputs] int8.
      scales: [outputs], the largest magnitude of each row.
      where: The weight and its file, for messages.

    Raises:
      UserError: The scales are of another shape or dtype, not finite, or zero for codes that are not.
    """
    if codes.dtype != np.int8 or scales.dtype != np.float32 or scales.shape != codes.shape[:1]:
        raise UserError(
            f"{where} is {codes.dtype} of shape {codes.shape} with SCB of {scales.dtype} and shape "
            f"{scales.shape}, not int8 with one float32 for each row; copy or quantise it again."
        )
    if codes[scales == 0].any() or not np.isfinite(scales).all() or (scales < 0).any():
        raise UserError(f"{where} has scales (SCB) that are zero, negative or not finite; copy it again.")
    return {"codes": codes.T[None], "scale": (np.where(scales == 0, 127, scales) / np.float32(127))[None]}


def dense_of(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the [outputs, inputs] float32 matrix that the arrays of one layer stand for."""
    codes, outputs = arrays["codes"], arrays["codes"].shape[2]
    if "scale" in arrays:
        matrix = codes.astype(np.float32) * arrays["scale"]
    else:
        block = arrays["rows"] * codes.shape[1] + arrays["columns"][:, None]
        scales = dynamic_map()[arrays["absmax"]] * arrays["nested"][block // NESTED_BLOCK] + arrays["offset"]
        matrix = np.asarray(NF4_VALUES, np.float32)[codes.astype(np.int8) + 8] * scales
    return matrix.swapaxes(0, 1).reshape(-1, outputs).T


def nf4_shapes(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that `nf4_tensors` returns.

    Raises:
      UserError: The inputs are not a multiple of the block.
    """
    if inputs % NF4_BLOCK:
        raise UserError(
            f"{name} has rows of {inputs}, which are not a multiple of the block of {NF4_BLOCK} of nf4; "
            "write it without quantization."
        )
    shapes = {name + suffix: shape for suffix, (_, shape) in _parts(outputs, inputs).items()}
    return shapes | {name + NF4_STATE: (STATE_BYTES,)}


def _parts(outputs: int, inputs: int, nested: bool = True) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Returns the dtype and shape of each tensor of a weight but its state, by the end of its name."""
    blocks = outputs * inputs // NF4_BLOCK
    parts: dict[str, tuple[Any, tuple[int, ...]]] = {
        "": (np.uint8, (outputs * inputs // 2, 1)),
        ".absmax": (np.uint8 if nested else np.float32, (blocks,)),
        ".quant_map": (np.float32, (16,)),
    }
    if nested:
        parts[".nested_absmax"] = (np.float32, (-(-blocks // NESTED_BLOCK),))
        parts[".nested_quant_map"] = (np.float32, (256,))
    return parts


def nf4_tensors(matrix: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Quantises a matrix [outputs, inputs]; returns the tensors that hold it, by name."""
    outputs, inputs = matrix.shape
    blocks = np.asarray(matrix, np.float32).T.reshape(-1, NF4_BLOCK, outputs)
    arrays = {key: np.asarray(x) for key, x in jax.jit(quantize_nf4)(blocks).items()}
    pairs = (arrays["codes"].astype(np.int8) + 8).astype(np.uint8).transpose(2, 1, 0).reshape(-1, 2)
    state = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": "bfloat16",
        "shape": [outputs, inputs],
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": float(arrays["offset"]),
    }
    tensors = {
        "": (pairs[:, :1] << 4) | pairs[:, 1:],
        ".absmax": arrays["absmax"].T.reshape(-1),
        ".quant_map": np.asarray(NF4_VALUES, np.float32),
        ".nested_absmax": arrays["nested"],
        ".nested_quant_map": dynamic_map(),
        NF4_STATE: np.frombuffer(json.dumps(state).ljust(STATE_BYTES).encode(), np.uint8),
    }
    return {name + suffix: tensor for suffix, tensor in tensors.items()}
