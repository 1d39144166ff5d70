"""The product of activations and a weight."""

import math

import jax
from jax import lax


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
