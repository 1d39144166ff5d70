"""A model with its compiled programs, which turn prompts into completions.

Shape legend: B slots.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma_jax.config import SamplingConfig
from gemma_jax.memory import require_memory
from gemma_jax.model import KVCache, ModelSpec
from gemma_jax.model.attention import prefill_chunk
from gemma_jax.model.cache import KEYS_AXES
from gemma_jax.model.transformer import cache_dtype, compute_dtype
from gemma_jax.model.triton import capability
from gemma_jax.sampling import decode
from gemma_jax.sampling.decode import NewTokens, Prompts, Slots
from gemma_jax.sampling.requests import (
    Request,
    bucket,
    check_ids,
    check_options,
    row_bucket,
)
from gemma_jax.sharding import batch_sharding, partition_spec, platform, row_parts
from gemma_jax.weights import Quantization

# For int4 in blocks. Without the first, XLA would make a bfloat16 copy of each weight; without the second, of
# those that it contracts in parts; without the third, of those that it multiplies together, as q, k and v. It
# finds no tiles for such fusions on GPUs older than Hopper, where copies of a layer at a time are made.
INT4_HOPPER_OPTIONS = {
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": "True",
    "xla_gpu_experimental_force_split_k": "1",
    "xla_gpu_dot_merger_threshold_mb": "0",
}
BYTES_OF_TOKEN = 64  # approximate size of a token's id and log-probability in Python lists
BYTES_OF_ALTERNATIVE = 144  # of a tuple with both


class Report(NamedTuple):
    """What a program did to the slots of a batch."""

    new: NewTokens
    counts: jax.Array  # [B] int32: as in Slots
    ended: jax.Array  # [B] bool


class Kept(NamedTuple):
    """The cache of a text, which a longer text with the same beginning can go on with."""

    beginning: tuple[Hashable, ...]  # as `Request.beginning`, of what is in the cache
    cache: KVCache  # of one row


def _compiler_options(spec: ModelSpec) -> dict[str, str] | None:
    is_int4 = isinstance(spec.kind, Quantization) and spec.kind.linear == "int4"
    if is_int4 and platform(spec.mesh) == "gpu" and capability(spec.mesh) >= (9, 0):
        return INT4_HOPPER_OPTIONS
    return None


class Generator:
    """A model with its compiled prefill and decode programs."""

    def __init__(self, spec: ModelSpec, params: nnx.State) -> None:
        self.config, self.mesh, self.params = spec.config, spec.mesh, params
        self.dtype = compute_dtype(spec.compute, spec.mesh)
        self.cache_dtype = cache_dtype(spec.compute, spec.mesh)

        options = _compiler_options(spec)

        def with_model(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)  # its name is that of the program in profiles and in the cache
            def call(params: nnx.State, *args: Any, **kwargs: Any) -> Any:
                return function(spec.merge(params), *args, **kwargs)

            return call

        def reported(function: Callable[..., tuple[Slots, NewTokens]]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> tuple[Slots, Report]:
                slots, new = function(*args, **kwargs)
                return slots, Report(new, slots.counts, slots.ended)

            return call

        # What a program returns is placed as every other program takes it. Otherwise each would be compiled
        # once for the slots of `begin`, and again for those of `decode`.
        rows = batch_sharding(spec.mesh)
        shape = (self.config.num_kv_heads, self.config.num_layers, row_parts(spec.mesh), 1, 1)
        heads = NamedSharding(
            spec.mesh, PartitionSpec(*partition_spec(KEYS_AXES, shape, spec.mesh, "cache")[:3])
        )
        cache: Any = KVCache(heads, heads, rows, rows, rows)  # type: ignore[arg-type]  # shardings, not arrays
        prompts = Prompts._make([cache, rows])
        slots = Slots._make([cache, *[rows] * (len(Slots._fields) - 1)])

        def program(
            function: Callable[..., Any], returned: Any, static: Sequence[str], donated: int | tuple[()]
        ) -> Any:
            return jax.jit(
                with_model(function),
                out_shardings=returned,
                static_argnames=static,
                donate_argnums=donated,
                compiler_options=options,
            )

        self.prefill = program(decode.prefill, prompts, ["size"], 5)
        self.empty_slots = program(decode.empty_slots, slots, ["size"], ())
        # Each returns the slots, which the next call takes over, and a report of its own.
        reporting = (slots, rows)
        self.begin = program(reported(decode.begin), reporting, ["top"], 1)
        self.refill = program(reported(decode.refill), reporting, ["top"], 1)
        self.decode = program(reported(decode.decode), reporting, ["top", "guesses"], 1)
        self.free = jax.jit(decode.free, out_shardings=slots, donate_argnums=0)
        self.grown = jax.jit(KVCache.grown, out_shardings=cache, static_argnames="slots")
        self.beginnings = jax.jit(KVCache.beginnings, out_shardings=cache)
        self.kept: Kept | None = None

    def use(self, params: nnx.State) -> None:
        """Takes other parameters of the same model, for which nothing is compiled again."""
        self.params, self.kept = params, None

    def cache_size(self, tokens: int) -> int:
        """Returns the cache slots of a row that holds so many tokens."""
        return min(bucket(tokens), self.config.context_length)

    def check_memory(self, prompts: Sequence[Sequence[int]], configs: Sequence[SamplingConfig]) -> None:
        """Checks that sampling these prompts, each with its config, fits into memory.

        Raises:
          UserError: the state of the slots, or the finished continuations, do not fit.
        """
        total = sum(config.samples for config in configs)
        at_once = min(configs[0].batch_size or total, total)
        rows, copied = (row_bucket(n, row_parts(self.mesh)) for n in (at_once, min(at_once, len(prompts))))
        longest, new_tokens = max(map(len, prompts)), max(config.max_new_tokens for config in configs)
        size = self.cache_size(longest + new_tokens)
        held: list[Any] = KVCache.abstract(self.config, rows, size, self.cache_dtype, self.mesh)
        if total > len(prompts):  # samples begin with copies of their prompts
            held += KVCache.abstract(self.config, copied, bucket(longest), self.cache_dtype, self.mesh)
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
