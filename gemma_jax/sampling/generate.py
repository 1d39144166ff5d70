"""Turns prompts into completions: the compiled programs, and the assignment of prompts to slots.

Shape legend: Q slots that begin together.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from gemma_jax.config import SamplingConfig
from gemma_jax.memory import require_memory
from gemma_jax.model import KVCache, ModelSpec, layer_views
from gemma_jax.model.attention import prefill_chunk
from gemma_jax.model.transformer import compute_dtype
from gemma_jax.sampling import decode
from gemma_jax.sampling.decode import MAX_STEPS, NewTokens, Prompts, Slots, SlotSettings
from gemma_jax.sampling.requests import (
    Completion,
    FinishReason,
    Request,
    Widths,
    bucket,
    check_ids,
    check_options,
    padded,
    row_bucket,
    slot_settings,
)
from gemma_jax.sharding import batch_sharding, row_parts

BYTES_OF_TOKEN = 64  # approximate size of a token's id and log-probability in Python lists
BYTES_OF_ALTERNATIVE = 144  # of a tuple with both
REFILL_STRIDE = 16  # while prompts wait, tokens between two checks for a free slot


class Generator:
    """A model with its compiled prefill and decode programs."""

    def __init__(self, spec: ModelSpec, params: nnx.State) -> None:
        self.config, self.mesh, self.params = spec.config, spec.mesh, params
        self.dtype = compute_dtype(spec.compute, spec.mesh)

        def with_model(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda params, *args, **kwargs: function(spec.merge(params), *args, **kwargs)

        self.prefill = jax.jit(with_model(decode.prefill), static_argnames="size", donate_argnums=5)
        self.begin = jax.jit(with_model(decode.begin), static_argnames="top", donate_argnums=1)
        self.empty_slots = jax.jit(with_model(decode.empty_slots), static_argnames="size")
        self.refill = jax.jit(with_model(decode.refill), static_argnames="top", donate_argnums=1)
        self.decode = jax.jit(with_model(decode.decode), static_argnames="top", donate_argnums=1)
        self.free = jax.jit(decode.free, donate_argnums=0)

    def use(self, params: nnx.State) -> None:
        """Takes other parameters of the same model, for which nothing is compiled again."""
        self.params = params
        self.__dict__.pop("layers", None)

    @functools.cached_property
    def layers(self) -> list[nnx.State] | None:
        """The blocks' parameters as one entry per layer, where that makes decoding faster; None elsewhere."""
        return layer_views(self.params, self.mesh)

    def cache_size(self, prompt: int, new_tokens: int) -> int:
        """Returns the cache slots that a row needs for the longest prompt and the most new tokens."""
        context = self.config.context_length
        return min(min(bucket(prompt), context) + bucket(new_tokens), context)

    def check_memory(self, prompts: Sequence[Sequence[int]], configs: Sequence[SamplingConfig]) -> None:
        """Checks that sampling these prompts, each with its config, fits into memory.

        Raises:
          UserError: the state of the slots, or the finished continuations, do not fit.
        """
        total = sum(config.samples for config in configs)
        at_once = min(configs[0].batch_size or total, total)
        rows, copied = (row_bucket(n, row_parts(self.mesh)) for n in (at_once, min(at_once, len(prompts))))
        longest, new_tokens = max(map(len, prompts)), max(config.max_new_tokens for config in configs)
        size = self.cache_size(longest, new_tokens)
        held = KVCache.abstract(self.config, rows, size, self.dtype, self.mesh)
        if total > len(prompts):  # samples begin with copies of their prompts
            held += KVCache.abstract(self.config, copied, bucket(longest), self.dtype, self.mesh)
        if any(config.repetition_penalty != 1 for config in configs):
            shape = (rows, self.config.vocab_rows)
            held.append(jax.ShapeDtypeStruct(shape, np.bool_, sharding=batch_sharding(self.mesh)))
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        tokens = [
            config.samples * min(config.max_new_tokens, self.config.context_length) for config in configs
        ]
        sizes = [BYTES_OF_TOKEN + BYTES_OF_ALTERNATIVE * config.top_log_probs for config in configs]
        results = sum(count * size for count, size in zip(tokens, sizes, strict=True))
        held.append(jax.ShapeDtypeStruct((results,), np.uint8, sharding=host))
        remedy = "lower samples, batch_size or max_new_tokens"
        require_memory(held, f"sampling {total:,} continuations, {rows:,} at a time,", remedy)

    def check(self, requests: Sequence[Request]) -> None:
        """Checks settings and prompts, each of which must leave room for one new token.

        Raises:
          UserError: as `check_options` and `check_ids`.
        """
        for config in {id(request.config): request.config for request in requests}.values():
            check_options(config, self.config.vocab_size)
        for request in requests:
            check_ids(request.token_ids, self.config, new=1)

    def chunk(self, length: int) -> int:
        """Returns how many tokens of each prompt prefill processes at once."""
        return prefill_chunk(length, self.config.head_dim, self.dtype, self.mesh)

    def run(
        self,
        requests: Sequence[Request],
        completions: Sequence[Completion],
        *,
        rows: int = 0,
        stride: int = MAX_STEPS,
    ) -> Iterator[None]:
        """Continues prompts of any lengths.

        Args:
          requests: The prompts to continue; their tokens begin with <bos>.
          completions: One completion for each request, to which the new tokens are added.
          rows: How many requests are processed at once; 0 means all.
          stride: How many tokens are generated between two yields.

        Yields:
          None after the first token, after every further `stride` tokens, and at the end.

        Raises:
          UserError: as `check`.
        """
        self.check(requests)
        batch = Batch(self, requests, completions, rows or len(requests))
        while batch.fill():
            yield
            batch.decode(stride)
        yield


