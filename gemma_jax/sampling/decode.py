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
from gemma_jax.model.transformer import cache_dtype
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


class Said(NamedTuple):
    """The tokens of the prompts and texts of slots, in the forms that some setting needs; None in others."""

    seen: jax.Array | None = None  # [B, V] bool: which tokens occur, for a repetition penalty
    texts: jax.Array | None = None  # [B, context length] int32: the tokens in order, for guesses


class Slots(NamedTuple):
    """The state of a batch between two calls of `refill`, `free` and `decode`."""

    cache: KVCache
    newest: jax.Array  # [B, D]: as in Prompts; it does not change while a slot generates
    settings: SlotSettings
    last: jax.Array  # [B] int32: the newest token, not yet in the cache
    counts: jax.Array  # [B] int32: new tokens so far, the end token included
    ended: jax.Array  # [B] bool: an end token was sampled
    said: Said

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
    cache = KVCache.empty(model.config, rows, size, cache_dtype(model.compute, model.mesh), model.mesh)
    return Prompts(cache, jnp.zeros((rows, model.config.embed_dim), model.dtype))


def empty_slots(model: Transformer, settings: SlotSettings, said: Said, *, size: int) -> Slots:
    """Returns slots with nothing in a cache of `size` positions; the settings must have limits of 0."""
    zeros = jnp.zeros(len(settings.limits), jnp.int32)
    return Slots(*_no_prompts(model, len(zeros), size), settings, zeros, zeros, zeros > 0, said)


def begin(
    model: Transformer, prompts: Prompts, settings: SlotSettings, said: Said, *, top: int = 0
) -> tuple[Slots, NewTokens]:
    """Makes a slot of each prompt, and chooses its first token.

    Args:
      model: a Transformer.
      prompts: Q prompts.
      settings: Settings of the Q slots. One without a prompt must have limit 0.
      said: The tokens of the prompts.
      top: N.
    """
    zeros = jnp.zeros(len(settings.limits), jnp.int32)
    slots = Slots(*prompts, settings, zeros, zeros, zeros > 0, said)
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
    said: Said,
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
      settings, said, top: as `begin` takes them.
    """
    found = Prompts(slots.cache, slots.newest) if prompts is None else prompts
    cache = found.cache.beginnings(sources, settings.prompt_lengths)
    new, first = begin(model, Prompts(cache, found.newest[sources]), settings, said, top=top)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    cache = slots.cache.with_rows(new.cache, rows)
    return Slots(cache, *jax.tree.map(put, slots[1:], new[1:])), first


def free(slots: Slots, chosen: jax.Array) -> Slots:
    """Returns `slots` with those where `chosen` [B] is true marked as done."""
    limits = jnp.where(chosen, slots.counts, slots.settings.limits)
    return slots._replace(settings=slots.settings._replace(limits=limits))


def decode(
    model: Transformer, slots: Slots, steps: jax.Array, *, top: int = 0, guesses: int = 0
) -> tuple[Slots, NewTokens]:
    """Generates `steps` more tokens, or up to `guesses` more than that, in every slot that is not done.

    With guesses a step computes several tokens at once: the newest, and what followed the last time that the
    text had the newest two (prompt lookup decoding). Each token is then chosen as without guesses, from the
    logits after the tokens before it, until one differs from its guess. So the text is the same.

    Args:
      model: a Transformer.
      slots: As `begin`, `refill` or an earlier `decode` returned them. For guesses they have `said.texts`.
      steps: Integer scalar, at most MAX_STEPS.
      top: N.
      guesses: How many tokens each step guesses.
    """
    B, before = slots.last.shape[0], slots.counts
    rows, keys = jnp.arange(B), _keys(slots.settings)
    context = Context(adapters=slots.settings.adapters, sampling=True)
    Carry = tuple[Slots, NewTokens]

    def live(slots: Slots) -> jax.Array:
        return ~slots.done & (slots.counts < before + steps)

    def body(carry: Carry) -> Carry:
        slots, new = carry
        going, lengths, had = live(slots), slots.cache.lengths, slots.counts
        guessed = _guesses(slots, guesses)
        tokens = jnp.concatenate([slots.last[:, None], guessed], axis=1)
        positions = lengths[:, None] + jnp.arange(1 + guesses, dtype=jnp.int32)
        # Slots that are done are treated as padding, which writes nothing to their part of the cache.
        segments = jnp.broadcast_to(going[:, None], tokens.shape).astype(jnp.int32)
        hidden, cache = model.extend(slots.cache, tokens, positions, segments, context)
        logits = model.logits(hidden, context)
        for place in range(1 + guesses):
            column = jnp.where(going, slots.counts - before, new.tokens.shape[1])
            slots, chosen = _with_next_token(slots, logits[:, place], keys, going, top)
            new = jax.tree.map(
                lambda all, one, at=column: all.at[rows, at].set(one, mode="drop"), new, chosen
            )
            if place < guesses:
                going &= ~slots.done & (chosen.tokens == guessed[:, place])
        if guesses:  # what was guessed wrongly leaves the cache
            cache = cache.shortened(lengths + slots.counts - had)
        return slots._replace(cache=cache), new

    N, most = min(top, model.config.vocab_rows), MAX_STEPS + guesses
    new = NewTokens(
        *(jnp.zeros((B, most), dtype) for dtype in (jnp.int32, jnp.float32)),
        *(jnp.zeros((B, most, N), dtype) for dtype in (jnp.int32, jnp.float32)),
    )
    return jax.lax.while_loop(lambda carry: jnp.any(live(carry[0])), body, (slots, new))


def _guesses(slots: Slots, count: int) -> jax.Array:
    """Returns [B, count] tokens: what followed the last time that each slot's text had the newest two."""
    texts = slots.said.texts
    if texts is None or not count:
        return jnp.zeros((len(slots.last), 0), jnp.int32)
    newest = (slots.settings.prompt_lengths + slots.counts - 1)[:, None]
    before = jnp.take_along_axis(texts, newest - 1, axis=1)
    places = jnp.arange(texts.shape[1], dtype=jnp.int32)
    same = (texts == slots.last[:, None]) & (jnp.roll(texts, 1, axis=1) == before)
    found = jnp.max(jnp.where(same & (places > 0) & (places < newest), places, -1), axis=1, keepdims=True)
    following = found + 1 + jnp.arange(count, dtype=jnp.int32)
    return jnp.take_along_axis(texts, jnp.minimum(following, texts.shape[1] - 1), axis=1)


