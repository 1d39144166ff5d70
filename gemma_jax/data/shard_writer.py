"""Writes the shards of a token cache: reads, tokenises and splits the examples of each."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from gemma_jax.data.cached_shard import CachedShard, SplitSize, open_shard
from gemma_jax.data.source import (
    SPLITS,
    Example,
    LongText,
    Shard,
    Source,
    Split,
    Text,
    TokenIds,
    split_documents,
)
from gemma_jax.data.storage import replacing, save_array
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from gemma_jax.tokenizer import Tokenizer

THREADS_A_PROCESS = 4
"""Threads that one process can feed: reading, hashing and packing the ids are Python's own work."""

_BATCH_CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Tokenises shards into a cache."""

    source: Source
    tokenizer: "Tokenizer"
    held_out: float
    directory: epath.Path
    dtype: np.dtype[Any]

    threads: int
    """To tokenise on; -1: all cores."""

    def write_missing(self, number: int) -> None:
        """Writes a shard that nobody else has written yet."""
        if open_shard(self.directory, number, self.dtype) is not None:
            return
        source, tokenizer = self.source, self.tokenizer
        part = source.shards[number]
        shard = CachedShard(self.directory, number, self.dtype, {}, 0, weighted=source.weighted)
        skipped: list[str] = []
        digests = [hashlib.blake2b(digest_size=8) for _ in part.files]
        with contextlib.ExitStack() as stack:
            writers = {split: _SplitWriter(shard, split, tokenizer.eos_id, stack) for split in SPLITS}
            batch = _Batch(tokenizer, self.threads)
            for split, document in split_documents(source, part, self.held_out, skipped.append):
                writer = writers[split]
                writer.num_bytes += document.num_bytes
                if isinstance(document, Example) != source.weighted:
                    raise ValueError(f"{source.name} must yield examples exactly if it is weighted")
                digest = document.content_digest if isinstance(document, Example) else document.digest
                digests[document.number if len(digests) > 1 else 0].update(digest)
                if isinstance(document, Example):
                    _check_range(document.ids, source, part, document.number, tokenizer)
                    writer.append_example(document)
                elif isinstance(document, TokenIds):
                    writer.append(_checked_ids(document, source, part, tokenizer))
                    writer.end_document()
                else:
                    batch.add(document, writer)
            batch.write()
        sizes: dict[str, dict[str, int]] = {}
        for split, writer in writers.items():
            save_array(shard.path(split, "lengths.npy"), np.array(writer.lengths, np.int64))
            sizes[split] = dataclasses.asdict(SplitSize(len(writer.lengths), writer.tokens, writer.num_bytes))
        metadata = {
            **sizes,
            "skipped": len(skipped),
            "first_skipped": skipped[:20],
            "source": source.name,
            "shard": dataclasses.asdict(part),
            "digests": [digest.hexdigest() for digest in digests],
            "weighted": source.weighted,
        }
        with replacing(self.directory / f"{number:05d}.json") as stream:
            stream.write(json.dumps(metadata, indent=1).encode())


class _SplitWriter:
    """Appends documents and examples to the files of a split, which `files` closes."""

    def __init__(self, shard: CachedShard, split: Split, eos_id: int, files: contextlib.ExitStack):
        self._ids = files.enter_context(replacing(shard.path(split, "ids")))
        if shard.weighted:
            self._weights = files.enter_context(replacing(shard.path(split, "weights")))
        self._eos = np.array([eos_id], shard.dtype)
        self._document_start = 0
        self.lengths: list[int] = []
        self.tokens = 0
        self.num_bytes = 0

    def append(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Adds ids to the document that is being written."""
        self._ids.write(np.asarray(ids, self._eos.dtype).tobytes())
        self.tokens += len(ids)

    def end_document(self) -> None:
        self.append(self._eos)
        self._end()

    def append_example(self, example: Example) -> None:
        self.append(example.ids)
        self._weights.write(example.weights.tobytes())
        self._end()

    def _end(self) -> None:
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

    def add(self, document: Text | LongText, writer: _SplitWriter) -> None:
        """Takes a document in, and writes the batch where that fills it."""
        for block in document.blocks():
            self._blocks.append(block)
            self._steps.append((writer, False))
            self._characters += len(block)
            if self._characters >= _BATCH_CHARACTERS:
                self.write()
        self._steps.append((writer, True))

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
    _check_range(ids, source, shard, document.number, tokenizer)
    for name, control in (("pad", tokenizer.pad_id), ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if (ids == control).any():
            raise UserError(
                f"{source.place(shard, document.number)} holds the {name} id {control} inside; "
                "write one document a record, and give its own tokenizer and width (uint16 or uint32)."
            )
    return ids


def _check_range(
    ids: NDArray[np.int64], source: Source, shard: Shard, number: int, tokenizer: "Tokenizer"
) -> None:
    if len(ids) and not 0 <= np.min(ids) <= np.max(ids) < tokenizer.vocab_size:
        wrong = np.min(ids) if np.min(ids) < 0 else np.max(ids)
        raise UserError(
            f"{source.place(shard, number)} holds token id {wrong}, outside the vocabulary of "
            f"{tokenizer.vocab_size}; give its own tokenizer and width (uint16 or uint32)."
        )
