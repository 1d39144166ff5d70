"""Choice of the next token: greedy, or sampled with temperature, top-k and top-p together.

Shape legend: B batch, V stored vocabulary rows.
"""

import jax
import jax.numpy as jnp


def keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sets logits [B, V] below each row's k-th largest to -inf; k = 0 keeps all. Ties are kept together."""
    V = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    place = jnp.where(top_k == 0, V, jnp.clip(top_k, 1, V)) - 1
    threshold = jnp.take_along_axis(descending, place[:, None], axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets the logits [B, V] outside the smallest set of likeliest tokens with total probability p to -inf.

    The set always contains the likeliest token (Holtzman et al., 2020). Ties are kept together.
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
    """Chooses the next token of each row.

    The logits are divided by the temperature, then restricted to the top k, then to the top p of what
    remains. A row with temperature 0 takes its likeliest token. Every setting is an array, so a new value
    needs no compilation.

    Args:
      logits: [B, V] float32, -inf where a token may not be chosen.
      keys: [B] random keys, one per row, so that a row's choice does not depend on its batch.
      temperature, top_p: [B] floats.
      top_k: [B] integers.

    Returns:
      tokens [B] int32, and their log-probability [B] under the model's own distribution (temperature 1,
      no top k or top p), in nats.
    """

    def sample(_: None) -> jax.Array:
        # Division by a temperature close to 0 would make every positive logit infinite. So the largest logit
        # is subtracted first.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled /= jnp.where(temperature > 0, temperature, 1)[:, None]
        # If the division is compiled as a multiplication by the inverse, which is 0 for the largest
        # temperatures, -inf becomes NaN. This restores the -inf.
        scaled = jnp.where(jnp.isneginf(logits), -jnp.inf, scaled)
        scaled = jax.lax.cond(jnp.any(top_k > 0), lambda x: keep_top_k(x, top_k), lambda x: x, scaled)
        scaled = jax.lax.cond(jnp.any(top_p < 1), lambda x: keep_top_p(x, top_p), lambda x: x, scaled)
        sampled = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jax.lax.cond(jnp.any(temperature > 0), sample, lambda _: greedy, None)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)
