"""Prefill and decode as pure functions of a batch of slots.

A slot is a row of the batch that one prompt occupies. Each slot has its own length, limit, end tokens, random
numbers and settings; when it is done, another prompt can take its place while the others go on. A slot keeps
the keys and values of its prompt until it is replaced, so further samples of a prompt need no prefill.

Shape legend: B slots, Q slots that begin together, R prompts of one prefill, P length of a chunk of prompts,
S positions in the cache of each slot, D embed, V stored vocabulary rows, E end tokens, T new tokens,
N alternatives of each token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.model import KVCache, Transformer
from gemma_jax.sampling.select import Options, likeliest, select
from gemma_jax.weights import Context

MAX_STEPS = 128  # new tokens of a slot in one call of `decode`


class SlotSettings(NamedTuple):
    """How the tokens of each slot are chosen, and when they end. Of slots that begin together B is Q."""

    prompt_lengths: jax.Array  # [B] int32
    limits: jax.Array  # [B] int32: new tokens allowed
    end_tokens: jax.Array  # [B, E] int32: any of them ends the slot; -1 is padding
    random_ids: jax.Array  # [B, 3] uint32: seed, index of the prompt, index of the sample
    adapters: jax.Array  # [B] int32: index of the adapter
    options: Options


class Prompts(NamedTuple):
    """Prompts in a cache, of which no new token is chosen yet."""

    cache: KVCache
    newest: jax.Array  # [R, D]: the final hidden state of each prompt's last token


class Slots(NamedTuple):
    """The state of a batch between two calls of `refill`, `free` and `decode`."""

    cache: KVCache
    newest: jax.Array  # [B, D]: as in Prompts; it does not change while a slot generates
    settings: SlotSettings
    last: jax.Array  # [B] int32: the newest token, not yet in the cache
    counts: jax.Array  # [B] int32: new tokens so far, the end token included
    ended: jax.Array  # [B] bool: an end token was sampled
    seen: jax.Array | None  # [B, V] bool: tokens of prompt and text; None if no slot has a repetition penalty

    @property
    def done(self) -> jax.Array:
        """[B] bool: slots that need no further token."""
        return self.ended | (self.counts >= self.settings.limits)


class NewTokens(NamedTuple):
    """What one call adds: as many of a slot's columns are valid as its count grew by."""

    tokens: jax.Array  # [B, T] int32
    log_probs: jax.Array  # [B, T] float32, nats
    top_tokens: jax.Array  # [B, T, N] int32: the likeliest tokens, in order
    top_log_probs: jax.Array  # [B, T, N] float32


def prefill(
    model: Transformer,
    tokens: jax.Array,
    start: jax.Array | int,
    lengths: jax.Array,
    adapters: jax.Array,
    previous: Prompts | None = None,
    *,
    size: int = 0,
) -> Prompts:
    """Writes one chunk of each prompt to a cache.

    Long prompts are prefilled in several chunks, so that the memory of activations does not grow with their
    length (`generate.prefill_chunk`).

    Args:
      model: a Transformer.
      tokens: [R, P] tokens of the prompts from position `start` on, padded at the end.
      start: Integer scalar, the position of the chunk's first token.
      lengths: [R] lengths of the whole prompts; 0 in rows that hold none.
      adapters: [R] indices of the adapters.
      previous: What the call for the chunk before returned; None for the first chunk.
      size: S of the cache that the first call makes.
    """
    R, P = tokens.shape
    cache, newest = previous or _no_prompts(model, R, size)
    positions = jnp.broadcast_to(start + jnp.arange(P, dtype=jnp.int32), (R, P))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    context = Context(adapters=adapters, sampling=True)
    hidden, cache = model.extend(cache, tokens, positions, segments, context, empty=previous is None)
    last = lengths - 1 - start  # index in the chunk of the prompt's last token
    at_last = jnp.take_along_axis(hidden, jnp.clip(last, 0, P - 1)[:, None, None], axis=1)[:, 0]
    ends_here = (last >= 0) & (last < P)
    return Prompts(cache, jnp.where(ends_here[:, None], at_last, newest))


def _no_prompts(model: Transformer, rows: int, size: int) -> Prompts:
    cache = KVCache.empty(model.config, rows, size, model.dtype, model.mesh)
    return Prompts(cache, jnp.zeros((rows, model.config.embed_dim), model.dtype))


def empty_slots(model: Transformer, settings: SlotSettings, seen: jax.Array | None, *, size: int) -> Slots:
    """Returns slots with nothing in a cache of `size` positions; the settings must have limits of 0."""
    zeros = jnp.zeros(len(settings.limits), jnp.int32)
    return Slots(*_no_prompts(model, len(zeros), size), settings, zeros, zeros, zeros > 0, seen)


