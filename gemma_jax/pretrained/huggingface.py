"""Hugging Face directories: config.json and safetensors, in one file or in shards with an index."""

import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gemma_jax.config import TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.pretrained.bitsandbytes import (
    dense_of,
    int8_arrays,
    is_part,
    nf4_arrays,
    nf4_shapes,
    nf4_state,
    nf4_tensors,
    quantization_of,
)
from gemma_jax.pretrained.layout import DTYPES, Weights, check_tensors, in_order, parameter_shapes, widest
from gemma_jax.pretrained.published_config import CONFIG_FILE, read_config, read_object
from gemma_jax.pretrained.safetensors import SafetensorsFile, write_safetensors
from gemma_jax.weights import EMBEDDING, FINAL_NORM, Kind, kind_of, parameter_table

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # at most so many bytes in one file, unless a single tensor is larger
_TIED = "lm_head.weight"
_PREFIX = "model."
_IGNORED = ".rotary_emb.inv_freq"  # a buffer that old versions of transformers saved
_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def tensor_name(parameter: str, layer: int | None) -> str:
    """Returns the name in the files of one of our arrays."""
    if layer is None:
        return {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight"}[parameter]
    return f"model.layers.{layer}.{_BLOCK_NAMES[parameter.removeprefix('blocks.')]}.weight"


# The number of leading axes that a matmul contracts. torch stores these last: its matrices are [outputs,
# inputs], with a single axis each. 0 marks an array that is stored unchanged. All model sizes have the same.
_INPUTS = {name: parameter.inputs for name, parameter in parameter_table(TransformerConfig()).items()}


def stored_shape(parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in the files of one of our arrays."""
    inputs = _INPUTS[parameter]
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape


def from_stored(parameter: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a view, in our `shape` and axis order, of a tensor from the files."""
    inputs = _INPUTS[parameter]
    outputs = len(shape) - inputs
    split = tensor.reshape(shape[inputs:] + shape[:inputs])
    return split.transpose(*range(outputs, len(shape)), *range(outputs))


def to_stored(parameter: str, array: np.ndarray) -> np.ndarray:
    """Converts one of our arrays to the shape in the files: the inverse of `from_stored`."""
    inputs = _INPUTS[parameter]
    turned = array.transpose(*range(inputs, array.ndim), *range(inputs))
    return turned.reshape(stored_shape(parameter, array.shape))


class HuggingFaceDirectory:
    """The weights in a Hugging Face directory. Only headers are read until an array is requested."""

    def __init__(self, folder: Path) -> None:
        """Check that the files exist, are complete, and hold the model that config.json describes.

        Raises:
          UserError: A check fails; the message names the file or the tensor.
        """
        self.folder = folder
        self.config: TransformerConfig = read_config(folder / CONFIG_FILE)
        files = self._open()
        # A model that transformers saves without its head has the same names without this prefix.
        self._prefix = _PREFIX if any(name.startswith(_PREFIX) for name in files) else ""
        self._files = {f"{_PREFIX[len(self._prefix) :]}{name}": file for name, file in files.items()}
        self._shapes = parameter_shapes(self.config)
        self.quantization = quantization_of(read_object(folder / CONFIG_FILE), folder / CONFIG_FILE)
        self._check_tensors()
        dtypes = {str(file.tensors[self._in_file(name)].dtype) for name, file in self._files.items()}
        self.dtype = widest(dtypes.intersection(DTYPES))

    def _open(self) -> dict[str, SafetensorsFile]:
        """Open the files, and return the file of each tensor by name."""
        if os.path.lexists(self.folder / WEIGHTS_FILE):
            file = SafetensorsFile(self.folder / WEIGHTS_FILE)
            return dict.fromkeys(file.tensors, file)
        if not os.path.lexists(self.folder / INDEX_FILE):
            raise UserError(
                f"{self.folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; "
                "give a directory with the weights as safetensors (pickled .bin files are not read)."
            )
        index = self.folder / INDEX_FILE
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index} has no weight_map that names a file for each tensor; copy it again.")
        for name in names.values():
            # Only a plain file name is allowed: a path could point anywhere on this machine.
            if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\\0"):
                raise UserError(
                    f"{index} names {str(name)[:100]!r}, but a shard is a .safetensors file beside it."
                )
            if not os.path.exists(self.folder / name):  # false, without an exception, if the name is too long
                raise UserError(f"{index} names {name[:100]!r}, which is missing there; copy or download it.")
        shards = [SafetensorsFile(self.folder / name) for name in sorted(set(names.values()))]
        held = {(tensor, file.path.name): file for file in shards for tensor in file.tensors}
        for tensor, name in sorted(held.keys() ^ names.items()):
            raise UserError(
                f"{index} and {name} disagree on whether {tensor[:100]!r} is in that file; "
                "copy or download both again."
            )
        return {tensor: file for (tensor, _), file in held.items()}

    def _check_tensors(self) -> None:
        found = {
            name: self._shape_and_dtype(name)
            for name in self._files
            if name != _TIED and not name.endswith(_IGNORED) and not (self.quantization and is_part(name))
        }
        wanted = (
            (tensor_name(parameter, layer), stored_shape(parameter, self._shapes[parameter]))
            for parameter, layer in in_order(self.config)
        )
        check_tensors(found, wanted, str(self.folder), str(self.folder / CONFIG_FILE))
        if _TIED in self._files:
            self._check_tied()

    def _shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Returns those of a tensor; of a quantised weight those that it stands for."""
        stored = self._files[name].tensors[self._in_file(name)]
        if self.quantization and name.endswith("_proj.weight"):
            where = f"{name} in {self._files[name].path}"
            if str(stored.dtype) != ("int8" if self.quantization.startswith("int8") else "uint8"):
                raise UserError(
                    f"{where} is {stored.dtype}, but {self.folder / CONFIG_FILE} says that the weights are "
                    f"quantised as {self.quantization.partition(',')[0]}; give the config of these weights."
                )
            if stored.dtype == np.uint8:
                return nf4_state(self._tensor_or_none, name, where)[:2], "float32"
            return stored.shape, "float32"
        return stored.shape, str(stored.dtype)

    def _check_tied(self) -> None:
        head, embedding = self._tensor(_TIED), self._tensor("model.embed_tokens.weight")
        # Compared as integers, so that NaN is equal to itself.
        bits = [x.view(f"u{x.itemsize}") for x in (head, embedding)]
        if not np.array_equal(bits[0], bits[1]):
            raise UserError(
                f"{_TIED} of shape {head.shape} in {self.folder} is not model.embed_tokens.weight, of shape "
                f"{embedding.shape}; in a Gemma both are one."
            )

    def _tensor(self, name: str) -> np.ndarray:
        return self._files[name][self._in_file(name)]

    def _tensor_or_none(self, name: str) -> np.ndarray | None:
        """Returns a part of a quantised weight, with its checksum compared; None if there is none."""
        if name not in self._files:
            return None
        self._files[name].check(self._in_file(name))
        return self._tensor(name)

    @property
    def kind(self) -> Kind:
        """See `gemma_jax.pretrained.layout.PackedWeights`."""
        return kind_of(self.quantization)

    def packed(self, parameter: str, layer: int | None) -> dict[str, np.ndarray]:
        """Returns a quantised weight as the arrays of its kind; empty for an array that is not quantised.

        Raises:
          UserError: Its tensors are damaged or contradict each other.
        """
        name = tensor_name(parameter, layer)
        if not self.quantization or not _INPUTS[parameter]:
            return {}
        where = self.where(parameter, layer)
        if self.quantization.startswith("nf4"):
            return nf4_arrays(self._tensor_or_none, name, where)
        codes, scales = self._tensor_or_none(name), self._tensor_or_none(f"{name.removesuffix('weight')}SCB")
        if codes is None or scales is None:
            raise UserError(f"{where} has no scales (SCB) beside it; copy or quantise it again.")
        return int8_arrays(codes, scales, where)

    def _in_file(self, name: str) -> str:
        return name if self._prefix else name.removeprefix(_PREFIX)

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """See `gemma_jax.pretrained.layout.Weights`."""
        name = tensor_name(parameter, layer)
        if packed := self.packed(parameter, layer):
            return from_stored(parameter, dense_of(packed), self._shapes[parameter])
        self._files[name].check(self._in_file(name))
        return from_stored(parameter, self._tensor(name), self._shapes[parameter])

    def where(self, parameter: str, layer: int | None) -> str:
        """See `gemma_jax.pretrained.layout.Weights`."""
        name = tensor_name(parameter, layer)
        return f"{name} in {self._files[name].path}"


def write_huggingface(
    folder: Path, weights: Weights, config: TransformerConfig, *, quantised: bool = False
) -> str:
    """Write weights as safetensors: one file or, if they are large, shards with an index.

    Only one tensor is in memory at a time.

    Args:
      folder: An existing folder.
      weights: The weights, already in the dtypes to write.
      config: The config of the model.
      quantised: Whether to quantise the matrices to NF4, in the form of bitsandbytes.

    Returns:
      The widest of the dtypes of what is not quantised.

    Raises:
      UserError: A matrix cannot be quantised to NF4.
    """
    places = {tensor_name(parameter, layer): (parameter, layer) for parameter, layer in in_order(config)}
    ours = parameter_shapes(config)
    shapes = {name: stored_shape(parameter, ours[parameter]) for name, (parameter, _) in places.items()}
    of_part: dict[str, str] = {}  # the weight that each tensor belongs to
    for name, shape in [*shapes.items()]:
        split = nf4_shapes(name, *shape) if quantised and _INPUTS[places[name][0]] else {name: shape}
        shapes |= split
        of_part |= dict.fromkeys(split, name)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * 4  # bytes at most: the dtype is not known before the tensor is read
        if held and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size

    parts: dict[str, np.ndarray] = {}

    def tensor(name: str) -> np.ndarray:
        nonlocal parts
        if name not in parts:
            place = places[of_part[name]]
            matrix = to_stored(place[0], weights.get(*place))
            parts = {name: matrix}
            if quantised and _INPUTS[place[0]]:
                parts = nf4_tensors(matrix, of_part[name])
        return parts[name]

    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [WEIGHTS_FILE]
    dtypes: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        dtypes |= write_safetensors(folder / file, shard, tensor)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(math.prod(shape) * jnp.dtype(dtypes[name]).itemsize for name, shape in shapes.items())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return widest(set(dtypes.values()).intersection(DTYPES))
