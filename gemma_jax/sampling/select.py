"""Choice of the next token: greedy, or sampled with temperature, top-k, top-p and min-p together.

Shape legend: B batch, V stored vocabulary rows, K biased tokens, N alternatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

KEY_BITS = 32  # in a float32
BLOCK = 512  # tokens that are drawn from together


class Options(NamedTuple):
    """How the token of each row is chosen. Arrays, so that a new value needs no compilation.

    The biases are None if no row has any: then a step does not compute with them.
    """

    temperature: jax.Array  # [B] float32; 0 takes the likeliest token
    top_k: jax.Array  # [B] int32; 0 keeps all
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32
    penalty: jax.Array  # [B] float32: the repetition penalty; 1 is none
    bias_tokens: jax.Array | None = None  # [B, K] int32; V or more is padding
    biases: jax.Array | None = None  # [B, K] float32; -inf where a token may not be chosen


def adjusted(logits: jax.Array, options: Options, seen: jax.Array | None) -> jax.Array:
    """Returns logits [B, V] with the biases added, and the penalty applied to the tokens `seen` [B, V].

    The penalty divides positive logits and multiplies negative ones (CTRL; Keskar et al., 2019).
    """
    if options.bias_tokens is not None:
        rows = jnp.arange(len(logits))[:, None]
        logits = logits.at[rows, options.bias_tokens].add(options.biases, mode="drop")
    if seen is not None:
        penalty = options.penalty[:, None]
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    return logits


def keep_likeliest(
    logits: jax.Array, weights: jax.Array, limits: jax.Array, bits: int | None = None
) -> jax.Array:
    """Sets logits to -inf where the weights of the likelier tokens add up to their row's limit or more.

    Tokens with equal logits are kept or removed together, and the likeliest is always kept. With weights of
    1 this is top-k, with probabilities top-p (nucleus sampling; Holtzman et al., 2020).

    The result is that of sorting, which takes much longer: the smallest logit that is kept is found by
    bisection, a few bits at a time.

    Args:
      logits: [B, V] float32, at most 0.
      weights: [B, V], or any shape that broadcasts to it.
      limits: [B], above 0.
      bits: The bits that are found in one pass over the logits, a divisor of 32. If left out, 4 on TPU, where
        reading takes most of a pass (benchmarks/LOG.md), and 1 elsewhere.
    """
    distances = lax.bitcast_convert_type(jnp.abs(logits), jnp.int32)  # in the order of the absolute values

    def found(bits: int) -> jax.Array:
        def body(done: jax.Array, largest: jax.Array) -> jax.Array:
            found, shift = largest, KEY_BITS - bits * (done + 1)
            for step in range(1, 1 << bits):
                larger = largest | (step << shift)  # negative with the sign bit, which no distance has
                likelier = jnp.where(distances < larger[:, None], weights, 0)
                more = (larger > 0) & (jnp.sum(likelier, axis=-1) < limits)
                found = jnp.where(more, larger, found)
            return found

        return lax.fori_loop(0, KEY_BITS // bits, body, jnp.zeros(len(logits), jnp.int32))

    if bits is None:
        largest = lax.platform_dependent(tpu=lambda: found(4), default=lambda: found(1))
    else:
        largest = found(bits)
    return jnp.where(distances <= largest[:, None], logits, -jnp.inf)


def restricted(logits: jax.Array, options: Options) -> jax.Array:
    """Restricts logits [B, V], at most 0, to the top k, to the top p of what remains, and by min-p.

    Min-p keeps tokens with at least that share of the likeliest one's probability (Nguyen et al., 2024).
    """

    def top_k(logits: jax.Array) -> jax.Array:
        limits = jnp.where(options.top_k == 0, logits.shape[-1] + 1, options.top_k)
        return keep_likeliest(logits, jnp.ones((), jnp.int32), limits)

    def top_p(logits: jax.Array) -> jax.Array:
        limits = jnp.maximum(options.top_p, jnp.finfo(jnp.float32).tiny)
        limits = jnp.where(options.top_p < 1, limits, jnp.inf)
        return keep_likeliest(logits, jax.nn.softmax(logits, axis=-1), limits)

    logits = lax.cond(jnp.any(options.top_k > 0), top_k, lambda x: x, logits)
    logits = lax.cond(jnp.any(options.top_p < 1), top_p, lambda x: x, logits)
    return jnp.where(logits >= jnp.log(options.min_p)[:, None], logits, -jnp.inf)


def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns a random token [B] of the distribution that logits [B, V], at most 0, define.

    A block of the vocabulary is chosen, then a token in it. This needs two random numbers of a row, where
    Gumbel noise needs one of each token, which takes longer. With two, tokens of small
    probability are not lost in the resolution of one float32 over the whole vocabulary.
    """
    weights = jnp.exp(jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % BLOCK)), constant_values=-jnp.inf))
    weights = weights.reshape(len(logits), -1, BLOCK)
    of_block, of_token = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    block = _pick(of_block, jnp.sum(weights, axis=-1))
    return block * BLOCK + _pick(of_token, weights[jnp.arange(len(block)), block])


def _pick(keys: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns a random index [B], each with a probability in proportion to its weight in [B, N]."""
    ends = jnp.cumsum(weights, axis=-1)
    beyond = ends > (jax.vmap(jax.random.uniform)(keys) * ends[:, -1])[:, None]
    # The product may be rounded up to the sum; then no end is beyond it.
    return jnp.where(beyond[:, -1], jnp.argmax(beyond, axis=-1), jnp.argmax(weights, axis=-1))


def select(
    logits: jax.Array, keys: jax.Array, options: Options, seen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses the next token of each row.

    The biases, then the repetition penalty change the logits. These are divided by the temperature, and then
    restricted (`restricted`). A row with temperature 0 takes its likeliest token.

    Args:
      logits: [B, V], -inf where a token may not be chosen.
      keys: [B] random keys, one per row, so that a row's choice does not depend on its batch.
      options: The settings of the rows.
      seen: [B, V] bool: tokens that the penalty applies to; None if no row has a penalty.

    Returns:
      tokens [B] int32, and their log-probability [B] under the model's own distribution (temperature 1,
      no other option), in nats.
    """
    changed = adjusted(logits, options, seen)
    temperature = options.temperature

    def sample(_: None) -> jax.Array:
        # Division by a temperature close to 0 would make every positive logit infinite. So the largest logit
        # is subtracted first.
        scaled = (changed - jnp.max(changed, axis=-1, keepdims=True)).astype(jnp.float32)
        scaled /= jnp.where(temperature > 0, temperature, 1)[:, None]
        # If the division is compiled as a multiplication by the inverse, which is 0 for the largest
        # temperatures, -inf becomes NaN. This restores the -inf.
        scaled = jnp.where(jnp.isneginf(changed), -jnp.inf, scaled)
        sampled = draw(keys, restricted(scaled, options))
        return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)

    greedy = jnp.argmax(changed, axis=-1).astype(jnp.int32)
    tokens = lax.cond(jnp.any(temperature > 0), sample, lambda _: greedy, None)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the ids [B, N] of the likeliest tokens, and their log-probabilities [B, N], in nats.

    If the vocabulary has fewer than `count` tokens, N is their number; otherwise it is `count`.
    """
    values, tokens = lax.top_k(logits, min(count, logits.shape[-1]))
    return tokens.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