def _keys(settings: SlotSettings) -> jax.Array:
    """Returns [B] random keys that depend only on the seed and the indices of prompt and sample."""

    def key(ids: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(ids[0]), ids[1]), ids[2])

    return jax.vmap(key)(settings.random_ids)


def _with_next_token(
    slots: Slots, logits: jax.Array, keys: jax.Array, live: jax.Array, top: int
) -> tuple[Slots, NewTokens]:
    """Adds one token to the slots that are live [B]; the tokens [B] of the other slots mean nothing."""
    settings, (seen, texts) = slots.settings, slots.said
    keys = jax.vmap(jax.random.fold_in)(keys, slots.counts)
    chosen, log_probs = select(logits, keys, settings.options, seen)
    is_end = jnp.any(chosen[:, None] == settings.end_tokens, axis=1)
    rows = jnp.arange(len(chosen))
    if seen is not None:
        seen = seen.at[rows, jnp.where(live, chosen, seen.shape[1])].set(True, mode="drop")
    if texts is not None:  # what a slot that is not live writes is written over by its next token
        texts = texts.at[rows, settings.prompt_lengths + slots.counts].set(chosen, mode="drop")
    slots = slots._replace(
        last=jnp.where(live, chosen, slots.last),
        counts=slots.counts + live,
        ended=slots.ended | (live & is_end),
        said=Said(seen, texts),
    )
    top_tokens, top_log_probs = likeliest(logits, top)
    return slots, NewTokens(
        chosen, log_probs.astype(jnp.float32), top_tokens, top_log_probs.astype(jnp.float32)
    )
