"""Prompts in, tokens out: prefill the cache once, then decode with it.

Shape legend: B rows, P prompt length, T new tokens, S cache slots, V stored vocabulary rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.config import SamplingConfig
from gemma_jax.errors import UserError
from gemma_jax.model import KVCache, ModelSpec, layer_views
from gemma_jax.sampling.select import select
from gemma_jax.sharding import batch_sharding, row_parts

FinishReason = Literal["stop", "length", "context"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt, without the one that ended them."""

    token_ids: list[int]
    log_probs: list[float]  # nats, under the model's own distribution
    finish_reason: FinishReason  # an end token came, max_new_tokens were made, or the context is full


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of a batch between two dispatches."""

    cache: KVCache
    last: jax.Array  # [B] int32: the newest token, not yet in the cache
    tokens: jax.Array  # [B, T] int32: new tokens so far
    log_probs: jax.Array  # [B, T]
    counts: jax.Array  # [B] int32: new tokens so far, the end token included
    limits: jax.Array  # [B] int32: new tokens allowed
    ended: jax.Array  # [B] bool: an end token came
    keys: jax.Array  # [B] random keys
    temperature: jax.Array  # [B]
    top_k: jax.Array  # [B]
    top_p: jax.Array  # [B]

    @property
    def done(self) -> jax.Array:
        """[B] bool: rows that need no further token."""
        return self.ended | (self.counts >= self.limits)


def bucket(size: int) -> int:
    """The next power of two, 16 at least: a program is compiled for each bucket, not for each size."""
    return max(16, 1 << (size - 1).bit_length())


class Generator:
    """A model with its compiled prefill and decode."""

    def __init__(self, spec: ModelSpec, params: nnx.State) -> None:
        self._spec, self.config, self.mesh, self.params = spec, spec.config, spec.mesh, params
        self.prefill = jax.jit(self._prefill_impl, static_argnames=("slots", "capacity"))
        self.decode = jax.jit(self._decode_impl, donate_argnums=1)

    @functools.cached_property
    def _layers(self) -> list[nnx.State] | None:
        return layer_views(self.params, self.mesh)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises:
        UserError: an empty prompt, one that leaves no room in the context, an id out of range.
        """
        context, vocabulary = self.config.context_length, self.config.vocab_size
        if not prompt:
            raise UserError("a prompt has no tokens; give it at least the <bos> token.")
        if len(prompt) >= context:
            raise UserError(
                f"a prompt has {len(prompt)} tokens, but the model's context of {context} leaves room for at "
                f"most {context - 1} before a new one; shorten the prompt."
            )
        wrong = [token for token in prompt if not 0 <= token < vocabulary]
        if wrong:
            raise UserError(
                f"token id {wrong[0]} is out of range; the model's ids go from 0 to {vocabulary - 1}."
            )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig,
        end_tokens: Sequence[int],
        stride: int,
        ended: Callable[[list[Completion]], Sequence[bool]] | None = None,
    ) -> Iterator[list[Completion]]:
        """Continue prompts of any lengths as one batch.

        Args:
          prompts: token ids, beginning with <bos>.
          config: how to choose tokens.
          end_tokens: ids that end a row.
          stride: tokens made between two looks at them.
          ended: at each look, says which rows need nothing more; none, if left out.

        Yields:
          What there is of each completion, in the order of the prompts (all samples of one prompt
          together): after the first token, after every further `stride`, and at the end.

        Raises:
          UserError: see `check_prompt`.
        """
        for prompt in prompts:
            self.check_prompt(prompt)
        prompts = [prompt for prompt in prompts for _ in range(config.samples)]
        # Every device gets the same number of rows; rows that fill up are done before they start.
        parts = row_parts(self.mesh)
        rows = -(-len(prompts) // parts) * parts
        context = self.config.context_length
        longest = min(bucket(max(map(len, prompts))), context)
        capacity = min(bucket(config.max_new_tokens), context)
        tokens = np.zeros((rows, longest), np.int32)
        lengths = np.zeros(rows, np.int32)
        limits = np.zeros(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
            limits[row] = min(config.max_new_tokens, context - len(prompt))
        put = functools.partial(jax.device_put, device=batch_sharding(self.mesh))
        seed_key = jax.random.key(config.seed)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(seed_key, jnp.arange(rows))
        ends = jnp.asarray(sorted(set(end_tokens)) or [-1], jnp.int32)
        state = self.prefill(
            self.params,
            put(tokens),
            put(lengths),
            put(limits),
            put(keys),
            config.temperature,
            config.top_k,
            config.top_p,
            ends,
            slots=min(longest + capacity, context),
            capacity=capacity,
        )
        made = 1
        while True:
            completions = _completions(state, len(prompts), config.max_new_tokens)
            yield completions
            if ended is not None:
                over = np.zeros(rows, bool)
                over[: len(prompts)] = ended(completions)
                state = dataclasses.replace(state, limits=jnp.where(over, state.counts, state.limits))
            if made >= config.max_new_tokens or bool(jnp.all(state.done)):
                return
            steps = min(stride, config.max_new_tokens - made)
            state = self.decode(self.params, state, steps, ends, self._layers)
            made += steps

    def _prefill_impl(
        self,
        params: nnx.State,
        tokens: jax.Array,
        lengths: jax.Array,
        limits: jax.Array,
        keys: jax.Array,
        temperature: jax.Array,
        top_k: jax.Array,
        top_p: jax.Array,
        end_tokens: jax.Array,
        *,
        slots: int,
        capacity: int,
    ) -> DecodeState:
        model = self._spec.merge(params)
        B, P = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        cache = KVCache.empty(self.config, B, slots, model.dtype, self.mesh)
        hidden, cache = model.extend(cache, tokens, positions, segments)
        last = jnp.maximum(lengths - 1, 0)
        newest = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        state = DecodeState(
            cache=cache,
            last=jnp.zeros(B, jnp.int32),
            tokens=jnp.zeros((B, capacity), jnp.int32),
            log_probs=jnp.zeros((B, capacity), jnp.float32),
            counts=jnp.zeros(B, jnp.int32),
            limits=limits,
            ended=jnp.zeros(B, bool),
            keys=keys,
            temperature=jnp.full(B, temperature, jnp.float32),
            top_k=jnp.full(B, top_k, jnp.int32),
            top_p=jnp.full(B, top_p, jnp.float32),
        )
        return _with_next_token(state, model.logits(newest), end_tokens)

    def _decode_impl(
        self,
        params: nnx.State,
        state: DecodeState,
        steps: jax.Array,
        end_tokens: jax.Array,
        layers: list[nnx.State] | None = None,
    ) -> DecodeState:
        model = self._spec.merge(params)

        def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
            step, state = carry
            return (step < steps) & ~jnp.all(state.done)

        def body(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
            step, state = carry
            # Done rows run along as padding: they write nothing into their part of the cache.
            segments = (~state.done).astype(jnp.int32)[:, None]
            positions = state.cache.lengths[:, None]
            hidden, cache = model.extend(state.cache, state.last[:, None], positions, segments, layers)
            state = dataclasses.replace(state, cache=cache)
            return step + 1, _with_next_token(state, model.logits(hidden[:, 0]), end_tokens)

        return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def _with_next_token(state: DecodeState, logits: jax.Array, end_tokens: jax.Array) -> DecodeState:
    """The state with one more token in every row that is not done."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.counts)
    chosen, log_probs = select(logits, keys, state.temperature, state.top_k, state.top_p)
    live = ~state.done
    rows = jnp.arange(chosen.shape[0])
    place = jnp.where(live, state.counts, state.tokens.shape[1])  # out of range is dropped
    return dataclasses.replace(
        state,
        last=jnp.where(live, chosen, state.last),
        tokens=state.tokens.at[rows, place].set(chosen, mode="drop"),
        log_probs=state.log_probs.at[rows, place].set(log_probs.astype(jnp.float32), mode="drop"),
        counts=state.counts + live,
        ended=state.ended | (live & jnp.isin(chosen, end_tokens)),
    )


def _completions(state: DecodeState, rows: int, max_new_tokens: int) -> list[Completion]:
    tokens, log_probs, counts, ended = jax.device_get(
        (state.tokens, state.log_probs, state.counts, state.ended)
    )
    completions = []
    for row in range(rows):
        new = int(counts[row]) - int(ended[row])
        full: FinishReason = "length" if counts[row] >= max_new_tokens else "context"
        reason: FinishReason = "stop" if ended[row] else full
        completions.append(Completion(tokens[row, :new].tolist(), log_probs[row, :new].tolist(), reason))
    return completions
