"""A batch of requests on its way through the programs of a `Generator`.

Shape legend: Q slots that begin together.
"""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gemma_jax.sampling.decode import MAX_STEPS, Prompts, Said, Slots, SlotSettings
from gemma_jax.sampling.generate import Generator, Kept, Report
from gemma_jax.sampling.requests import (
    Completion,
    FinishReason,
    Request,
    Widths,
    bucket,
    limit_of,
    padded,
    row_bucket,
    slot_settings,
)
from gemma_jax.sharding import batch_sharding, row_parts

AHEAD = 1  # calls of `decode` that are under way when the tokens of an earlier one are read
REFILL_STRIDE = 16  # while prompts wait, tokens between two checks for a free slot
LOOK_SECONDS = 0.05  # between two looks at a text that somebody watches, or that may contain a stop text
GROWTH = 4  # of a cache that is full; each size is compiled for
LEAST_SHARED = 32  # tokens of a common beginning, from which on it is computed only once


def complete_requests(
    generator: Generator,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    *,
    rows: int = 0,
    watched: bool = False,
    keep: bool = False,
) -> Iterator[None]:
    """Continues prompts of any lengths.

    Args:
      generator: The model.
      requests: The prompts to continue; their tokens begin with <bos>.
      completions: One completion for each request, to which the new tokens are added.
      rows: How many requests are processed at once; 0 means all.
      watched: Whether somebody waits for each token. The completions then grow every few hundredths of a
        second, or with each token if that takes longer.
      keep: Whether to keep the cache of the only request, so that a later request that begins with the
        same tokens need not compute them again.

    Yields:
      None whenever tokens were added, and at the end.

    Raises:
      UserError: as `Generator.check`.
    """
    generator.check(requests)
    batch = Batch(generator, requests, completions, rows or len(requests), watched=watched)
    try:
        while batch.fill():
            yield
            batch.decode()
        yield
    finally:
        if keep:
            generator.kept = batch.kept()


