"""Moves weights from disk to the mesh, one array at a time."""

import functools
from collections.abc import Callable, Collection
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
from gemma_jax.weights import parameter_table

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
    table = parameter_table(spec.config)
    stored = {
        name: jax.eval_shape(
            functools.partial(spec.pack, name), jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
        )
        for name, parameter in table.items()
    }
    fills: dict[tuple[str, tuple[int, ...] | None], Callable[..., Any]] = {}
    filled = _initial(spec, abstract.keys() - {array for arrays in stored.values() for array in arrays})
    packed = weights.packed if isinstance(weights, PackedWeights) and weights.kind == spec.kind else None
    for name, layer in in_order(spec.config):
        about, order = table[name], None
        if packed and (held := packed(name, layer)):
            piece: Any = {
                f"{name}.{key}": _sent(
                    x, list(x.shape), list(abstract[f"{name}.{key}"].sharding.spec[1:]), spec.mesh
                )
                for key, x in held.items()
            }
        else:
            part = weights.get(name, layer)
            order = tuple(int(x) for x in np.argsort([-stride for stride in part.strides], kind="stable"))
            split = list(partition_spec(about.axes, about.shape, spec.mesh, name))
            # This shape includes the padding rows of the embedding, which `part` does not have.
            shape = [about.shape[axis] for axis in order]
            piece = _sent(part.transpose(order), shape, [split[axis] for axis in order], spec.mesh)
        if (name, order) not in fills:
            out = {array: abstract[array].sharding for array in stored[name]}
            fills[name, order] = _fill(order, functools.partial(spec.pack, name), out)
        if layer is None:
            arrays, finite = fills[name, order](piece)
        else:
            stacks = {n: filled.pop(n) if n in filled else _zeros(abstract[n]) for n in stored[name]}
            arrays, finite = fills[name, order](piece, stacks, layer)
        filled |= arrays
        if not finite:  # reading this waits for the device, so only one piece is in transit at a time
            raise UserError(
                f"{weights.where(name, layer)} holds NaN or infinity, so the weights are damaged; "
                "copy or download them again."
            )
    return with_arrays(spec.params, filled)


def _initial(spec: ModelSpec, names: Collection[str]) -> Arrays:
    """Creates the initial values of arrays that have no dense source, such as those of an adapter."""
    if not names:
        return {}
    out = {name: x.sharding for name, x in named_arrays(spec.params).items() if name in names}

    return jax.jit(functools.partial(spec.create, names=[*out]), out_shardings=out)(jax.random.key(0))


def _sent(part: np.ndarray, shape: list[int], split: list[Any], mesh: Mesh) -> jax.Array:
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


def _zeros(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    shape, dtype = abstract.shape, abstract.dtype
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=abstract.sharding)()


def _fill(order: tuple[int, ...] | None, pack: Pack, out: dict[str, NamedSharding]) -> Callable[..., Any]:
    """Makes a program that writes one layer's arrays to their place in the stacks.

    It packs a dense array that was sent with its axes in `order`. Without an order it receives packed arrays.
    """

    def fill(piece: Any, stacks: Arrays | None = None, layer: Any = None) -> tuple[Arrays, jax.Array]:
        arrays, checked = piece, []
        if order is not None:
            dense = piece.transpose([int(axis) for axis in np.argsort(order)])
            arrays, checked = pack(dense), [dense]
        floats = [x for x in (*checked, *arrays.values()) if jnp.issubdtype(x.dtype, jnp.floating)]
        finite = jnp.stack([jnp.isfinite(x).all() for x in floats]).all()
        if stacks is not None:
            update = jax.lax.dynamic_update_index_in_dim
            arrays = {name: update(stacks[name], x, layer, 0) for name, x in arrays.items()}
        return arrays, finite

    copied = NamedSharding(next(iter(out.values())).mesh, P())
    return jax.jit(fill, donate_argnames="stacks", out_shardings=(out, copied))
