"""Writes the shards of a token cache: reads examples, assigns them to splits and tokenises them."""

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from gemma_jax.data.cached_shard import CachedShard, SplitSize, open_shard
from gemma_jax.data.source import (
    SPLITS,
    BadRecord,
    Example,
    LongExample,
    LongText,
    Shard,
    Source,
    Split,
    Text,
    TokenIds,
    hash_of,
    split_documents,
)
from gemma_jax.data.storage import replacing, save_array
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from gemma_jax.tokenizer import Tokenizer

THREADS_A_PROCESS = 4
"""Tokenising threads per process. One process feeds no more: it reads, hashes and packs the ids in Python."""

_BATCH_CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Tokenises shards and writes them to a cache."""

    source: Source
    tokenizer: "Tokenizer"
    held_out: float
    directory: epath.Path
    dtype: np.dtype[Any]

    threads: int
    """The number of threads that tokenise; -1 uses all cores."""

    def write_missing(self, number: int) -> None:
        """Writes a shard, unless it is in the cache already."""
        if open_shard(self.directory, number, self.dtype) is not None:
            return
        source = self.source
        part = source.shards[number]
        shard = CachedShard(self.directory, number, self.dtype, weighted=source.weighted)
        skipped: list[BadRecord] = []
        shortened = 0
        digests = [hashlib.blake2b(digest_size=8) for _ in part.files]
        with contextlib.ExitStack() as stack:
            writers = {split: _SplitWriter(self, shard, split, stack) for split in SPLITS}
            for split, document in split_documents(source, part, self.held_out, skipped.append):
                shortened += isinstance(document, Example) and document.shortened
                if isinstance(document, Example) != source.weighted:
                    raise ValueError(f"{source.name} must yield examples exactly if it is weighted")
                digest = document.content_digest if isinstance(document, Example) else document.digest
                digests[document.number if len(digests) > 1 else 0].update(digest)
                if isinstance(document, Text | LongText):
                    writers[split].add_text(document)
                else:
                    writers[split].add_ids(document, self._checked_ids(document, part))
            for writer in writers.values():
                writer.write_texts()
        for split, writer in writers.items():
            for ending, counts in (("lengths", writer.lengths), ("trained", writer.trained))[
                : 1 + source.weighted
            ]:
                array = np.array(counts, np.int64)
                save_array(shard.path(split, f"{ending}.npy"), array)
                writer.checksums.append(zlib.crc32(array.tobytes()))
        dropped = sum(isinstance(error, LongExample) for error in skipped)
        metadata: dict[str, Any] = {
            **{split: dataclasses.asdict(writer.size()) for split, writer in writers.items()},
            "skipped": len(skipped) - dropped,
            "dropped": dropped,
            "shortened": shortened,
            "first_skipped": [str(error) for error in skipped[:20]],
            "source": source.name,
            "shard": dataclasses.asdict(part),
            "digests": [digest.hexdigest() for digest in digests],
            "weighted": source.weighted,
            "checksums": {split: writer.checksums for split, writer in writers.items()},
        }
        with replacing(self.directory / f"{number:05d}.json") as stream:
            stream.write(json.dumps(metadata | {"digest": hash_of(metadata)}, indent=1).encode())

    def _checked_ids(self, document: TokenIds | Example, part: Shard) -> NDArray[np.int64]:
        """Returns the ids to store; for a document, without a leading bos and a trailing eos.

        Raises:
          UserError: There are ids that a document or an example cannot hold.
        """
        ids, tokenizer = document.ids, self.tokenizer
        wrong = [
            f"token id {token}, outside the vocabulary of {tokenizer.vocab_size}"
            for token in ids[(ids < 0) | (ids >= tokenizer.vocab_size)][:1]
        ]
        if isinstance(document, TokenIds):
            ids = ids[1:] if len(ids) and ids[0] == tokenizer.bos_id else ids
            ids = ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_id else ids
            control = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
            wrong += [f"the {name} id {token} inside" for name, token in control.items() if token in ids]
        if wrong:
            raise UserError(
                f"{self.source.place(part, document.number)} holds {wrong[0]}; give its own tokenizer and "
                "width (uint16 or uint32), and one document a record."
            )
        return ids


class _SplitWriter:
    """Writes the documents and examples of a split to files, which `files` closes."""

    def __init__(self, job: ShardWriter, shard: CachedShard, split: Split, files: contextlib.ExitStack):
        self._tokenizer = job.tokenizer
        self._threads = job.threads
        self._dtype = shard.dtype
        self._ids = files.enter_context(replacing(shard.path(split, "ids")))
        if shard.weighted:
            self._weights = files.enter_context(replacing(shard.path(split, "weights")))
        self._blocks: list[str | None] = []
        """Blocks of text that are tokenised together; None marks the end of a document."""
        self._characters = 0
        self._length = 0
        """The number of tokens written so far of the current document."""
        self._num_bytes = 0
        self.lengths: list[int] = []
        self.trained: list[int] = []
        """The number of tokens of each example that have a weight above 0."""
        self.checksums = [0, 0]
        """The CRC-32 of the ids and of the weights written so far; at the end also of the counts."""

    def size(self) -> SplitSize:
        return SplitSize(len(self.lengths), sum(self.lengths), self._num_bytes)

    def add_text(self, document: Text | LongText) -> None:
        self._num_bytes += document.num_bytes
        for block in document.blocks():
            self._blocks.append(block)
            self._characters += len(block)
            if self._characters >= _BATCH_CHARACTERS:
                self.write_texts()
        self._blocks.append(None)

    def write_texts(self) -> None:
        """Tokenises and writes the blocks added since the last call."""
        texts = [block for block in self._blocks if block is not None]
        encoded = iter(self._tokenizer.encode_batch(texts, self._threads))
        for block in self._blocks:
            if block is None:
                self._append([self._tokenizer.eos_id])
                self._end()
            else:
                self._append(next(encoded))
        self._blocks, self._characters = [], 0

    def add_ids(self, document: TokenIds | Example, ids: NDArray[np.int64]) -> None:
        """Writes the ids of a document, followed by eos, or the ids and weights of an example."""
        self._append(ids)
        if isinstance(document, Example):
            self.trained.append(int(np.count_nonzero(document.weights)))
            weights = document.weights.tobytes()
            self._weights.write(weights)
            self.checksums[1] = zlib.crc32(weights, self.checksums[1])
        else:
            self._append([self._tokenizer.eos_id])
        self._end()

    def _append(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        written = np.asarray(ids, self._dtype).tobytes()
        self._ids.write(written)
        self.checksums[0] = zlib.crc32(written, self.checksums[0])
        self._length += len(ids)

    def _end(self) -> None:
        self.lengths.append(self._length)
        self._length = 0
