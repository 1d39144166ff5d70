"""The published Flax form: an orbax directory with one array per key, flat or nested.

Both forms occur: `{"transformer/layer_0/attn/q_einsum": {"w": ...}}`, and the same keys as nested
dictionaries. Multi-query models have `q_einsum` and `kv_einsum`; if every query head has its own key/value
head, `qkv_einsum` holds all three.

Shape legend: D embed, F hidden, N query heads, K key/value heads, H head dim.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax import checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from gemma_jax.checkpoint.record import first_line, without_echo
from gemma_jax.config import TransformerConfig, validate_model
from gemma_jax.errors import UserError
from gemma_jax.paths import open_regular
from gemma_jax.pretrained.layout import Weights, check_tensors, parameter_shapes, widest
from gemma_jax.weights import EMBEDDING, FINAL_NORM

PUBLISHED_ROWS = 256_128  # rows of the embedding: a vocabulary of 256,000 and 128 rows of padding
_Q, _KV, _QKV = "attn/q_einsum", "attn/kv_einsum", "attn/qkv_einsum"
_OUT, _GATING, _DOWN = "attn/attn_vec_einsum", "mlp/gating_einsum", "mlp/linear"
_ATTENTION_NORM, _FEED_FORWARD_NORM = "pre_attention_norm/scale", "pre_ffw_norm/scale"
# Names of metadata files, which orbax reads whole; all other files hold array values.
_DESCRIBING = re.compile(r"[._].*|.*\.json|manifest\.ocdbt|process_\d+")
_TABLE, _LAST_NORM = "embedder/input_embedding", "final_norm/scale"


def tensors_of(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Maps each array name of a layer to its parameters; several are stacked on a leading axis."""
    q, k, v = (f"blocks.attention.{name}" for name in "qkv")
    split = {_QKV: (q, k, v)} if config.num_heads == config.num_kv_heads else {_Q: (q,), _KV: (k, v)}
    return split | {
        _OUT: ("blocks.attention.o",),
        _GATING: ("blocks.feed_forward.gate", "blocks.feed_forward.up"),
        _DOWN: ("blocks.feed_forward.down",),
        _ATTENTION_NORM: ("blocks.attention_norm",),
        _FEED_FORWARD_NORM: ("blocks.feed_forward_norm",),
    }


def _turned(parameter: str, array: np.ndarray) -> np.ndarray:
    """Convert from our axis order to the published one, [N, D, H] for q, k and v, or back."""
    return array.swapaxes(0, 1) if parameter.split(".")[-1] in "qkv" else array


