"""The matmul of activations and a weight, whole or in parts over the mesh.

Shape legend: B batch, L length, C contracted axes, O output axes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gemma_jax.sharding import RULES
from gemma_jax.weights import fsdp
from gemma_jax.weights.structure import Structure


def precision(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """Full precision for 32 and 64 bit products: no silent TF32 or bfloat16 passes on GPU and TPU."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else lax.Precision.DEFAULT


def matmul(
    x: jax.Array, weight: jax.Array, contract: int = 1, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """The last `contract` axes of `x` against the first `contract` axes of `weight`.

    Computed as one product of two matrices. With more axes XLA's CPU compiler folds transposes into the
    gradients of its neighbours, and a gradient of the feed-forward takes twice as long (benchmarks/LOG.md).

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sharded_matmul(x: jax.Array, arrays: list[jax.Array], structure: Structure) -> jax.Array:
    """`matmul` with a weight whose arrays are split over the fsdp axis.

    The arrays are gathered as they are stored, and made dense on each device. The gradient of a dense weight
    is summed in x's dtype and scattered to the parts; a weight of another kind must be frozen.

    Args:
      x: [B, L, *C] activations, their rows split over the mesh.
      arrays: of the weight, in the order of `structure`.
      structure: the weight without its arrays.

    Returns:
      [B, L, *O] in x's dtype.
    """
    return _gathered(arrays, structure).multiply(x)


def _gathered(arrays: list[jax.Array], structure: Structure) -> Any:
    """Returns the weight with its arrays gathered over the fsdp axis, as they are stored."""
    specs = structure.specs(arrays)
    out = [P(*(None if entry == fsdp.AXIS else entry for entry in spec)) for spec in specs]

    def of_device(parts: list[jax.Array]) -> list[jax.Array]:
        return structure.gather(parts, specs)

    mapped = jax.shard_map(of_device, mesh=structure.mesh, in_specs=(specs,), out_specs=out, check_vma=False)
    return structure.weight(mapped(arrays))


def _forward(
    x: Any, arrays: list[Any], structure: Structure
) -> tuple[jax.Array, tuple[jax.Array, list[jax.Array], tuple[()] | None]]:
    # Each argument says whether anything is differentiated with respect to it (jax.custom_vjp.defvjp).
    trained = any(array.perturbed for array in arrays)
    if trained and not structure.differentiable:
        raise ValueError(f"{structure.parameter.name} is of a kind without a gradient; it must be frozen")
    x, arrays = x.value, [array.value for array in arrays]
    # Not the whole weight: whoever keeps everything for the backward pass would keep the whole model. Where
    # the forward pass is computed again, the compiler sees that it and the backward pass gather the same.
    return _gathered(arrays, structure).multiply(x), (x, arrays, () if trained else None)


def _backward(
    structure: Structure, saved: tuple[jax.Array, list[jax.Array], tuple[()] | None], d_out: Any
) -> tuple[jax.Array, list[jax.Array] | None]:
    x, arrays, trained = saved
    contract, mesh = structure.parameter.inputs, structure.mesh
    if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros_like(x), None
    # Not linear_transpose, which cannot transpose a barrier around activations and a weight.
    (d_x,) = jax.vjp(_gathered(arrays, structure).multiply, x)[1](d_out)
    if trained is None:
        return d_x, None
    spec = structure.dense_spec
    split = spec.index(fsdp.AXIS)
    rest = [None if entry == fsdp.AXIS else entry for entry in spec]

    def of_device(x: jax.Array, d_out: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - contract :], *d_out.shape[x.ndim - contract :])
        local = jax.ShapeDtypeStruct(shape, x.dtype)
        (d_weight,) = jax.linear_transpose(lambda weight: matmul(x, weight, contract), local)(d_out)
        return fsdp.scatter_sum(d_weight, split, fsdp.stages(mesh))

    def rows(entries: list[Any]) -> P:
        return P(RULES["batch"], *[None] * (x.ndim - contract - 1), *entries)

    d_weight = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(rows(rest[:contract]), rows(rest[contract:])),
        out_specs=P(*spec),
        check_vma=False,
    )(x, d_out)
    return d_x, [d_weight]


sharded_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
