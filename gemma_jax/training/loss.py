"""Next-token cross entropy over a large vocabulary, in blocks.

A float32 [B, L, V] tensor of logits is 8.4 GB for one row of 8192 tokens, so logits exist for one
block of positions at a time. The forward pass of the loss forms its gradients too, while a block's
logits are at hand: the backward pass only scales them, and the vocabulary is gone through once.

Shape legend: B batch, L length, b block, D embed, V stored vocabulary rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from gemma_jax.model import mask_padding_rows
from gemma_jax.model.ops import Integers
from gemma_jax.sharding import constrain
from gemma_jax.weights.product import precision, product


class LossSettings(NamedTuple):
    """What the loss is computed with; static under jit."""

    vocab_size: int
    block: int
    z_loss: float
    mesh: Mesh


def _blocks(x: jax.Array | np.ndarray, block: int) -> jax.Array:
    """[B, L, ...] -> [blocks, B, b, ...], zeros filling the last block."""
    B, L = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -L % block)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)


def _whole(blocks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_blocks`."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])[:, :length]


def _block_logits(hidden: jax.Array, table: jax.Array, settings: LossSettings) -> jax.Array:
    """[B, b, D], [V, D] -> [B, b, V] in at least float32."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = product(hidden, table.T, dtype=wide)
    return mask_padding_rows(
        constrain(logits, ("batch", "length", "vocab"), settings.mesh), settings.vocab_size
    )


def _target_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def token_log_probs(
    hidden: jax.Array, embedding: jax.Array, targets: Integers, settings: LossSettings
) -> jax.Array:
    """Log-probability of each target, in nats.

    Args:
      hidden: [B, L, D] after the final norm.
      embedding: [V, D].
      targets: [B, L] integers below vocab_size.
      settings: block size and mesh.

    Returns:
      [B, L] in at least float32.
    """
    table = embedding.astype(hidden.dtype)

    def body(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        h, t = block
        logits = _block_logits(h, table, settings)
        return None, _target_logits(logits, t) - jax.nn.logsumexp(logits, axis=-1)

    block = min(settings.block, hidden.shape[1])
    _, log_probs = lax.scan(body, None, (_blocks(hidden, block), _blocks(targets, block)))
    return _whole(log_probs, hidden.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def next_token_loss(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: Integers,
    weights: jax.Array | np.ndarray,
    settings: LossSettings,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the cross entropy of each target, in nats.

    Args:
      hidden: [B, L, D] after the final norm.
      embedding: [V, D].
      targets: [B, L] integers below vocab_size.
      weights: [B, L]; 0 leaves a position out.
      settings: vocabulary size, block size, z-loss and mesh.

    Returns:
      The sum to be minimised: cross entropy plus z_loss times the square of the log-partition
      (PaLM, 2022), which keeps logits from drifting; and the cross entropy alone, for reporting,
      through which no gradient flows.
    """
    return _loss_and_gradients(hidden, embedding, targets, weights, settings, with_gradients=False)[0]


def _loss_and_gradients(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: Integers,
    weights: jax.Array | np.ndarray,
    settings: LossSettings,
    with_gradients: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    table = embedding.astype(hidden.dtype)

    Sums = tuple[jax.Array, jax.Array, jax.Array | None]

    def body(sums: Sums, block: tuple[jax.Array, ...]) -> tuple[Sums, jax.Array | None]:
        h, t, w = block
        total, reported, d_table = sums
        logits = _block_logits(h, table, settings)
        # The exponentials serve the log-partition and the gradient.
        largest = jnp.max(logits, axis=-1, keepdims=True)
        exponentials = jnp.exp(logits - largest)
        partition = jnp.sum(exponentials, axis=-1, keepdims=True)
        log_partition = (jnp.log(partition) + largest)[..., 0]
        cross_entropy = jnp.sum(w * (log_partition - _target_logits(logits, t)))
        total += cross_entropy + settings.z_loss * jnp.sum(w * jnp.square(log_partition))
        if d_table is None:
            return (total, reported + cross_entropy, None), None
        is_target = jnp.arange(logits.shape[-1]) == t[..., None]
        d_logits = (1 + 2 * settings.z_loss * log_partition[..., None]) * exponentials / partition - is_target
        d_logits = (w[..., None] * d_logits).astype(h.dtype)
        d_h = product(d_logits, table)
        # As two matrices, for the reason that weights.product gives.
        d_table += lax.dot(
            d_logits.reshape(-1, d_logits.shape[-1]).T,
            h.reshape(-1, h.shape[-1]),
            precision=precision(h.dtype),
            preferred_element_type=wide,
        )
        return (total, reported + cross_entropy, d_table), d_h

    block = min(settings.block, hidden.shape[1])
    start = (
        jnp.zeros((), wide),
        jnp.zeros((), wide),
        jnp.zeros(embedding.shape, wide) if with_gradients else None,
    )
    blocks = tuple(_blocks(x, block) for x in (hidden, targets, weights.astype(wide)))
    (total, reported, d_table), d_hidden = lax.scan(body, start, blocks)
    if d_table is None or d_hidden is None:
        return (total, reported), None
    return (total, reported), (_whole(d_hidden, hidden.shape[1]), d_table.astype(embedding.dtype))


def _forward(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: Integers,
    weights: jax.Array | np.ndarray,
    settings: LossSettings,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    return _loss_and_gradients(hidden, embedding, targets, weights, settings, with_gradients=True)


def _backward(
    settings: LossSettings, gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_embedding = gradients
    scale, _ = cotangents
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_embedding * scale).astype(d_embedding.dtype),
        None,
        None,
    )


next_token_loss.defvjp(_forward, _backward)
