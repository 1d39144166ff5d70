"""The product of activations and a weight."""

import jax
from jax import lax


def precision(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """Full precision for 32 and 64 bit products: no silent TF32 or bfloat16 passes on GPU and TPU."""
    return lax.Precision.HIGHEST if jax.numpy.dtype(dtype).itemsize >= 4 else lax.Precision.DEFAULT


def product(x: jax.Array, weight: jax.Array, contract: int = 1) -> jax.Array:
    """The last `contract` axes of `x` against the first `contract` axes of `weight`.

    Args:
      x: [..., *C] activations; their dtype is that of the product.
      weight: [*C, *O] of any float dtype.
      contract: number of axes in C.

    Returns:
      [..., *O] in x's dtype.
    """
    over_x = tuple(range(x.ndim - contract, x.ndim))
    over_weight = tuple(range(contract))
    return lax.dot_general(
        x,
        weight.astype(x.dtype),
        ((over_x, over_weight), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=x.dtype,
    )