def tensor_shapes(config: TransformerConfig, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name, without `transformer/` and a final `/w`, and the shape of every array of a model."""
    ours = parameter_shapes(config)
    yield _TABLE, (rows, config.embed_dim)
    for layer in range(config.num_layers):
        for name, parts in tensors_of(config).items():
            one = _turned(parts[0], np.broadcast_to(np.zeros(()), ours[parts[0]])).shape
            yield f"layer_{layer}/{name}", (len(parts), *one) if len(parts) > 1 else one
    yield _LAST_NORM, (config.embed_dim,)


class FlaxDirectory:
    """The weights in a published Flax directory, read one array at a time."""

    def __init__(self, folder: Path, config: TransformerConfig | None, vocab_size: int | None) -> None:
        """Read the metadata, and check the names, shapes and dtypes of the arrays.

        Args:
          folder: The folder of the arrays.
          config: The config from a config.json beside it. If None, it is inferred from the shapes, with
            Gemma's values for context length, positions and epsilon.
          vocab_size: The vocabulary size of the tokenizer beside it, if known.

        Raises:
          UserError: The folder is not a complete Flax checkpoint of a Gemma, or it contradicts the config.
        """
        self.folder = folder
        self._leaves = self._read_metadata()
        shapes = {name: tuple(leaf.shape) for name, (_, leaf) in self._leaves.items()}
        self.config = config or self._infer(shapes, vocab_size)
        described_by = "the config.json beside it" if config else "its first layer"
        found = {name: (shapes[name], str(np.dtype(leaf.dtype))) for name, (_, leaf) in self._leaves.items()}
        rows = max(self.config.vocab_size, *shapes.get(_TABLE, ())[:1])  # rows beyond the vocabulary pad it
        check_tensors(found, tensor_shapes(self.config, rows), str(folder), described_by)
        self.dtype = widest(dtype for _, dtype in found.values())
        self._holder = {
            parameter: (name, index if len(parts) > 1 else None)
            for name, parts in tensors_of(self.config).items()
            for index, parameter in enumerate(parts)
        }
        self._last: tuple[str, np.ndarray] | None = None  # last array read: it may hold several parameters

    def _read_metadata(self) -> dict[str, tuple[tuple[str, ...], Any]]:
        """For each array by name, returns its path in the tree and its metadata."""
        _check_files(self.folder)
        try:
            with without_echo():
                tree = ocp.metadata(self.folder.absolute()).metadata
            flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
            leaves: dict[str, tuple[tuple[str, ...], Any]] = {}
            for path, leaf in flat:
                keys = tuple(str(key.key) for key in path)
                name = "/".join(keys).removeprefix("transformer/").removesuffix("/w")
                if name in leaves:
                    raise ValueError(f"{name} stands there twice")
                leaves[name] = (keys, leaf)
                np.dtype(leaf.dtype), tuple(leaf.shape)  # raises for anything that is not an array
            return leaves
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken(first_line(error)) from error

    def _broken(self, reason: str) -> UserError:
        return UserError(
            f"{self.folder} is not a whole Flax checkpoint: {reason[:200]}; copy or download it again."
        )

    def _infer(self, shapes: Mapping[str, tuple[int, ...]], vocab_size: int | None) -> TransformerConfig:
        """Infers the config from the shapes of the embedding table and of the first layer."""

        def axes(name: str, count: int) -> tuple[int, ...]:
            if name not in shapes:
                raise self._broken(f"it has no {name}")
            if len(shapes[name]) != count:
                raise self._broken(f"{name} has shape {shapes[name]}, but must have {count} axes")
            return shapes[name]

        rows, D = axes(_TABLE, 2)
        N, H, _ = axes(f"layer_0/{_OUT}", 3)
        K = N if f"layer_0/{_QKV}" in shapes else axes(f"layer_0/{_KV}", 4)[1]
        F = axes(f"layer_0/{_GATING}", 3)[2]
        layers = {int(found[1]) for name in shapes if (found := re.match(r"layer_(\d{1,9})/", name))}
        config = TransformerConfig(
            vocab_size=vocab_size or (256_000 if rows == PUBLISHED_ROWS else rows),
            num_layers=len(layers),
            embed_dim=D,
            hidden_dim=F,
            num_heads=N,
            num_kv_heads=K,
            head_dim=H,
        )
        try:
            validate_model(config)
        except UserError as error:
            raise self._broken(str(error)) from error
        return config

    def _read(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            self._last = None  # freed before the next read, so that both need not fit into memory
            keys, leaf = self._leaves[name]
            # A broadcast zero takes no memory and makes orbax return a numpy array of this shape and dtype.
            tree: Any = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
            for key in reversed(keys):
                tree = {key: tree}
            context = ocp.Context()
            context.pytree.loading.partial_load = True
            try:
                with context, without_echo():
                    (array,) = jax.tree.leaves(ocp.load(self.folder.absolute(), tree))
            except (OSError, ValueError, KeyError) as error:
                raise self._broken(f"{name} cannot be read ({first_line(error)})") from error
            self._last = name, array
        return self._last[1]

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """See `gemma_jax.pretrained.layout.Weights`."""
        if parameter == EMBEDDING:
            return self._read(_TABLE)[: self.config.vocab_size]
        if parameter == FINAL_NORM:
            return self._read(_LAST_NORM)
        name, index = self._holder[parameter]
        array = self._read(f"layer_{layer}/{name}")
        return _turned(parameter, array if index is None else array[index])

    def where(self, parameter: str, layer: int | None) -> str:
        """See `gemma_jax.pretrained.layout.Weights`."""
        outer = {EMBEDDING: _TABLE, FINAL_NORM: _LAST_NORM}
        name = outer[parameter] if layer is None else f"layer_{layer}/{self._holder[parameter][0]}"
        return f"{name} in {self.folder}"


def _check_files(folder: Path) -> None:
    """Make sure that a folder holds only regular files and folders: orbax would wait for a pipe forever.

    Raises:
      UserError: There is anything else, a file that is too large, or a link to a folder, which could point
        anywhere, even to a parent.
    """
    for place, folders, files in os.walk(folder):
        # os.walk does not follow links to folders, and open_regular refuses them.
        for name in files + [name for name in folders if os.path.islink(os.path.join(place, name))]:
            most = 2**24 if _DESCRIBING.fullmatch(name) else 2**36  # a 7B in float32: under 2**35 bytes
            open_regular(os.path.join(place, name), most).close()


def write_flax(folder: Path, weights: Weights, config: TransformerConfig) -> str:
    """Write weights in the published format: flat keys, and the embedding with its padding rows.

    All weights are in memory at once, because orbax saves whole trees.

    Args:
      folder: The folder to create; its parent must exist.
      weights: The weights, already in the dtypes to write.
      config: The config of the model.

    Returns:
      The widest of the dtypes that were written.
    """
    rows = PUBLISHED_ROWS if config.vocab_size == 256_000 else config.vocab_rows
    embedding = weights.get(EMBEDDING, None)
    table = np.pad(embedding, [(0, rows - config.vocab_size), (0, 0)])
    tree: dict[str, dict[str, np.ndarray]] = {
        "transformer/embedder": {"input_embedding": table},
        "transformer/final_norm": {"scale": np.array(weights.get(FINAL_NORM, None))},
    }
    for layer in range(config.num_layers):
        for name, parts in tensors_of(config).items():
            arrays = [_turned(parameter, weights.get(parameter, layer)) for parameter in parts]
            array = np.stack(arrays) if len(arrays) > 1 else np.ascontiguousarray(arrays[0])
            path, leaf = name.split("/scale")[0], "scale" if name.endswith("/scale") else "w"
            tree[f"transformer/layer_{layer}/{path}"] = {leaf: array}
    # The older interface of orbax is used: the newer one does not write the published layout.
    with without_echo(), orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    return widest(str(array.dtype) for array in jax.tree.leaves(tree))
