"""Prefill and decode as pure functions of a batch of slots.

A slot is a row of the batch that one prompt occupies. Each slot has its own length, limit, end tokens, random
numbers and settings; when it is done, another prompt can take its place while the others go on.

Shape legend: B slots, R prompts of one prefill, P prompt length, S cache slots of a row, E end tokens, T new
tokens, D embed, V stored vocabulary rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.model import KVCache, Transformer
from gemma_jax.sampling.select import select
from gemma_jax.weights import Context

MAX_STEPS = 128  # new tokens of one dispatch


class SlotSettings(NamedTuple):
    """How the tokens of each slot are chosen, and when they end."""

    limits: jax.Array  # [B] int32: new tokens allowed
    end_tokens: jax.Array  # [B, E] int32: any of them ends the slot; -1 is none
    draws: jax.Array  # [B, 3] uint32: seed, number of the prompt and of the sample
    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32
    top_p: jax.Array  # [B] float32
    adapters: jax.Array  # [B] int32: the number of the adapter


class Slots(NamedTuple):
    """The state of a batch between two dispatches."""

    cache: KVCache
    settings: SlotSettings
    last: jax.Array  # [B] int32: the newest token, not yet in the cache
    counts: jax.Array  # [B] int32: new tokens so far, the end token included
    ended: jax.Array  # [B] bool: an end token came

    @property
    def done(self) -> jax.Array:
        """[B] bool: slots that need no further token."""
        return self.ended | (self.counts >= self.settings.limits)


class NewTokens(NamedTuple):
    """What one dispatch adds: a slot's count says how many of its columns are valid."""

    tokens: jax.Array  # [B, T] int32
    log_probs: jax.Array  # [B, T] float32, nats


def prefill(
    model: Transformer,
    tokens: jax.Array,
    start: jax.Array | int,
    lengths: jax.Array,
    settings: SlotSettings,
    so_far: tuple[Slots, NewTokens] | None = None,
    layers: Sequence[nnx.State] | None = None,
    *,
    size: int = 0,
) -> tuple[Slots, NewTokens]:
    """A chunk of prompts into the cache, and the first new token of those that end in it.

    Long prompts come in several chunks, so that the memory of everything but the cache does not grow with
    them (see `prefill_chunk`).

    Args:
      model: a Transformer.
      tokens: [R, P] of the prompts from position `start` on, padded at the end.
      start: integer scalar.
      lengths: [R], of the whole prompts; 0 for a slot that stays empty, whose limit is 0 too.
      settings: of the R slots.
      so_far: what the chunk before returned; None for the first chunk.
      layers: as `Transformer.extend` takes them.
      size: S of the cache that the first chunk makes.
    """
    R, P = tokens.shape
    slots, new = so_far or _empty(model, R, size, settings)
    positions = jnp.broadcast_to(start + jnp.arange(P, dtype=jnp.int32), (R, P))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    context = Context(adapters=settings.adapters)
    hidden, cache = model.extend(
        slots.cache, tokens, positions, segments, layers, context, empty=so_far is None
    )
    place = lengths - 1 - start  # of the prompt's last token in the chunk
    newest = jnp.take_along_axis(hidden, jnp.clip(place, 0, P - 1)[:, None, None], axis=1)[:, 0]
    live = ~slots.done & (place >= 0) & (place < P)
    slots = slots._replace(cache=cache)
    slots, first = _with_next_token(slots, model.logits(newest, context), _keys(settings), live)
    return slots, jax.tree.map(lambda old, new: jnp.where(live[:, None], new[:, None], old), new, first)


def _empty(model: Transformer, rows: int, size: int, settings: SlotSettings) -> tuple[Slots, NewTokens]:
    """Slots with nothing in the cache, and no new tokens."""
    cache = KVCache.empty(model.config, rows, size, model.dtype, model.mesh)
    zeros = jnp.zeros(rows, jnp.int32)
    slots = Slots(cache, settings, zeros, zeros, jnp.zeros(rows, bool))
    return slots, NewTokens(zeros[:, None], jnp.zeros((rows, 1), jnp.float32))


def insert(slots: Slots, new: Slots, rows: jax.Array) -> Slots:
    """`slots` with those at `rows` [R] replaced by new ones, whose caches may be shorter.

    A row number out of range leaves its new slot out.
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


def free(slots: Slots, rows: jax.Array) -> Slots:
    """`slots` of which those where `rows` [B] is true are done."""
    limits = jnp.where(rows, slots.counts, slots.settings.limits)
    return slots._replace(settings=slots.settings._replace(limits=limits))


def decode(
    model: Transformer, slots: Slots, steps: jax.Array, layers: Sequence[nnx.State] | None = None
) -> tuple[Slots, NewTokens]:
    """`steps` more tokens in every slot that is not done, at most MAX_STEPS.

    Args:
      model: a Transformer.
      slots: of a prefill, or of a decode before.
      steps: integer scalar.
      layers: as `Transformer.extend` takes them.
    """
    B = slots.last.shape[0]
    keys, context = _keys(slots.settings), Context(adapters=slots.settings.adapters)
    Carry = tuple[jax.Array, Slots, NewTokens]

    def unfinished(carry: Carry) -> jax.Array:
        step, slots, _ = carry
        return (step < steps) & ~jnp.all(slots.done)

    def body(carry: Carry) -> Carry:
        step, slots, new = carry
        # Done slots run along as padding: they write nothing into their part of the cache.
        segments = (~slots.done).astype(jnp.int32)[:, None]
        positions = slots.cache.lengths[:, None]
        hidden, cache = model.extend(slots.cache, slots.last[:, None], positions, segments, layers, context)
        slots = slots._replace(cache=cache)
        slots, chosen = _with_next_token(slots, model.logits(hidden[:, 0], context), keys, ~slots.done)
        new = jax.tree.map(lambda all, one: all.at[:, step].set(one), new, chosen)
        return step + 1, slots, new

    new = NewTokens(jnp.zeros((B, MAX_STEPS), jnp.int32), jnp.zeros((B, MAX_STEPS), jnp.float32))
    _, slots, new = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), slots, new))
    return slots, new


def _keys(settings: SlotSettings) -> jax.Array:
    """[B] random keys, which depend on nothing but seed, prompt number and sample number."""

    def key(draw: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(draw[0]), draw[1]), draw[2])

    return jax.vmap(key)(settings.draws)


def _with_next_token(
    slots: Slots, logits: jax.Array, keys: jax.Array, live: jax.Array
) -> tuple[Slots, NewTokens]:
    """The slots with one more token in those that are live [B], and what was chosen, in arrays [B]."""
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
