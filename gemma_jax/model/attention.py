"""Causal attention within segments: one mask for training, prefill and decode.

Shape legend: B batch, L queries, S keys, N query heads, K key/value heads, G query heads for each
key/value head, H head dim.
"""

import jax
import jax.numpy as jnp

from gemma_jax.model.ops import Integers
from gemma_jax.weights.product import precision


def attention_mask(
    query_positions: Integers, query_segments: Integers, key_positions: Integers, key_segments: Integers
) -> jax.Array:
    """True where a query may see a key: the same segment, and not later than the query.

    Segment 0 is padding: no token of a document sees it, and it sees only itself.

    Args:
      query_positions, query_segments: [B, L] integers.
      key_positions, key_segments: [B, S] integers.

    Returns:
      [B, L, S] booleans.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    not_later = key_positions[:, None, :] <= query_positions[:, :, None]
    return jnp.asarray(same & not_later)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with the softmax in float32. The reference for every kernel.

    Args:
      q: [B, L, N, H], already scaled.
      k, v: [B, S, K, H] with K a divisor of N.
      mask: [B, L, S] booleans. A query that may see nothing gets the mean of all values.

    Returns:
      [B, L, N, H] in q's dtype.
    """
    B, L, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, L, K, N // K, H)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(
        "BLKGH,BSKH->BKGLS", grouped, k, precision=precision(q.dtype), preferred_element_type=wide
    )
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGLS,BSKH->BLKGH", weights, v, precision=precision(q.dtype))
    return out.reshape(B, L, N, H)