class Batch:
    """Requests that share a fixed number of slots: when one is done, the next one takes its slot.

    A slot keeps the keys and values of its prompt, so that the prompt's further samples need no prefill.
    """

    def __init__(
        self, generator: Generator, requests: Sequence[Request], completions: Sequence[Completion], rows: int
    ) -> None:
        self._generator, self._requests, self._completions = generator, requests, completions
        self._waiting = collections.deque(range(len(requests)))
        rows = row_bucket(min(rows, len(requests)), row_parts(generator.mesh))
        self._active: dict[int, int] = {}  # slot in use -> index of its request
        self._held: dict[int, tuple[Hashable, ...]] = {}  # slot -> `Request.beginning` of its prompt
        self._counts = np.zeros(rows, int)  # tokens that each slot's request has received
        self._size = generator.cache_size(
            max(len(request.token_ids) for request in requests),
            max(request.config.max_new_tokens for request in requests),
        )
        # The same widths for all requests, so that a refill needs no new compilation.
        self._widths = Widths.of(requests)
        self._slots: Slots | None = None

    def fill(self) -> bool:
        """Puts waiting requests into free slots; returns False if nothing is left to do."""
        total = len(self._counts)
        while self._waiting and len(self._active) < total:
            empty = [row for row in range(total) if row not in self._active]
            rows = empty[: len(self._waiting)]
            for row in rows:
                self._active[row] = self._waiting.popleft()
                self._counts[row] = 0
            holders = {prompt: row for row, prompt in self._held.items()}
            held = [row for row in rows if self._request(row).beginning in holders]
            if held:
                self._begin(held, None, [holders[self._request(row).beginning] for row in held])
            if new := [row for row in rows if row not in held]:
                places: dict[tuple[Hashable, ...], int] = {}
                sources = [places.setdefault(self._request(row).beginning, len(places)) for row in new]
                self._begin(new, self._prefill([new[sources.index(i)] for i in range(len(places))]), sources)
        return bool(self._active)

    def decode(self, stride: int) -> None:
        """Generates at most `stride` further tokens for every slot in use."""
        assert self._slots is not None
        generator, top = self._generator, self._widths.top
        steps = min(stride, REFILL_STRIDE if self._waiting else MAX_STEPS)
        self._slots, new = generator.decode(generator.params, self._slots, steps, generator.layers, top=top)
        self._hand_out(range(len(self._counts)), new)

    def _request(self, row: int) -> Request:
        return self._requests[self._active[row]]

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, batch_sharding(self._generator.mesh))

    def _prefill(self, rows: Sequence[int]) -> Prompts:
        """Runs prefill for the prompts in these slots, which all differ."""
        generator, total = self._generator, len(self._counts)
        # Without a copy these prompts become all the slots.
        whole = self._slots is None and len(rows) == len(self._active)
        filled = total if whole else row_bucket(len(rows), row_parts(generator.mesh))
        requests = [self._request(row) for row in rows]
        prompts = [request.token_ids for request in requests]
        longest = min(bucket(max(map(len, prompts))), self._size)
        chunk = generator.chunk(longest)
        tokens, lengths = padded(prompts, filled, -(-longest // chunk) * chunk)
        adapters = np.array([r.adapter for r in requests] + [0] * (filled - len(rows)), np.int32)
        about = self._put((lengths, adapters))
        size = self._size if whole else longest
        so_far: Prompts | None = None
        for start in range(0, lengths.max(), chunk):
            part = self._put(tokens[:, start : start + chunk])
            arguments = (part, start, *about, so_far, generator.layers)
            so_far = generator.prefill(generator.params, *arguments, size=0 if start else size)
        assert so_far is not None
        return so_far

    def _begin(self, rows: Sequence[int], prompts: Prompts | None, sources: Sequence[int]) -> None:
        """Begins the requests of these slots, and adds the first token to each completion.

        Args:
          rows: Q slots.
          prompts: What `_prefill` returned; None if other slots, or these, hold the prompts.
          sources: [Q] the index of each one's prompt, or of the slot that holds it.
        """
        generator, widths, total = self._generator, self._widths, len(self._counts)
        whole = self._slots is None and len(set(sources)) == len(rows)
        filled = total if whole else row_bucket(len(rows), row_parts(generator.mesh))
        settings, seen = self._put(self._settings([self._request(row) for row in rows], filled))
        if whole:
            self._slots, new = generator.begin(generator.params, prompts, settings, seen, top=widths.top)
        else:
            if self._slots is None:
                empty = self._put(self._settings([], total))
                self._slots = generator.empty_slots(generator.params, *empty, size=self._size)
            # Rows that only pad the batch have an index out of range, so `refill` drops them.
            unused = filled - len(rows)
            places = (np.array([*x, *[pad] * unused], np.int32) for x, pad in ((sources, 0), (rows, total)))
            arguments = (self._slots, prompts, *places, settings, seen)
            self._slots, new = generator.refill(generator.params, *arguments, top=widths.top)
        self._held |= {row: self._request(row).beginning for row in rows}
        self._hand_out(rows, new)

    def _settings(self, requests: Sequence[Request], rows: int) -> tuple[SlotSettings, np.ndarray | None]:
        """Returns the settings of slots and the tokens of their prompts, as `decode.begin` takes them."""
        config, widths = self._generator.config, self._widths
        seen = np.zeros((rows, config.vocab_rows), bool) if widths.penalty else None
        if seen is not None:
            for row, request in enumerate(requests):
                seen[row, list(request.token_ids)] = True
        return slot_settings(requests, rows, widths, config.context_length), seen

    def _hand_out(self, rows: Iterable[int], new: NewTokens) -> None:
        """Adds new tokens to their completions; `rows` are the slots of the rows of `new`, in order."""
        slots = self._slots
        assert slots is not None
        new, counts, limits, ended = jax.device_get((new, slots.counts, slots.settings.limits, slots.ended))
        stopped = np.zeros(len(self._counts), bool)
        for index, row in enumerate(rows):
            if row not in self._active:
                continue
            number, config = self._active[row], self._request(row).config
            made = counts[row] - self._counts[row] - ended[row]  # without the end token
            self._counts[row] = counts[row]
            reason: FinishReason | None = None
            if ended[row]:
                reason = "stop"
            elif counts[row] >= limits[row]:
                reason = "length" if counts[row] >= config.max_new_tokens else "context"
            tokens, log_probs, *top = (x[index, :made].tolist() for x in new)
            top = [list(zip(*x, strict=True))[: config.top_log_probs] for x in zip(*top, strict=True)]
            stopped[row] = self._completions[number].add(
                tokens, log_probs, reason, top if config.top_log_probs else ()
            )
            if reason or stopped[row]:
                del self._active[row]
        if stopped.any():
            self._slots = self._generator.free(slots, stopped)
