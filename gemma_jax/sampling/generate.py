"""Turns prompts into completions: the compiled programs, and the assignment of prompts to slots.

Shape legend: B slots, R prompts of one prefill, P prompt length, E end tokens.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from gemma_jax.config import SamplingConfig, TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.memory import require_memory
from gemma_jax.model import KVCache, ModelSpec
from gemma_jax.model.attention import prefill_chunk
from gemma_jax.model.transformer import compute_dtype
from gemma_jax.sampling.decode import MAX_STEPS, NewTokens, Slots, SlotSettings, decode, free, insert, prefill
from gemma_jax.sharding import batch_sharding, row_parts

FinishReason = Literal["stop", "length", "context"]

BYTES_OF_TOKEN = 64  # approximate size of a token's id and log-probability in Python lists
REFILL_STRIDE = 16  # while prompts wait, tokens between two checks for a free slot


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt for which to generate one continuation."""

    token_ids: Sequence[int]
    config: SamplingConfig
    end_tokens: Sequence[int]
    prompt: int = 0  # the prompt's index; with the seed and `sample` it determines the random numbers
    sample: int = 0
    adapter: int = 0


@dataclasses.dataclass
class Completion:
    """The new tokens of one prompt, without the end token."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    """Nats, under the model's own distribution."""
    finish_reason: FinishReason | None = None
    """Why generation ended: an end token ("stop"), max_new_tokens ("length") or a full context ("context").

    None until then.
    """

    def add(
        self, token_ids: Sequence[int], log_probs: Sequence[float], finish_reason: FinishReason | None
    ) -> bool:
        """Appends new tokens.

        Args:
          token_ids, log_probs: The ids and log-probabilities of the new tokens.
          finish_reason: Why generation ends with these tokens, or None if it does not.

        Returns:
          Whether the completion itself stops here and needs no further token.
        """
        self.token_ids += token_ids
        self.log_probs += log_probs
        self.finish_reason = finish_reason
        return False


def requests_of(
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    end_tokens: Sequence[int],
    adapters: Sequence[int] = (),
) -> list[Request]:
    """Returns a request for every sample of every prompt; the samples of one prompt are adjacent.

    `adapters` has the index of each prompt's adapter; if it is empty, all have the first one.
    """
    return [
        Request(token_ids, config, end_tokens, prompt, sample, adapter)
        for prompt, (token_ids, adapter) in enumerate(
            zip(prompts, adapters or [0] * len(prompts), strict=True)
        )
        for sample in range(config.samples)
    ]


def indices_of(known: Sequence[str], adapter: str | Sequence[str] | None, count: int) -> list[int]:
    """Returns the index of the adapter of each of `count` prompts: -1 is the model without one.

    Args:
      known: The names of the model's adapters. An empty name is that of the model's own.
      adapter: The name of one, or a name for each prompt; None takes the model's own, if there is one.
      count: The number of prompts.

    Raises:
      UserError: There is no adapter of a name, or not one name for each prompt.
    """
    if adapter is None:
        return [0 if "" in known else -1] * count
    names = [adapter] * count if isinstance(adapter, str) else list(adapter)
    if len(names) != count:
        raise UserError(f"adapter has {len(names)} names for {count} prompts; give one name, or one each.")
    for name in names:
        if name and name not in known:
            loaded = ", ".join(filter(None, known)) or "none"
            raise UserError(f"there is no adapter {name!r}; this model was loaded with: {loaded}.")
    return [known.index(name) if name else -1 for name in names]


def bucket(size: int) -> int:
    """Rounds up to a power of two, at least 16: a program is compiled for each bucket, not for each size."""
    return max(16, 1 << (size - 1).bit_length())