def begin(
    model: Transformer, prompts: Prompts, settings: SlotSettings, seen: jax.Array | None, *, top: int = 0
) -> tuple[Slots, NewTokens]:
    """Makes a slot of each prompt, and chooses its first token.

    Args:
      model: a Transformer.
      prompts: Q prompts.
      settings: Settings of the Q slots. One without a prompt must have limit 0.
      seen: [Q, V] bool, the tokens of each prompt; None if no slot has a repetition penalty.
      top: N.
    """
    zeros = jnp.zeros(len(settings.limits), jnp.int32)
    slots = Slots(*prompts, settings, zeros, zeros, zeros > 0, seen)
    logits = model.logits(prompts.newest, Context(adapters=settings.adapters, sampling=True))
    slots, first = _with_next_token(slots, logits, _keys(settings), ~slots.done, top)
    return slots, jax.tree.map(lambda x: x[:, None], first)


def refill(
    model: Transformer,
    slots: Slots,
    prompts: Prompts | None,
    sources: jax.Array,
    rows: jax.Array,
    settings: SlotSettings,
    seen: jax.Array | None,
    *,
    top: int = 0,
) -> tuple[Slots, NewTokens]:
    """Replaces some slots by new ones, as `begin` makes them. Several may begin with the same prompt.

    Args:
      model: a Transformer.
      slots: B slots.
      prompts: The new prompts; None takes those that slots began with, done or not.
      sources: [Q] index of each new slot's prompt in `prompts`, or of the slot that has the prompt.
      rows: [Q] indices of the slots that are replaced. A new slot whose index is B or larger is dropped.
      settings, seen, top: as `begin` takes them.
    """
    found = Prompts(slots.cache, slots.newest) if prompts is None else prompts
    cache = found.cache.beginnings(sources, settings.prompt_lengths)
    new, first = begin(model, Prompts(cache, found.newest[sources]), settings, seen, top=top)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    cache = slots.cache.with_rows(new.cache, rows)
    return Slots(cache, *jax.tree.map(put, slots[1:], new[1:])), first


def free(slots: Slots, chosen: jax.Array) -> Slots:
    """Returns `slots` with those where `chosen` [B] is true marked as done."""
    limits = jnp.where(chosen, slots.counts, slots.settings.limits)
    return slots._replace(settings=slots.settings._replace(limits=limits))


def decode(
    model: Transformer,
    slots: Slots,
    steps: jax.Array,
    *,
    top: int = 0,
) -> tuple[Slots, NewTokens]:
    """Generates up to `steps` more tokens in every slot that is not done.

    Args:
      model: a Transformer.
      slots: As `begin`, `refill` or an earlier `decode` returned them.
      steps: Integer scalar, at most MAX_STEPS.
      top: N.
    """
    B = slots.last.shape[0]
    keys, context = _keys(slots.settings), Context(adapters=slots.settings.adapters, sampling=True)
    Carry = tuple[jax.Array, Slots, NewTokens]

    def unfinished(carry: Carry) -> jax.Array:
        step, slots, _ = carry
        return (step < steps) & ~jnp.all(slots.done)

    def body(carry: Carry) -> Carry:
        step, slots, new = carry
        # Slots that are done are treated as padding, which writes nothing to their part of the cache.
        segments = (~slots.done).astype(jnp.int32)[:, None]
        positions = slots.cache.lengths[:, None]
        hidden, cache = model.extend(slots.cache, slots.last[:, None], positions, segments, context)
        slots = slots._replace(cache=cache)
        logits = model.logits(hidden[:, 0], context)
        slots, chosen = _with_next_token(slots, logits, keys, ~slots.done, top)
        new = jax.tree.map(lambda all, one: all.at[:, step].set(one), new, chosen)
        return step + 1, slots, new

    N = min(top, model.config.vocab_rows)
    new = NewTokens(
        *(jnp.zeros((B, MAX_STEPS), dtype) for dtype in (jnp.int32, jnp.float32)),
        *(jnp.zeros((B, MAX_STEPS, N), dtype) for dtype in (jnp.int32, jnp.float32)),
    )
    _, slots, new = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), slots, new))
    return slots, new


def _keys(settings: SlotSettings) -> jax.Array:
    """Returns [B] random keys that depend only on the seed and the indices of prompt and sample."""

    def key(ids: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(ids[0]), ids[1]), ids[2])

    return jax.vmap(key)(settings.random_ids)


def _with_next_token(
    slots: Slots, logits: jax.Array, keys: jax.Array, live: jax.Array, top: int
) -> tuple[Slots, NewTokens]:
    """Adds one token to the slots that are live [B]; the tokens [B] of the other slots mean nothing."""
    settings, seen = slots.settings, slots.seen
    keys = jax.vmap(jax.random.fold_in)(keys, slots.counts)
    chosen, log_probs = select(logits, keys, settings.options, seen)
    is_end = jnp.any(chosen[:, None] == settings.end_tokens, axis=1)
    if seen is not None:  # what is marked for a slot that is not live is never read
        seen = seen.at[jnp.arange(len(seen)), chosen].set(True)
    slots = slots._replace(
        last=jnp.where(live, chosen, slots.last),
        counts=slots.counts + live,
        ended=slots.ended | (live & is_end),
        seen=seen,
    )
    top_tokens, top_log_probs = likeliest(logits, top)
    return slots, NewTokens(
        chosen, log_probs.astype(jnp.float32), top_tokens, top_log_probs.astype(jnp.float32)
    )
