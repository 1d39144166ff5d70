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
from gemma_jax.sharding import Arrays, named_arrays, partition_spec, platform, with_arrays
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
    held_as = {name: _held_as(x, spec.mesh) for name, x in abstract.items()}
    table = parameter_table(spec.config)
    stored = {
        name: jax.eval_shape(
            functools.partial(spec.pack, name), jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
        )
        for name, parameter in table.items()
    }
    packs: dict[tuple[str, tuple[int, ...]], Callable[..., Any]] = {}
    writes = {
        name: jax.jit(
            functools.partial(_write, whole=not parameter.layers),
            donate_argnums=0,
            out_shardings={n: held_as[n].sharding for n in stored[name]},
        )
        for name, parameter in table.items()
    }
    # Times zero they add up to zero, unless one is NaN or infinite. On CPU this takes a quarter of the time
    # of isfinite, whose result is stored; and the largest of some numbers need not be NaN if one is.
    are_finite = jax.jit(lambda floats: jnp.stack([jnp.sum(x * 0) == 0 for x in floats]).all())
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
            # Three programs, because XLA's CPU compiler makes the transposition five times as slow when it
            # joins it with what follows.
            arrays: Any = piece
            if order:
                if (name, order) not in packs:
                    packs[name, order] = _pack(order, functools.partial(spec.pack, name))
                arrays = packs[name, order](piece)
            floats = [x for x in arrays.values() if jnp.issubdtype(x.dtype, jnp.floating)]
            if order and len(floats) < len(arrays):
                floats.append(piece)  # what became an integer
            del piece
            if not are_finite(floats):
                raise UserError(
                    f"{weights.where(name, layer)} holds NaN or infinity, so the weights are damaged; "
                    "copy or download them again."
                )
            stacks = {n: filled.pop(n) if n in filled else _zeros(held_as[n]) for n in stored[name]}
            # Waiting keeps only one piece in transit at a time.
            filled |= jax.block_until_ready(writes[name](stacks, arrays, start))
    for name, x in abstract.items():
        if filled[name].dtype != x.dtype:
            from_held = (
                _from_bits if x.dtype == jnp.bfloat16 else jax.jit(from_bytes, out_shardings=x.sharding)
            )
            filled[name] = jax.block_until_ready(from_held(filled[name]))
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
        return held  # jax may keep this view of the file, but what is written to the stacks is a copy

    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, P(*split)), shard)


def _held_as(abstract: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns how an array is kept while it is filled.

    It is int4 as bytes, if each shard has whole ones, and bfloat16 as its bits on CPU, where XLA would
    convert the whole stack to float32 and back for each layer.
    """
    if abstract.dtype == jnp.bfloat16 and platform(mesh) == "cpu":
        return jax.ShapeDtypeStruct(abstract.shape, jnp.uint16, sharding=abstract.sharding)
    if abstract.dtype != jnp.int4 or abstract.sharding.shard_shape(abstract.shape)[-1] % 2:
        return abstract
    shape = (*abstract.shape[:-1], abstract.shape[-1] // 2)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=abstract.sharding)


def _zeros(held: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(functools.partial(jnp.zeros, held.shape, held.dtype), out_shardings=held.sharding)()


def _pack(order: tuple[int, ...], pack: Pack) -> Callable[[jax.Array], Arrays]:
    """Makes a program that packs a dense array, which was sent with its axes in `order`."""
    return jax.jit(lambda piece: pack(piece.transpose([int(axis) for axis in np.argsort(order)])))


def _write(stacks: Arrays, arrays: Arrays, start: jax.Array, whole: bool) -> Arrays:
    """Writes one layer's arrays, or some rows of an embedding, to their place.

    `whole` says that the arrays have no axis of layers.
    """
    written = {}
    for name, x in arrays.items():
        if stacks[name].dtype == jnp.uint8:
            x = to_bytes(x)
        elif stacks[name].dtype == jnp.uint16:
            x = jax.lax.bitcast_convert_type(x, jnp.uint16)
        written[name] = jax.lax.dynamic_update_slice_in_dim(stacks[name], x if whole else x[None], start, 0)
    return written


def _from_bits(x: jax.Array) -> jax.Array:
    """Returns the bfloat16 numbers with these bits, in the same memory on CPU: a program would copy them."""
    parts = [
        jax.device_put(np.asarray(shard.data).view(jnp.bfloat16), shard.device, may_alias=True)
        for shard in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
