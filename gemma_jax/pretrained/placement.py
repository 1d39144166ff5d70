"""Moves weights from disk to the mesh, one array at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.errors import UserError
from gemma_jax.memory import require_memory
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained.layout import PackedWeights, Weights, in_order
from gemma_jax.sharding import Arrays, named_arrays, partition_spec, with_arrays
from gemma_jax.weights import EMBEDDING, Parameter, parameter_table
from gemma_jax.weights.quantized import from_bytes, to_bytes
from gemma_jax.weights.weight import row_block

# Converts one layer's dense array to the arrays that its weight stores, by their full names.
Pack = Callable[[jax.Array], Arrays]


def place(weights: Weights, spec: ModelSpec) -> nnx.State:
    """Place weights on the mesh, each stored as the spec's kind of weight.

    Each device receives its shard of one layer's array at a time, packs it, and writes it to its shard of the
    stack of all layers; no device and no host holds more of the dense model than that. An array is sent in
    its axis order on disk, so that the disk is read sequentially, and is transposed on the device. Weights
    that are stored quantised as this kind are sent as they are.

    Raises:
      UserError: An array holds NaN or infinity, a mesh axis does not divide a parameter, or the parameters do
        not fit into memory.
    """
    require_memory(spec.params, "the model")
    abstract = named_arrays(spec.params)
    held_as = {name: _held_as(x) for name, x in abstract.items()}
    table = parameter_table(spec.config)
    stored = {
        name: jax.eval_shape(
            functools.partial(spec.pack, name), jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
        )
        for name, parameter in table.items()
    }
    fills: dict[tuple[str, tuple[int, ...] | None], Callable[..., Any]] = {}
    filled: Arrays = {}
    packed = weights.packed if isinstance(weights, PackedWeights) and weights.kind == spec.kind else None
    for name, layer in in_order(spec.config):
        pieces: Iterable[tuple[int, tuple[int, ...] | None, Any]]
        if packed and (held := packed(name, layer)):
            full = {f"{name}.{key}": x for key, x in held.items()}
            sent = {n: _sent(x, x.shape, abstract[n].sharding.spec[1:], spec.mesh) for n, x in full.items()}
            pieces = [(layer or 0, None, sent)]
        else:
            pieces = _pieces(weights.get(name, layer), layer, table[name], spec.mesh)
        for start, order, piece in pieces:
            if (name, order) not in fills:
                out = {n: held_as[n] for n in stored[name]}
                fills[name, order] = _fill(order, functools.partial(spec.pack, name), out, layer is None)
            stacks = {n: filled.pop(n) if n in filled else _zeros(held_as[n]) for n in stored[name]}
            arrays, finite = fills[name, order](piece, stacks, start)
            filled |= arrays
            if not finite:  # reading this waits for the device, so only one piece is in transit at a time
                raise UserError(
                    f"{weights.where(name, layer)} holds NaN or infinity, so the weights are damaged; "
                    "copy or download them again."
                )
    for name, x in abstract.items():
        if filled[name].dtype != x.dtype:
            filled[name] = jax.block_until_ready(jax.jit(from_bytes, out_shardings=x.sharding)(filled[name]))
    return with_arrays(spec.params, filled)


def _pieces(
    array: np.ndarray, layer: int | None, about: Parameter, mesh: Mesh
) -> Iterator[tuple[int, tuple[int, ...], jax.Array]]:
    """Sends the array of one layer to the mesh, or an embedding some rows after the other.

    Yields:
      Where in the stacks the piece is written, the order of its axes, and the piece.
    """
    order = tuple(int(axis) for axis in np.argsort([-stride for stride in array.strides], kind="stable"))
    split = list(partition_spec(about.axes, about.shape, mesh, about.name))
    # The stored embedding has padding rows, which `array` does not have. A mesh of several devices gets all
    # rows at once, because each device holds a range of them.
    by_rows = about.name == EMBEDDING and mesh.size == 1
    rows = row_block(about.shape[0]) if by_rows else about.shape[0]
    for start in range(0, about.shape[0], rows):
        shape = [(rows, *about.shape[1:])[axis] for axis in order]
        part = array[start : start + rows].transpose(order)
        yield layer or start, order, _sent(part, shape, [split[axis] for axis in order], mesh)


def _sent(part: np.ndarray, shape: Sequence[int], split: Iterable[Any], mesh: Mesh) -> jax.Array:
    """Sends `part` to the mesh, padded at the end with zeros up to `shape`."""

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        held = part[index]
        wanted = [len(range(*s.indices(size))) for s, size in zip(index, shape, strict=True)]
        if list(held.shape) != wanted:
            return np.pad(held, [(0, most - some) for most, some in zip(wanted, held.shape, strict=True)])
        # Copied, because jax may keep the array, and a view would change if others changed the file.
        return np.array(held)

    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, P(*split)), shard)


def _held_as(abstract: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns how an array is kept while it is filled: int4 as bytes, if each shard has whole ones."""
    if abstract.dtype != jnp.int4 or abstract.sharding.shard_shape(abstract.shape)[-1] % 2:
        return abstract
    shape = (*abstract.shape[:-1], abstract.shape[-1] // 2)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=abstract.sharding)


def _zeros(held: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(functools.partial(jnp.zeros, held.shape, held.dtype), out_shardings=held.sharding)()


def _fill(
    order: tuple[int, ...] | None, pack: Pack, held_as: dict[str, jax.ShapeDtypeStruct], whole: bool
) -> Callable[..., Any]:
    """Makes a program that writes one layer's arrays, or some rows of an embedding, to their place.

    It packs a dense array that was sent with its axes in `order`. Without an order it receives packed arrays.
    `whole` says that the arrays have no axis of layers.
    """

    def fill(piece: Any, stacks: Arrays, start: Any) -> tuple[Arrays, jax.Array]:
        arrays, checked = piece, []
        if order is not None:
            dense = piece.transpose([int(axis) for axis in np.argsort(order)])
            arrays, checked = pack(dense), [dense]
        floats = [x for x in (*checked, *arrays.values()) if jnp.issubdtype(x.dtype, jnp.floating)]
        finite = jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
        for name, x in arrays.items():
            x = to_bytes(x) if held_as[name].dtype == jnp.uint8 else x
            stacks[name] = jax.lax.dynamic_update_slice_in_dim(
                stacks[name], x if whole else x[None], start, 0
            )
        return stacks, finite

    out = {name: x.sharding for name, x in held_as.items()}
    copied = NamedSharding(next(iter(out.values())).mesh, P())
    return jax.jit(fill, donate_argnames="stacks", out_shardings=(out, copied))
