"""The product of activations and a weight."""

import functools
import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.sharding import RULES, Axes, logical_axes, partition_spec
from gemma_jax.weights import fsdp


def precision(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """Full precision for 32 and 64 bit products: no silent TF32 or bfloat16 passes on GPU and TPU."""
    return lax.Precision.HIGHEST if jax.numpy.dtype(dtype).itemsize >= 4 else lax.Precision.DEFAULT


def product(
    x: jax.Array, weight: jax.Array, contract: int = 1, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """The last `contract` axes of `x` against the first `contract` axes of `weight`.

    Computed as one product of two matrices. With more axes XLA's CPU compiler folds transposes into the
    gradients of its neighbours, and a gradient of the feed-forward takes twice as long (docs/log.md).

    Args:
      x: [..., *C] activations; the weight is cast to their dtype.
      weight: [*C, *O] of any float dtype.
      contract: number of axes in C.
      dtype: of the result; x's if left out.

    Returns:
      [..., *O].
    """
    outer, inner = x.shape[: x.ndim - contract], x.shape[x.ndim - contract :]
    result = lax.dot(
        x.reshape(math.prod(outer), math.prod(inner)),
        weight.astype(x.dtype).reshape(math.prod(inner), -1),
        precision=precision(x.dtype),
        preferred_element_type=dtype or x.dtype,
    )
    return result.reshape(*outer, *weight.shape[contract:])


def weight_product(x: jax.Array, weight: nnx.Variable[jax.Array], mesh: Mesh, contract: int = 1) -> jax.Array:
    """`product` with a parameter of a layer, which the mesh may split.

    Over the fsdp axis the weight is gathered in x's dtype, and its gradient is summed in that dtype.

    Args:
      x: [B, L, *C] activations.
      weight: [*C, *O], with the logical axes that it was made with.
      mesh: that both lie on.
      contract: number of axes in C.

    Returns:
      [B, L, *O] in x's dtype.
    """
    array = weight[...].astype(x.dtype)
    # A single row is on all devices; then the partitioner may rather send activations than weights.
    if mesh.shape[fsdp.AXIS] == 1 or len(x) == 1:
        return product(x, array, contract)
    return _sharded_product(x, array, logical_axes(weight)[-array.ndim :], mesh, contract)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _sharded_product(x: jax.Array, weight: jax.Array, axes: Axes, mesh: Mesh, contract: int) -> jax.Array:
    return product(x, _gathered(weight, axes, mesh), contract)


def _specs(axes: Axes, shape: Sequence[int], mesh: Mesh) -> tuple[int, P, list[str | None]]:
    """Of a weight: the dimension that fsdp splits, how it lies, and what else splits its dimensions."""
    spec = partition_spec(axes, shape, mesh, "weight")
    entries = list(spec)
    split = entries.index(fsdp.AXIS)
    entries[split] = None
    return split, spec, entries


def _gathered(weight: jax.Array, axes: Axes, mesh: Mesh) -> jax.Array:
    split, spec, rest = _specs(axes, weight.shape, mesh)
    gather = functools.partial(fsdp.gather, dimension=split, sizes=fsdp.stages(mesh))
    return jax.shard_map(gather, mesh=mesh, in_specs=spec, out_specs=P(*rest), check_vma=False)(weight)


def _forward(
    x: jax.Array, weight: jax.Array, axes: Axes, mesh: Mesh, contract: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not the whole weight: whoever keeps everything for the backward pass would keep the whole model. Where
    # the forward pass is computed again, the compiler sees that it and the backward pass gather the same.
    return product(x, _gathered(weight, axes, mesh), contract), (x, weight)


def _backward(
    axes: Axes, mesh: Mesh, contract: int, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    whole = _gathered(weight, axes, mesh)
    (d_x,) = jax.linear_transpose(lambda x: product(x, whole, contract), x)(d_out)
    split, spec, rest = _specs(axes, whole.shape, mesh)

    def of_device(x: jax.Array, d_out: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - contract :], *d_out.shape[x.ndim - contract :])
        local = jax.ShapeDtypeStruct(shape, x.dtype)
        (d_weight,) = jax.linear_transpose(lambda weight: product(x, weight, contract), local)(d_out)
        return fsdp.scatter_sum(d_weight, split, fsdp.stages(mesh))

    def rows(entries: list[str | None]) -> P:
        return P(RULES["batch"], *[None] * (x.ndim - contract - 1), *entries)

    d_weight = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(rows(rest[:contract]), rows(rest[contract:])),
        out_specs=spec,
        check_vma=False,
    )(x, d_out)
    return d_x, d_weight


_sharded_product.defvjp(_forward, _backward)
