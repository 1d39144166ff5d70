"""Choosing the next token: greedy, temperature, top-k and top-p, all combined.

Shape legend: B batch, V stored vocabulary rows.
"""

import jax
import jax.numpy as jnp


def keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """[B, V] with -inf below the k-th largest logit of each row; k = 0 keeps all. Ties stay together."""
    V = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    place = jnp.where(top_k == 0, V, jnp.clip(top_k, 1, V)) - 1
    threshold = jnp.take_along_axis(descending, place[:, None], axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """[B, V] with -inf outside the smallest set of likeliest tokens that holds probability p.

    The set always holds the likeliest token (Holtzman et al., 2020). Ties stay together.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p[:, None]) | (before == 0) | (top_p[:, None] >= 1)
    threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def select(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row.

    The logits are divided by the temperature, then cut to the top k, then to the top p of what is left.
    A row of temperature 0 takes its likeliest token. Every setting is an array, so none causes a
    compilation.

    Args:
      logits: [B, V] float32, -inf where a token may not be chosen.
      keys: [B] random keys, one a row, so that a row's choice does not depend on its batch.
      temperature, top_p: [B] floats.
      top_k: [B] integers.

    Returns:
      tokens [B] int32, and their log-probability [B] under the model's own distribution (temperature 1,
      nothing cut), in nats.
    """

    def sample(_: None) -> jax.Array:
        # Divided by a temperature next to 0, positive logits would all be infinite: so from the largest down.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled /= jnp.where(temperature > 0, temperature, 1)[:, None]
        # A product with the inverse, which is 0 for the largest temperatures, makes -inf a NaN.
        scaled = jnp.where(jnp.isneginf(logits), -jnp.inf, scaled)
        scaled = jax.lax.cond(jnp.any(top_k > 0), lambda x: keep_top_k(x, top_k), lambda x: x, scaled)
        scaled = jax.lax.cond(jnp.any(top_p < 1), lambda x: keep_top_p(x, top_p), lambda x: x, scaled)
        sampled = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jax.lax.cond(jnp.any(temperature > 0), sample, lambda _: greedy, None)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)
