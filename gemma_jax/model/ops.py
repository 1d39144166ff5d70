"""The pure functions of the Gemma decoder.

Shape legend: B batch, L length, D embed, N heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np

Integers = jax.Array | np.ndarray


def _at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * (1 + scale) over the last axis, computed in float32 (Zhang and Sennrich, 2019).

    Gemma stores the scale minus one, so that zeros mean "leave as is". The mean of squares, the root
    and the product stay in float32; only the result is cast (huggingface/transformers #29402).

    Args:
      x: [..., D].
      scale: [D].
      epsilon: added to the mean square.

    Returns:
      [..., D] in x's dtype.
    """
    wide = x.astype(_at_least_float32(x.dtype))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * (1 + scale.astype(wide.dtype))).astype(x.dtype)


def rope(x: jax.Array, positions: Integers, base: float) -> jax.Array:
    """Rotary position embedding in the split-halves convention (Su et al., 2021).

    Angles and rotation are float32 whatever the activations are: bfloat16 cannot tell position 4095
    from 4096 (huggingface/transformers #29285).

    Args:
      x: [B, L, N, H].
      positions: [B, L] integers.
      base: wavelengths run from 2 pi to 2 pi * base.

    Returns:
      [B, L, N, H] in x's dtype.
    """
    wide = _at_least_float32(x.dtype)
    half = x.shape[-1] // 2
    frequencies = base ** -(jnp.arange(half, dtype=wide) / half)
    angles = positions[..., None, None].astype(wide) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU, which Gemma was trained with (huggingface/transformers #29729)."""
    return jax.nn.gelu(x, approximate=True)


def embed(table: jax.Array, tokens: Integers, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of the embedding table times sqrt(D), the factor rounded to the activation dtype.

    Args:
      table: [V, D].
      tokens: [B, L] integers.
      dtype: of the result.

    Returns:
      [B, L, D].
    """
    factor = jnp.asarray(table.shape[1] ** 0.5, dtype)
    return jnp.take(table, tokens, axis=0).astype(dtype) * factor