class Batch:
    """Requests that share a fixed number of slots: when one is done, the next one takes its slot.

    A slot keeps the keys and values of its prompt, so that the prompt's further samples need no prefill.
    While no request waits, one call of `decode` is already under way when the tokens of the one before are
    read, so that the device never waits for Python.
    """

    def __init__(
        self,
        generator: Generator,
        requests: Sequence[Request],
        completions: Sequence[Completion],
        rows: int,
        *,
        watched: bool,
    ) -> None:
        self._generator, self._requests, self._completions = generator, requests, completions
        self._watched = watched
        self._waiting = collections.deque(range(len(requests)))
        rows = row_bucket(min(rows, len(requests)), row_parts(generator.mesh))
        self._active: dict[int, int] = {}  # slot in use -> index of its request
        self._held: dict[int, tuple[Hashable, ...]] = {}  # slot -> `Request.beginning` of its prompt
        self._counts = np.zeros(rows, int)  # tokens that each slot's request has received
        self._promised = np.zeros(rows, int)  # tokens that the calls so far give it, unless it ends before
        self._reports: collections.deque[tuple[Sequence[int], int, Report]] = collections.deque()
        self._looked, self._step_seconds = 0.0, math.inf
        longest = max(len(request.token_ids) for request in requests)
        most = max(request.config.max_new_tokens for request in requests)
        # The same widths for all requests, so that a refill needs no new compilation.
        self._widths = Widths.of(requests)
        # With guesses it is not known here how many tokens a call adds.
        self._largest = generator.cache_size(longest + most + self._widths.guesses)
        soon = generator.cache_size(longest + min(most, MAX_STEPS))
        self._size = self._largest if self._widths.guesses else soon
        self._slots: Slots | None = None

    def fill(self) -> bool:
        """Puts waiting requests into free slots; returns False if nothing is left to do."""
        total = len(self._counts)
        while self._waiting and len(self._active) < total:
            empty = [row for row in range(total) if row not in self._active]
            rows = empty[: len(self._waiting)]
            for row in rows:
                self._active[row] = self._waiting.popleft()
                self._counts[row], self._promised[row] = 0, 1
            holders = {prompt: row for row, prompt in self._held.items()}
            held = [row for row in rows if self._request(row).beginning in holders]
            if held:
                self._begin(held, None, [holders[self._request(row).beginning] for row in held])
            if new := [row for row in rows if row not in held]:
                places: dict[tuple[Hashable, ...], int] = {}
                sources = [places.setdefault(self._request(row).beginning, len(places)) for row in new]
                self._begin(new, self._prefill([new[sources.index(i)] for i in range(len(places))]), sources)
            self._read()
        return bool(self._active)

    def decode(self) -> None:
        """Begins to generate further tokens for every slot in use, and hands out those made before."""
        generator, widths = self._generator, self._widths
        rows = [*self._active]
        room = max(self._limit(row) - self._promised[row] for row in rows)
        if room > 0:
            steps = min(room, REFILL_STRIDE if self._waiting else MAX_STEPS)
            if self._watched or any(self._request(row).config.stop for row in rows):
                steps = min(steps, max(1, int(LOOK_SECONDS / max(self._step_seconds, 1e-6))))
            self._promised[rows] += steps
            given = {row: min(self._limit(row), self._promised[row]) for row in rows}
            self._make_room(max(len(self._request(row).token_ids) + given[row] for row in rows))
            # A number of numpy would have another type, for which the program would be compiled again.
            self._slots, report = generator.decode(
                generator.params, self._slots, int(steps), top=widths.top, guesses=widths.guesses
            )
            self._reports.append((range(len(self._counts)), steps, report))
        self._read(everything=room <= 0)

    def kept(self) -> Kept | None:
        """Returns the cache of the only request, without its newest token, which may not be in it yet."""
        # An interrupt may have come while a program was taking the cache over.
        if self._slots is None or len(self._counts) > 1 or self._slots.cache.lengths.is_deleted():
            return None
        ids = self._completions[0].token_ids[:-1]
        return Kept((*self._requests[0].beginning, *ids), self._slots.cache)

    def _request(self, row: int) -> Request:
        return self._requests[self._active[row]]

    def _limit(self, row: int) -> int:
        return limit_of(self._request(row), self._generator.config.context_length)

    def _put(self, tree: Any) -> Any:
        return jax.device_put(tree, batch_sharding(self._generator.mesh))

    def _make_room(self, tokens: int) -> None:
        """Makes the cache larger, if it does not hold so many tokens. Each size is compiled for once."""
        assert self._slots is not None
        while self._size < tokens:
            self._size = min(self._generator.cache_size(GROWTH * self._size), self._largest)
            self._slots = self._slots._replace(
                cache=self._generator.grown(self._slots.cache, slots=self._size)
            )

    def _prefill(self, rows: Sequence[int]) -> Prompts:
        """Runs prefill for the prompts in these slots, which all differ.

        What all of them begin with, or what is kept of an earlier text, is computed only once.
        """
        generator, parts = self._generator, row_parts(self._generator.mesh)
        # Without a copy these prompts become all the slots.
        whole = self._slots is None and len(rows) == len(self._active)
        filled = len(self._counts) if whole else row_bucket(len(rows), parts)
        requests = [self._request(row) for row in rows]
        size = self._size if whole else min(bucket(max(len(r.token_ids) for r in requests)), self._size)
        beginnings = [request.beginning[:-1] for request in requests]  # the last token is always computed
        start, cache, kept = 0, None, generator.kept
        if kept and whole and filled == 1:
            start, cache, generator.kept = _common([*beginnings, kept.beginning]), kept.cache, None
        elif len(rows) > 1 and (start := _common(beginnings)) >= LEAST_SHARED:
            first = dataclasses.replace(requests[0], token_ids=requests[0].token_ids[:start])
            cache = self._extended([first], parts, size, None).cache
        if start < LEAST_SHARED or cache is None:
            return self._extended(requests, filled, size, None)
        if cache.positions.shape[1] < size:
            cache = generator.grown(cache, slots=size)
        elif whole:
            self._size = cache.positions.shape[1]
        places = self._put((np.zeros(filled, np.int32), np.full(filled, start, np.int32)))
        begun = generator.beginnings(cache, *places)
        newest = np.zeros((filled, generator.config.embed_dim), generator.dtype)
        return self._extended(requests, filled, size, Prompts(begun, self._put(newest)), start)

    def _extended(
        self, requests: Sequence[Request], rows: int, size: int, so_far: Prompts | None, start: int = 0
    ) -> Prompts:
        """Writes prompts from the token `start` on to the cache `so_far`, which has the tokens before it."""
        generator, prompts = self._generator, [request.token_ids[start:] for request in requests]
        chunk = generator.chunk(longest := bucket(max(map(len, prompts))))
        tokens, lengths = padded(prompts, rows, -(-longest // chunk) * chunk)
        adapters = np.array([r.adapter for r in requests] + [0] * (rows - len(requests)), np.int32)
        about = self._put((lengths + start * (lengths > 0), adapters))
        for first in range(0, lengths.max(), chunk):
            part = self._put(tokens[:, first : first + chunk])
            made_for = 0 if so_far else size
            arguments = (part, start + first, *about, so_far)
            so_far = generator.prefill(generator.params, *arguments, size=made_for)
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
        settings, said = self._put(self._settings([self._request(row) for row in rows], filled))
        if whole:
            self._slots, report = generator.begin(generator.params, prompts, settings, said, top=widths.top)
        else:
            if self._slots is None:
                empty = self._put(self._settings([], total))
                self._slots = generator.empty_slots(generator.params, *empty, size=self._size)
            # Rows that only pad the batch have an index out of range, so `refill` drops them.
            unused = filled - len(rows)
            places = (np.array([*x, *[pad] * unused], np.int32) for x, pad in ((sources, 0), (rows, total)))
            arguments = (self._slots, prompts, *places, settings, said)
            self._slots, report = generator.refill(generator.params, *arguments, top=widths.top)
        self._held |= {row: self._request(row).beginning for row in rows}
        self._reports.append((rows, 0, report))

    def _settings(self, requests: Sequence[Request], rows: int) -> tuple[SlotSettings, Said]:
        """Returns the settings of slots and the tokens of their prompts, as `decode.begin` takes them."""
        config, widths = self._generator.config, self._widths
        seen = np.zeros((rows, config.vocab_rows), bool) if widths.penalty else None
        texts = np.zeros((rows, config.context_length), np.int32) if widths.guesses else None
        for row, request in enumerate(requests):
            if seen is not None:
                seen[row, list(request.token_ids)] = True
            if texts is not None:
                texts[row, : len(request.token_ids)] = request.token_ids
        settings = slot_settings(requests, rows, widths, config.context_length)
        return settings, Said(seen, texts)  # type: ignore[arg-type]  # numpy arrays, before they are sent

    def _read(self, *, everything: bool = False) -> None:
        """Hands out the tokens of all calls but the newest, or of all of them."""
        while len(self._reports) > (0 if everything or self._waiting else AHEAD):
            rows, steps, report = self._reports.popleft()
            self._hand_out(rows, report)
            before, self._looked = self._looked, time.monotonic()
            if steps:
                self._step_seconds = (self._looked - before) / steps

    def _hand_out(self, rows: Iterable[int], report: Report) -> None:
        """Adds new tokens to their completions; `rows` are the slots of the rows of new tokens, in order."""
        new, counts, ended = jax.device_get(report)
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
            elif counts[row] >= self._limit(row):
                reason = "length" if counts[row] >= config.max_new_tokens else "context"
            tokens, log_probs, *top = (x[index, :made].tolist() for x in new)
            top = [list(zip(*x, strict=True))[: config.top_log_probs] for x in zip(*top, strict=True)]
            stopped[row] = self._completions[number].add(
                tokens, log_probs, reason, top if config.top_log_probs else ()
            )
            if reason or stopped[row]:
                del self._active[row]
        if stopped.any():
            assert self._slots is not None
            self._slots = self._generator.free(self._slots, stopped)


def _common(beginnings: Sequence[tuple[Hashable, ...]]) -> int:
    """Returns how many tokens these begin with together, each as `Request.beginning`."""
    same = itertools.takewhile(lambda places: len(set(places)) == 1, zip(*beginnings, strict=False))
    return max(0, len([*same]) - 1)  # the first is the adapter
