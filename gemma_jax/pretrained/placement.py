"""Weights from disk to their place on the mesh, one array at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.config import ComputeConfig, TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.memory import require_memory
from gemma_jax.model import abstract_transformer
from gemma_jax.pretrained.layout import Weights, in_order, parameter_shapes
from gemma_jax.sharding import named_arrays, shardings, with_arrays, with_shardings


def place(weights: Weights, config: TransformerConfig, compute: ComputeConfig, mesh: Mesh) -> nnx.State:
    """The parameters on the mesh, in `compute.param_dtype`.

    Each device gets its shard of one layer's array at a time, and puts it into its shard of the stack of
    all layers; no device and no host holds more of the model than that. An array is sent in the order in
    which it lies on disk, so that the disk is read straight through, and is turned on the device.

    Raises:
      UserError: an array holds NaN or infinity, or a mesh axis does not divide a parameter.
    """
    _, abstract = abstract_transformer(config, compute, mesh)
    require_memory(with_shardings(abstract, mesh), "the model")
    arrays, placed, shapes = named_arrays(abstract), named_arrays(shardings(abstract, mesh)), {}
    for name, shape in parameter_shapes(config).items():
        # With the padding rows of the embedding, which the weights do not have.
        shapes[name] = arrays[name].shape[1:] if name.startswith("blocks.") else arrays[name].shape
        assert len(shapes[name]) == len(shape)
    fills: dict[tuple[str, tuple[int, ...]], Callable[..., Any]] = {}
    filled: dict[str, jax.Array] = {}
    for name, layer in in_order(config):
        part = weights.get(name, layer)
        order = tuple(int(axis) for axis in np.argsort([-stride for stride in part.strides], kind="stable"))
        spec = _spec(placed[name])[0 if layer is None else 1 :]
        piece = _sent(part.transpose(order), [shapes[name][a] for a in order], [spec[a] for a in order], mesh)
        if (name, order) not in fills:
            fills[name, order] = _fill(order, arrays[name].dtype, placed[name])
        if layer is None:
            filled[name], finite = fills[name, order](piece)
        else:
            stack = filled.pop(name) if name in filled else _zeros(arrays[name], placed[name])
            filled[name], finite = fills[name, order](piece, stack, layer)
        if not finite:  # asking waits for the device, so that only one piece is on its way at a time
            raise UserError(
                f"{weights.where(name, layer)} holds NaN or infinity, so the weights are damaged; "
                "copy or download them again."
            )
    return with_arrays(abstract, filled)


def _spec(sharding: NamedSharding) -> list[Any]:
    """Mesh axes of each dimension; a PartitionSpec may leave out the last ones."""
    return [*sharding.spec, *[None] * 8]


def _sent(part: np.ndarray, shape: list[int], spec: list[Any], mesh: Mesh) -> jax.Array:
    """`part` on the mesh; where `shape` is larger, zeros follow."""

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        held = part[index]
        wanted = [len(range(*s.indices(size))) for s, size in zip(index, shape, strict=True)]
        if list(held.shape) != wanted:
            return np.pad(held, [(0, most - some) for most, some in zip(wanted, held.shape, strict=True)])
        # A copy: jax may keep what it is given, and this would be a view of a file that others can change.
        return np.array(held)

    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, P(*spec)), shard)


def _zeros(abstract: Any, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(abstract.shape, abstract.dtype), out_shardings=sharding)()


def _fill(order: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable[..., Any]:
    """A program that turns a piece sent in `order`, casts it and puts it into its place in a stack."""
    back = tuple(int(axis) for axis in np.argsort(order))

    def fill(piece: jax.Array, stack: jax.Array | None = None, layer: Any = None) -> tuple[Any, jax.Array]:
        ours = piece.transpose(back).astype(dtype)
        finite = jnp.isfinite(ours).all()
        if stack is None:
            return ours, finite
        return jax.lax.dynamic_update_index_in_dim(stack, ours, layer, 0), finite

    copied = NamedSharding(sharding.mesh, P())
    return jax.jit(fill, donate_argnames="stack", out_shardings=(sharding, copied))
