"""Caches examples as token ids on disk: each corpus is tokenised once, shard by shard."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from gemma_jax.data.cached_shard import CachedShard, SplitSize, open_shard
from gemma_jax.data.processes import in_processes
from gemma_jax.data.shard_writer import THREADS_A_PROCESS, ShardWriter
from gemma_jax.data.source import SPLITS, Source, Split, hash_of, split_documents
from gemma_jax.data.storage import cache_error
from gemma_jax.errors import UserError
from gemma_jax.paths import children, in_bucket, user_path

if TYPE_CHECKING:
    from gemma_jax.tokenizer import Tokenizer

MOST_PROCESSES = 8
"""The most processes that tokenise. Each needs up to 0.2 GB of memory."""

_FORMAT = 4


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A corpus as token ids."""

    source: Source
    vocab_size: int
    held_out: float
    shards: Sequence[CachedShard]

    def size(self, split: Split) -> SplitSize:
        return sum((shard.sizes[split] for shard in self.shards), SplitSize())

    @property
    def by_pieces(self) -> bool:
        """Whether pieces of documents are held out, because splitting by documents left one split empty."""
        return self.held_out > 0 and not all(self.size(split).documents for split in SPLITS)

    def stored_split(self, split: Split) -> Split:
        """Returns the split whose files hold the tokens of `split`; with `by_pieces`, both share them."""
        return next(name for name in SPLITS if self.size(name).documents) if self.by_pieces else split

    @property
    def skipped(self) -> int:
        """The number of records that could not be read and were left out."""
        return sum(shard.skipped for shard in self.shards)

    @property
    def dropped(self) -> int:
        """The number of records that were left out because they are longer than a row."""
        return sum(shard.dropped for shard in self.shards)

    def places(self, split: Split, shard: int, documents: Collection[int]) -> dict[int, str]:
        """Returns the file, line or record, as text, of each of some `documents` of a split of a shard.

        Reads the whole shard again.
        """
        part = self.source.shards[shard]
        read = split_documents(self.source, part, self.held_out, lambda reason: None)
        numbers = [document.number for found, document in read if found == split]
        return {document: self.source.place(part, numbers[document]) for document in documents}


def build_token_cache(
    source: Source,
    tokenizer: "Tokenizer",
    *,
    held_out: float,
    cache_dir: str,
    progress: Callable[[int, int], None] = lambda num_bytes, tokens: None,
    process_index: int = 0,
    process_count: int = 1,
) -> TokenCache:
    """Tokenises the shards that the cache does not hold yet, and opens the cache.

    `progress` is called with the bytes and tokens of each shard as soon as the shard is in the cache.
    Several processes that share a cache directory each start at a different shard, and skip the shards that
    others have finished meanwhile.

    Raises:
      UserError: A document or a cache file cannot be read or written, ids are not in the vocabulary, or the
        corpus has no documents.
    """
    shards = [dataclasses.astuple(shard) for shard in source.shards]
    key = hash_of(_FORMAT, source.fingerprint, shards, tokenizer.fingerprint, held_out)[:32]
    directory = user_path(cache_dir) / "tokens" / key
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_error(directory, error) from error
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    count = len(source.shards)
    first = process_index * count // process_count
    cached = {
        number: open_shard(directory, number, dtype) for number in [*range(first, count), *range(first)]
    }
    missing = [number for number, shard in cached.items() if shard is None]
    processes = min(_cores() // THREADS_A_PROCESS, MOST_PROCESSES, len(missing))
    threads = THREADS_A_PROCESS if processes > 1 else -1
    writer = ShardWriter(source, tokenizer, held_out, directory, dtype, threads)
    several = in_processes(writer.write_missing, missing, processes) if processes > 1 else None
    done: dict[int, CachedShard] = {}
    with several or contextlib.nullcontext(writer.write_missing) as write:
        for number, whole in cached.items():
            if whole is None:
                write(number)
                whole = open_shard(directory, number, dtype)
            if whole is None:
                raise UserError(
                    f"The cache {directory} does not keep what is written to it; "
                    "set data.cache_dir elsewhere."
                )
            done[number] = whole
            progress(source.shards[number].size, sum(size.tokens for size in whole.sizes.values()))
    _remove_leftovers(directory)
    cache = TokenCache(source, tokenizer.vocab_size, held_out, [done[number] for number in range(count)])
    if not any(cache.size(split).documents for split in SPLITS):
        left_out = f"{cache.skipped} skipped, {cache.dropped} longer than data.sequence_length"
        raise UserError(f"{source.name} has no documents ({left_out}); name another corpus.")
    return cache


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remove_leftovers(directory: epath.Path) -> None:
    """Deletes temporary files that killed processes left: those not written to for an hour."""
    if not in_bucket(directory):
        for path in children(directory):
            with contextlib.suppress(OSError):
                if path.suffix == ".tmp" and time.time() - path.stat().mtime > 3600:
                    path.unlink()
