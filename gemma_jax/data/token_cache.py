"""Documents as token ids on disk: each corpus is tokenised once, shard by shard.

A cache lies under CACHE_DIR/tokens/KEY, where KEY is a hash of everything that decides its contents. For each
shard NNNNN of the corpus and each split, `NNNNN.SPLIT.ids` holds the token ids of its documents one after the
other, each followed by eos (little-endian uint16, or uint32 for vocabularies over 65,536), and
`NNNNN.SPLIT.lengths.npy` their lengths with eos (int64). `NNNNN.json`, written last, holds the sizes: a shard
without it, or whose files have other sizes, is written again. All writers write the same bytes, so that any
number of processes may fill one cache at once.

The ids are flat files rather than records because packing wants any piece of any document as one slice.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from etils import epath
from numpy.typing import NDArray

from gemma_jax.data.processes import in_processes
from gemma_jax.data.source import LongText, Shard, Source, Text, TokenIds, hash_of, is_held_out
from gemma_jax.data.storage import (
    ArrayFile,
    cache_error,
    is_local,
    replacing,
    save_array,
)
from gemma_jax.errors import UserError
from gemma_jax.paths import user_path

if TYPE_CHECKING:
    from gemma_jax.tokenizer import Tokenizer

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")

Progress = Callable[[int, int, int], None]
"""Called with the bytes done, the bytes in all, and the tokens so far."""

THREADS_A_PROCESS = 4
"""Threads that one process can feed: reading, hashing and packing the ids are Python's own work."""

MOST_PROCESSES = 8
"""Each takes up to 0.2 GB."""

_FORMAT = 1
_BATCH_CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """How much a split holds. `tokens` counts one eos a document; `num_bytes` is its text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "SplitSize") -> "SplitSize":
        return SplitSize(
            self.documents + other.documents, self.tokens + other.tokens, self.num_bytes + other.num_bytes
        )


@dataclasses.dataclass(frozen=True)
class CachedShard:
    """One shard of a cache, checked to be whole."""

    directory: epath.Path
    number: int
    dtype: np.dtype[Any]
    sizes: dict[Split, SplitSize] = dataclasses.field(hash=False)
    skipped: int

    def path(self, split: Split, ending: str) -> epath.Path:
        return self.directory / f"{self.number:05d}.{split}.{ending}"

    def tokens(self, split: Split) -> ArrayFile:
        """The ids of all documents one after the other, each followed by eos."""
        return ArrayFile(self.path(split, "ids"), self.dtype)

    def lengths(self, split: Split) -> NDArray[np.int64]:
        """int64 [documents]: tokens of each document, eos included."""
        file = ArrayFile(self.path(split, "lengths.npy"))
        return file.read(0, len(file))


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A corpus in token ids."""

    source: Source
    vocab_size: int
    held_out: float
    shards: Sequence[CachedShard]

    def size(self, split: Split) -> SplitSize:
        return sum((shard.sizes[split] for shard in self.shards), SplitSize())

    @property
    def skipped(self) -> int:
        """Records that could not be read and were left out."""
        return sum(shard.skipped for shard in self.shards)

    def places(self, split: Split, shard: int, documents: Collection[int]) -> dict[int, str]:
        """Names the file, line or record of some of a shard's documents in a split; reads the shard again."""
        places = {}
        ordinal = 0
        for document in self.source.read(self.source.shards[shard], lambda reason: None):
            if is_held_out(document, self.held_out) == (split == "held_out"):
                if ordinal in documents:
                    places[ordinal] = self.source.place(self.source.shards[shard], document.number)
                ordinal += 1
        return places