def row_bucket(rows: int, parts: int) -> int:
    """Rounds up to 1, 2, 3, 4, 6, 8, 12, 16 ... rows for each of the parts that a batch is split into."""
    rows = -(-rows // parts)
    step = 1 << max(0, (rows - 1).bit_length() - 2)
    return -(-rows // step) * step * parts


class Generator:
    """A model with its compiled prefill and decode programs."""

    def __init__(self, spec: ModelSpec, params: nnx.State) -> None:
        self.config, self.mesh, self.params = spec.config, spec.mesh, params
        self.dtype = compute_dtype(spec.compute, spec.mesh)

        def with_model(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda params, *args, **kwargs: function(spec.merge(params), *args, **kwargs)

        self.prefill = jax.jit(with_model(prefill), static_argnames="size", donate_argnums=5)
        self.decode = jax.jit(with_model(decode), donate_argnums=1)
        self.insert = jax.jit(insert, donate_argnums=0)
        self.free = jax.jit(free, donate_argnums=0)

    def use(self, params: nnx.State) -> None:
        """Takes other parameters of the same model, for which nothing is compiled again."""
        self.params = params

    def cache_size(self, prompt: int, new_tokens: int) -> int:
        """Returns the cache slots that a row needs for the longest prompt and the most new tokens."""
        context = self.config.context_length
        return min(min(bucket(prompt), context) + bucket(new_tokens), context)

    def check_memory(self, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
        """Checks that sampling these prompts fits into memory.

        Raises:
          UserError: the cache of the slots, or the finished continuations, do not fit.
        """
        total = len(prompts) * config.samples
        rows = row_bucket(min(config.batch_size or total, total), row_parts(self.mesh))
        size = self.cache_size(max(map(len, prompts)), config.max_new_tokens)
        cache = KVCache.abstract(self.config, rows, size, self.dtype, self.mesh)
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        new_tokens = min(config.max_new_tokens, self.config.context_length)
        results = jax.ShapeDtypeStruct((total, new_tokens, BYTES_OF_TOKEN), np.uint8, sharding=host)
        remedy = "lower samples, batch_size or max_new_tokens"
        require_memory([cache, results], f"sampling {total:,} continuations, {rows:,} at a time,", remedy)

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
          UserError: an id or a length that `check_ids` refuses; a prompt needs room for one new token.
        """
        for request in requests:
            check_ids(request.token_ids, self.config, new=1)
        batch = Batch(self, requests, completions, rows or len(requests))
        while batch.fill():
            yield
            batch.decode(stride)
        yield


class Batch:
    """Requests that share a fixed number of slots: when one is done, the next one takes its slot."""

    def __init__(
        self, generator: Generator, requests: Sequence[Request], completions: Sequence[Completion], rows: int
    ) -> None:
        self._generator, self._requests, self._completions = generator, requests, completions
        self._waiting = collections.deque(range(len(requests)))
        rows = row_bucket(min(rows, len(requests)), row_parts(generator.mesh))
        self._active: dict[int, int] = {}  # slot in use -> index of its request
        self._counts = np.zeros(rows, int)  # tokens that each slot's request has received
        self._size = generator.cache_size(
            max(len(request.token_ids) for request in requests),
            max(request.config.max_new_tokens for request in requests),
        )
        # The same width for all requests, so that a refill needs no new compilation.
        self._ends = bucket(max(len(request.end_tokens) for request in requests))
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
            self._prefill(rows)
        return bool(self._active)

    def decode(self, stride: int) -> None:
        """Generates at most `stride` further tokens for every slot in use."""
        assert self._slots is not None
        generator = self._generator
        steps = min(stride, REFILL_STRIDE if self._waiting else MAX_STEPS)
        self._slots, new = generator.decode(generator.params, self._slots, steps)
        self._hand_out(range(len(self._counts)), new)

    def _prefill(self, rows: Sequence[int]) -> None:
        """Runs prefill for the requests in these slots, and adds the first token to each completion."""
        generator, first, total = self._generator, self._slots is None, len(self._counts)
        filled = total if first else row_bucket(len(rows), row_parts(generator.mesh))
        requests = [self._requests[self._active[row]] for row in rows]
        prompts = [request.token_ids for request in requests]
        longest = min(bucket(max(map(len, prompts))), self._size)
        chunk = generator.chunk(longest)
        tokens, lengths = padded(prompts, filled, -(-longest // chunk) * chunk)
        settings = slot_settings(requests, filled, self._ends, generator.config.context_length)
        put = functools.partial(jax.device_put, device=batch_sharding(generator.mesh))
        about = put((lengths, settings))
        size = self._size if first else longest
        so_far: Any = None
        for start in range(0, lengths.max(), chunk):
            part = put(tokens[:, start : start + chunk])
            arguments = (part, start, *about, so_far)
            so_far = generator.prefill(generator.params, *arguments, size=0 if start else size)
        slots, new = so_far
        if not first:
            # Rows that only pad the prefill have an index out of range, so `insert` drops them.
            places = np.array([*rows, *[total] * (filled - len(rows))], np.int32)
            slots = generator.insert(self._slots, slots, places)
        self._slots = slots
        self._hand_out(rows, new)

    def _hand_out(self, rows: Iterable[int], new: NewTokens) -> None:
        """Adds new tokens to their completions; `rows` are the slots of the rows of `new`, in order."""
        slots = self._slots
        assert slots is not None
        tokens, log_probs, counts, limits, ended = jax.device_get(
            (new.tokens, new.log_probs, slots.counts, slots.settings.limits, slots.ended)
        )
        stopped = np.zeros(len(self._counts), bool)
        for index, row in enumerate(rows):
            if row not in self._active:
                continue
            number = self._active[row]
            made = counts[row] - self._counts[row] - ended[row]  # without the end token
            self._counts[row] = counts[row]
            reason: FinishReason | None = None
            if ended[row]:
                reason = "stop"
            elif counts[row] >= limits[row]:
                full = counts[row] >= self._requests[number].config.max_new_tokens
                reason = "length" if full else "context"
            stopped[row] = self._completions[number].add(
                tokens[index, :made].tolist(), log_probs[index, :made].tolist(), reason
            )
            if reason or stopped[row]:
                del self._active[row]
        if stopped.any():
            self._slots = self._generator.free(slots, stopped)


def slot_settings(requests: Sequence[Request], rows: int, ends: int, context_length: int) -> SlotSettings:
    """Returns the settings of the slots as numpy arrays; slots without a request are done from the start.

    Args:
      requests: The requests, at most `rows`.
      rows: B, the number of slots.
      ends: E, at least the largest number of end tokens of a request.
      context_length: The model's context length in tokens.
    """
    unused = Request((0,) * context_length, SamplingConfig(), ())  # has no room for a new token
    requests = [*requests, *[unused] * (rows - len(requests))]

    def column(of: Callable[[Request], Any], dtype: Any = np.int32) -> Any:
        return np.array([of(request) for request in requests], dtype)

    return SlotSettings(
        limits=column(lambda r: min(r.config.max_new_tokens, context_length - len(r.token_ids))),
        end_tokens=column(lambda r: [*r.end_tokens, *[-1] * (ends - len(r.end_tokens))]),
        random_ids=column(lambda r: (r.config.seed, r.prompt, r.sample), np.uint32),
        temperature=column(lambda r: r.config.temperature, np.float32),
        top_k=column(lambda r: r.config.top_k),
        top_p=column(lambda r: r.config.top_p, np.float32),
        adapters=column(lambda r: r.adapter),
    )


def padded(sequences: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sequences as [rows, width], padded with zeros, and their lengths [rows]; both int32."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def check_ids(ids: Sequence[int], config: TransformerConfig, new: int = 0) -> None:
    """Checks the length and the ids of a sequence.

    Raises:
      UserError: the sequence is empty, has no room for `new` more tokens, or has an id out of range.
    """
    most = config.context_length - new
    if not 0 < len(ids) <= most:
        raise UserError(
            f"a sequence has {len(ids)} tokens, but must have 1 to {most}: the model's context holds "
            f"{config.context_length}, new ones included; begin it with <bos>, or shorten it."
        )
    wrong = next((id for id in ids if not 0 <= id < config.vocab_size), None)
    if wrong is not None:
        last = config.vocab_size - 1
        raise UserError(f"token id {wrong} is out of range; the model's ids go from 0 to {last}.")
