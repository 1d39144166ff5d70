"""Prefill and decode as pure functions of a batch of slots.

A slot is a row of the batch that one prompt occupies. Each slot has its own length, limit, end tokens, random
numbers and settings; when it is done, another prompt can take its place while the others go on.

Shape legend: B slots, R prompts of one prefill, P length of a chunk of prompts, S positions in the cache of
each slot, E end tokens, T new tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.model import KVCache, Transformer
from gemma_jax.sampling.select import select
from gemma_jax.weights import Context

MAX_STEPS = 128  # new tokens of a slot in one call of `decode`


class SlotSettings(NamedTuple):
    """How the tokens of each slot are chosen, and when they end. During a prefill B is R."""

    limits: jax.Array  # [B] int32: new tokens allowed
    end_tokens: jax.Array  # [B, E] int32: any of them ends the slot; -1 is padding
    random_ids: jax.Array  # [B, 3] uint32: seed, index of the prompt, index of the sample
    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32
    top_p: jax.Array  # [B] float32
    adapters: jax.Array  # [B] int32: index of the adapter


class Slots(NamedTuple):
    """The state of a batch between two calls of `prefill`, `insert`, `free` and `decode`."""

    cache: KVCache
    settings: SlotSettings
    last: jax.Array  # [B] int32: the newest token, not yet in the cache
    counts: jax.Array  # [B] int32: new tokens so far, the end token included
    ended: jax.Array  # [B] bool: an end token was sampled

    @property
    def done(self) -> jax.Array:
        """[B] bool: slots that need no further token."""
        return self.ended | (self.counts >= self.settings.limits)


class NewTokens(NamedTuple):
    """What one call adds: as many of a slot's columns are valid as its count grew by."""

    tokens: jax.Array  # [B, T] int32
    log_probs: jax.Array  # [B, T] float32, nats


def prefill(
    model: Transformer,
    tokens: jax.Array,
    start: jax.Array | int,
    lengths: jax.Array,
    settings: SlotSettings,
    previous: tuple[Slots, NewTokens] | None = None,
    *,
    size: int = 0,
) -> tuple[Slots, NewTokens]:
    """Writes one chunk of each prompt to the cache and samples the first token of prompts that end in it.

    Long prompts are prefilled in several chunks, so that the memory of activations does not grow with their
    length (`generate.prefill_chunk`).

    Args:
      model: a Transformer.
      tokens: [R, P] tokens of the prompts from position `start` on, padded at the end.
      start: Integer scalar, the position of the chunk's first token.
      lengths: [R] lengths of the whole prompts. A slot that stays empty has length 0 and must have limit 0.
      settings: Settings of the R slots.
      previous: What the call for the chunk before returned; None for the first chunk.
      size: S of the cache that the first call makes.
    """
    R, P = tokens.shape
    slots, no_tokens = previous or _no_slots(model, R, size, settings)
    positions = jnp.broadcast_to(start + jnp.arange(P, dtype=jnp.int32), (R, P))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    context = Context(adapters=settings.adapters, sampling=True)
    hidden, cache = model.extend(slots.cache, tokens, positions, segments, context, empty=previous is None)
    last_index = lengths - 1 - start  # index in the chunk of the prompt's last token
    newest = jnp.take_along_axis(hidden, jnp.clip(last_index, 0, P - 1)[:, None, None], axis=1)[:, 0]
    live = ~slots.done & (last_index >= 0) & (last_index < P)
    slots = slots._replace(cache=cache)
    slots, first = _with_next_token(slots, model.logits(newest, context), _keys(settings), live)
    return slots, jax.tree.map(lambda old, x: jnp.where(live[:, None], x[:, None], old), no_tokens, first)


def _no_slots(model: Transformer, count: int, size: int, settings: SlotSettings) -> tuple[Slots, NewTokens]:
    """Slots with nothing in the cache, and no new tokens."""
    cache = KVCache.empty(model.config, count, size, model.dtype, model.mesh)
    zeros = jnp.zeros(count, jnp.int32)
    slots = Slots(cache, settings, zeros, zeros, jnp.zeros(count, bool))
    return slots, NewTokens(zeros[:, None], jnp.zeros((count, 1), jnp.float32))


def insert(slots: Slots, new: Slots, rows: jax.Array) -> Slots:
    """Returns `slots` with those at the indices `rows` [R] replaced by new ones, whose caches may be shorter.

    A new slot whose index is B or larger is dropped.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    return Slots(
        slots.cache.with_rows(new.cache, rows),
        jax.tree.map(put, slots.settings, new.settings),
        put(slots.last, new.last),
        put(slots.counts, new.counts),
        put(slots.ended, new.ended),
    )


def free(slots: Slots, chosen: jax.Array) -> Slots:
    """Returns `slots` with those where `chosen` [B] is true marked as done."""
    limits = jnp.where(chosen, slots.counts, slots.settings.limits)
    return slots._replace(settings=slots.settings._replace(limits=limits))


def decode(model: Transformer, slots: Slots, steps: jax.Array) -> tuple[Slots, NewTokens]:
    """Generates up to `steps` more tokens in every slot that is not done.

    Args:
      model: a Transformer.
      slots: As `prefill`, `insert` or an earlier `decode` returned them.
      steps: Integer scalar, at most MAX_STEPS.
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
        slots, chosen = _with_next_token(slots, model.logits(hidden[:, 0], context), keys, ~slots.done)
        new = jax.tree.map(lambda all, one: all.at[:, step].set(one), new, chosen)
        return step + 1, slots, new

    new = NewTokens(jnp.zeros((B, MAX_STEPS), jnp.int32), jnp.zeros((B, MAX_STEPS), jnp.float32))
    _, slots, new = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), slots, new))
    return slots, new


def _keys(settings: SlotSettings) -> jax.Array:
    """Returns [B] random keys that depend only on the seed and the indices of prompt and sample."""

    def key(ids: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(ids[0]), ids[1]), ids[2])

    return jax.vmap(key)(settings.random_ids)


def _with_next_token(
    slots: Slots, logits: jax.Array, keys: jax.Array, live: jax.Array
) -> tuple[Slots, NewTokens]:
    """Adds one token to the slots that are live [B]; the tokens [B] of the other slots mean nothing."""
    settings = slots.settings
    keys = jax.vmap(jax.random.fold_in)(keys, slots.counts)
    chosen, log_probs = select(logits, keys, settings.temperature, settings.top_k, settings.top_p)
    is_end = jnp.any(chosen[:, None] == settings.end_tokens, axis=1)
    slots = slots._replace(
        last=jnp.where(live, chosen, slots.last),
        counts=slots.counts + live,
        ended=slots.ended | (live & is_end),
    )
    return slots, NewTokens(chosen, log_probs.astype(jnp.float32))