def build_token_cache(
    source: Source,
    tokenizer: "Tokenizer",
    *,
    held_out: float,
    cache_dir: str,
    progress: Progress | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TokenCache:
    """Tokenises what the cache does not hold yet, and opens it.

    Several processes that share a cache directory each start at a part of their own, and skip what the
    others have finished by then.

    Raises:
      UserError: A document or a cache file cannot be read or written, ids are not of this vocabulary, or the
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
    total_bytes = sum(shard.size for shard in source.shards)
    done_bytes = 0
    done_tokens = 0
    cached: dict[int, CachedShard] = {}
    first = process_index * count // process_count
    order = [*range(first, count), *range(first)]
    opened = {number: _open_shard(directory, number, dtype) for number in order}
    missing = [number for number, shard in opened.items() if shard is None]
    shard_writer = _ShardWriter(source, tokenizer, held_out, directory, dtype)
    processes = min(_cores() // THREADS_A_PROCESS, MOST_PROCESSES, len(missing))
    with contextlib.ExitStack() as stack:
        write: Callable[[int, Callable[[int, int], None]], None] = shard_writer.write
        if processes > 1:
            finish = stack.enter_context(in_processes(shard_writer.write_missing, missing, processes))
            write = lambda number, report: finish(number)  # noqa: E731  # one of two ways
        for number in order:
            size = source.shards[number].size
            whole = opened[number] or _open_shard(directory, number, dtype)  # another may have written it
            if whole is None:
                write(number, _progress_of_part(progress, done_bytes, size, total_bytes, done_tokens))
                whole = _open_shard(directory, number, dtype)
            if whole is None:
                raise UserError(
                    f"The cache {directory} does not keep what is written to it; "
                    "set data.cache_dir elsewhere."
                )
            cached[number] = whole
            done_bytes += size
            done_tokens += sum(split_size.tokens for split_size in whole.sizes.values())
            if progress is not None:
                progress(done_bytes, total_bytes, done_tokens)
    _remove_leftovers(directory)
    cache = TokenCache(source, tokenizer.vocab_size, held_out, [cached[number] for number in range(count)])
    if not any(cache.size(split).documents for split in SPLITS):
        raise UserError(f"{source.name} has no documents ({cache.skipped} skipped); name another corpus.")
    return cache


def _progress_of_part(
    progress: Progress | None, bytes_before: int, size: int, total_bytes: int, tokens_before: int
) -> Callable[[int, int], None]:
    """Turns the bytes (at most `size` count) and tokens of one shard into progress of the corpus."""

    def report(shard_bytes: int, shard_tokens: int) -> None:
        if progress is not None:
            progress(bytes_before + min(shard_bytes, size), total_bytes, tokens_before + shard_tokens)

    return report


def _open_shard(directory: epath.Path, number: int, dtype: np.dtype[Any]) -> CachedShard | None:
    """A shard whose files have the sizes that its metadata gives, or None."""
    try:
        metadata = json.loads((directory / f"{number:05d}.json").read_text())
        sizes = {split: SplitSize(**metadata[split]) for split in SPLITS}
        shard = CachedShard(directory, number, dtype, sizes, int(metadata["skipped"]))
        for split, size in sizes.items():
            if shard.path(split, "ids").stat().length != size.tokens * dtype.itemsize:
                return None
            if shard.lengths(split).shape != (size.documents,):
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise cache_error(directory, error) from error
    return shard


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class _ShardWriter:
    """Tokenises shards into a cache."""

    source: Source
    tokenizer: "Tokenizer"
    held_out: float
    directory: epath.Path
    dtype: np.dtype[Any]

    def write_missing(self, number: int) -> None:
        """Writes a shard that nobody else has written yet, as one of several processes."""
        if _open_shard(self.directory, number, self.dtype) is None:
            self.write(number, lambda num_bytes, tokens: None, THREADS_A_PROCESS)

    def write(self, number: int, report: Callable[[int, int], None], threads: int = -1) -> None:
        """Writes a shard on so many threads (-1: all cores), reporting its bytes and tokens so far."""
        source, tokenizer, directory, dtype = self.source, self.tokenizer, self.directory, self.dtype
        shard = CachedShard(directory, number, dtype, {}, 0)
        skipped: list[str] = []
        with (
            replacing(shard.path("train", "ids")) as train_stream,
            replacing(shard.path("held_out", "ids")) as held_out_stream,
        ):
            train = _SplitWriter(train_stream, dtype, tokenizer.eos_id)
            held = _SplitWriter(held_out_stream, dtype, tokenizer.eos_id)
            batch = _Batch(tokenizer, threads)
            for document in source.read(source.shards[number], skipped.append):
                writer = held if is_held_out(document, self.held_out) else train
                writer.num_bytes += document.num_bytes
                if isinstance(document, TokenIds):
                    writer.append(_checked_ids(document, source, source.shards[number], tokenizer))
                    writer.end_document()
                elif batch.add(document, writer):
                    report(train.num_bytes + held.num_bytes, train.tokens + held.tokens)
            batch.write()
        sizes: dict[str, dict[str, int]] = {}
        writers: dict[Split, _SplitWriter] = {"train": train, "held_out": held}
        for split, writer in writers.items():
            save_array(shard.path(split, "lengths.npy"), np.array(writer.lengths, np.int64))
            sizes[split] = dataclasses.asdict(SplitSize(len(writer.lengths), writer.tokens, writer.num_bytes))
        about = {"source": source.name, "shard": dataclasses.asdict(source.shards[number])}
        metadata = {**sizes, "skipped": len(skipped), "first_skipped": skipped[:20], **about}
        with replacing(directory / f"{number:05d}.json") as stream:
            stream.write(json.dumps(metadata, indent=1).encode())


class _SplitWriter:
    """Appends documents to the id file of a split."""

    def __init__(self, stream: BinaryIO, dtype: np.dtype[Any], eos_id: int):
        self._stream = stream
        self._eos = np.array([eos_id], dtype)
        self._document_start = 0
        self.lengths: list[int] = []
        self.tokens = 0
        self.num_bytes = 0

    def append(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Adds ids to the document that is being written."""
        self._stream.write(np.asarray(ids, self._eos.dtype).tobytes())
        self.tokens += len(ids)

    def end_document(self) -> None:
        self._stream.write(self._eos.tobytes())
        self.tokens += 1
        self.lengths.append(self.tokens - self._document_start)
        self._document_start = self.tokens


class _Batch:
    """Blocks of documents on their way to be tokenised together, on several threads."""

    def __init__(self, tokenizer: "Tokenizer", threads: int):
        self._tokenizer = tokenizer
        self._threads = threads
        self._blocks: list[str] = []
        # In order: the next block goes to this writer, or (True) this writer's document ends.
        self._steps: list[tuple[_SplitWriter, bool]] = []
        self._characters = 0

    def add(self, document: Text | LongText, writer: _SplitWriter) -> bool:
        """Takes a document in, and says whether that filled the batch, which then was written."""
        written = False
        for block in document.blocks():
            self._blocks.append(block)
            self._steps.append((writer, False))
            self._characters += len(block)
            if self._characters >= _BATCH_CHARACTERS:
                self.write()
                written = True
        self._steps.append((writer, True))
        return written

    def write(self) -> None:
        ids = iter(self._tokenizer.encode_batch(self._blocks, self._threads))
        for writer, ends_document in self._steps:
            if ends_document:
                writer.end_document()
            else:
                writer.append(next(ids))
        self._blocks, self._steps, self._characters = [], [], 0


def _checked_ids(
    document: TokenIds, source: Source, shard: Shard, tokenizer: "Tokenizer"
) -> NDArray[np.int64]:
    """The ids without a bos in front and an eos behind. Raises UserError for ids that no document has."""
    ids = document.ids
    if len(ids) and ids[0] == tokenizer.bos_id:
        ids = ids[1:]
    if len(ids) and ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    if len(ids) and np.max(ids) >= tokenizer.vocab_size:
        raise UserError(
            f"{source.place(shard, document.number)} holds token id {np.max(ids)}, outside the vocabulary of "
            f"{tokenizer.vocab_size}; give its own tokenizer and width (uint16 or uint32)."
        )
    for name, control in (("pad", tokenizer.pad_id), ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if (ids == control).any():
            raise UserError(
                f"{source.place(shard, document.number)} holds the {name} id {control} inside; "
                "write one document a record, and give its own tokenizer and width (uint16 or uint32)."
            )
    return ids


def _remove_leftovers(directory: epath.Path) -> None:
    """Deletes temporary files of killed processes: those that nobody has written to for an hour."""
    if is_local(directory):
        for path in directory.glob("*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().mtime > 3600:
                    path.unlink()
