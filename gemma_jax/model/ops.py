"""The pure functions of the Gemma decoder.

Shape legend: B batch, L length, D embed, N heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

IntArray = jax.Array | np.ndarray


def _at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Returns x / rms(x) * (1 + scale) over the last axis, computed in float32 (Zhang and Sennrich, 2019).

    Gemma stores the scale minus one, so that zeros mean "do not scale". The mean of squares, the root
    and the product stay in float32; only the result is cast (huggingface/transformers #29402).

    Args:
      x: [..., D].
      scale: [D].
      epsilon: A constant that is added to the mean square.

    Returns:
      [..., D] in x's dtype.
    """
    x_wide = x.astype(_at_least_float32(x.dtype))
    mean_square = jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True)
    return (x_wide * jax.lax.rsqrt(mean_square + epsilon) * (1 + scale.astype(x_wide.dtype))).astype(x.dtype)


@jax.custom_vjp
def unfused(x: jax.Array) -> jax.Array:
    """Returns x unchanged, behind an optimization barrier.

    The barrier stops XLA from fusing the computation of x into the following matmul, where it would be
    recomputed for every tile.
    """
    return jax.lax.optimization_barrier(x)


# The gradient has no barrier: one in the backward pass as well would cost the 7B a third of the gain.
unfused.defvjp(lambda x: (unfused(x), None), lambda _, d_out: (d_out,))


def rope(x: jax.Array, positions: IntArray, base: float) -> jax.Array:
    """Applies rotary position embedding in the split-halves convention (Su et al., 2021).

    Angles and rotation are computed in at least float32, whatever the dtype of the activations: bfloat16 does
    not distinguish position 4095 from 4096 (huggingface/transformers #29285).

    Args:
      x: [B, L, N, H].
      positions: [B, L] integers.
      base: The wavelengths range from 2 pi to 2 pi * base.

    Returns:
      [B, L, N, H] in x's dtype.
    """
    wide_dtype = _at_least_float32(x.dtype)
    half = x.shape[-1] // 2
    frequencies = base ** -(jnp.arange(half, dtype=wide_dtype) / half)
    angles = positions[..., None, None].astype(wide_dtype) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(wide_dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@jax.custom_vjp
def gated_gelu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns gelu(gate) * up, computed in at least float32.

    GELU is the tanh approximation, which Gemma was trained with (huggingface/transformers #29729), and
    (1 + tanh(u)) / 2 is sigmoid(2 u). The gradient is written by hand: on TPU a whole feed-forward layer then
    takes a tenth less time (benchmarks/LOG.md).

    Args:
      gate, up: [..., F].

    Returns:
      [..., F] in their dtype.
    """
    gate_wide = gate.astype(_at_least_float32(gate.dtype))
    return (gate_wide * _sigmoid_and_slope(gate_wide)[0] * up.astype(gate_wide.dtype)).astype(gate.dtype)


def _sigmoid_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns gelu(x) / x, which is sigmoid(s x + c x^3), and the derivative of the sigmoid's argument."""
    slope = 2 * math.sqrt(2 / math.pi)
    cubic = slope * 0.044715 * jnp.square(x)
    return jax.nn.sigmoid(x * (slope + cubic)), slope + 3 * cubic


def _gated_gelu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return gated_gelu(gate, up), (gate, up)


def _gated_gelu_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    gate_wide = gate.astype(_at_least_float32(gate.dtype))
    d_wide = d_out.astype(gate_wide.dtype)
    sigmoid, slope = _sigmoid_and_slope(gate_wide)
    d_up = d_wide * (gate_wide * sigmoid)
    d_gate = d_wide * up.astype(gate_wide.dtype) * (sigmoid + sigmoid * (1 - sigmoid) * (gate_wide * slope))
    # The barrier makes the preceding matmul compute both gradients once. Without it each of the four matmuls
    # that follow would recompute them.
    return jax.lax.optimization_barrier((d_gate.astype(gate.dtype), d_up.astype(up.dtype)))


gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)
