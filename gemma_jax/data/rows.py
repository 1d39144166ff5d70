"""Reads the packed rows of a cached corpus by index. The row indexes are stored beside the cache.

For each shard and split, `NNNNN.SPLIT.rows-L.pieces.npy` and `NNNNN.SPLIT.rows-L.starts.npy` hold the
`RowIndex` for rows of L tokens (`rows-L-whole` where examples are not cut), and
`NNNNN.SPLIT.rows-L.checksums.npy` holds a CRC-32 of each row, over its pieces and their contents. So damage
on the disk is detected when a damaged row is read, and no row need be checked in advance. A row never mixes
shards, so that an index depends on one shard's lengths only. If a corpus has too few documents to hold some
of them out, pieces of documents are held out instead; both splits then read the same file of ids.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_jax.data import packing
from gemma_jax.data.cached_shard import CachedShard, SplitSize
from gemma_jax.data.packing import Batch
from gemma_jax.data.source import Split
from gemma_jax.data.storage import ArrayFile, cache_error, save_array
from gemma_jax.data.token_cache import TokenCache
from gemma_jax.errors import UserError

_OPEN_SHARDS = 64
"""The most shards open at once, over all corpora. Each has up to five files; a common limit is 1,024."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a segment's targets come from: tokens `start` to `stop` of a document's body (which ends in eos).

    `place` names the document's file, line or record. `document` is the document's index among those of the
    split in the shard.
    """

    source: str
    place: str
    shard: int
    document: int
    start: int
    stop: int


class _OpenShard:
    """The open files of a shard's rows. `pieces` and `starts` are a `RowIndex` on disk, read by ranges."""

    def __init__(self, shard: CachedShard, stored: Split, split: Split, index: str):
        self.tokens = shard.tokens(stored)
        self.hundredths = shard.weights(stored)
        self.pieces = ArrayFile(shard.path(split, f"{index}.pieces.npy"))
        self.starts = ArrayFile(shard.path(split, f"{index}.starts.npy"))
        self.checksums = ArrayFile(shard.path(split, f"{index}.checksums.npy"))

    def row(self, number: int) -> NDArray[Any]:
        """Returns PIECE [pieces of the row]. Raises OSError and ValueError as `ArrayFile.read` does."""
        start, stop = self.starts.read(number, number + 2).tolist()
        return self.pieces.read(start, min(stop, len(self.pieces)))


def _read_row(
    tokens: ArrayFile, hundredths: ArrayFile | None, pieces: NDArray[Any]
) -> tuple[list[list[NDArray[Any]]], int]:
    """Returns the ids and, if there are any, the weights of each piece of a row; and the row's CRC-32."""
    stops = pieces["offset"] + pieces["length"]
    spans = list(zip(pieces["offset"].tolist(), stops.tolist(), strict=True))
    files = [tokens] if hundredths is None else [tokens, hundredths]
    contents = [[file.read(start, stop) for start, stop in spans] for file in files]
    checksum = zlib.crc32(pieces.tobytes())
    for content in itertools.chain(*contents):
        checksum = zlib.crc32(content.tobytes(), checksum)
    return contents, checksum


_open_shard = functools.lru_cache(_OPEN_SHARDS)(_OpenShard)


class PackedRows:
    """The rows of one split of one corpus, indexed from 0 in the order of its shards."""

    def __init__(self, cache: TokenCache, split: Split, sequence_length: int):
        """Opens the rows, and packs the shards that have no index for this length yet.

        Raises:
          UserError: The cache cannot be read or written, or an example is refused because it is too long.
        """
        source = cache.source
        if source.group_size > 1 and source.long_examples == "cut":
            raise ValueError(
                f"{source.name} has groups of examples, which are refused or truncated, never cut"
            )
        self.cache = cache
        self.split = split
        self.sequence_length = sequence_length
        self._stored = cache.stored_split(split)
        self._index = f"rows-{sequence_length}" + ("-whole" if source.long_examples != "cut" else "")
        _open_shard.cache_clear()  # a damaged file may have been replaced since it was opened
        self._shards = [shard for shard in cache.shards if shard.sizes[self._stored].documents]
        self._row_stops = list(itertools.accumulate(map(self._complete, range(len(self._shards)))))
        self.size = cache.size(self._stored)
        self.truncated = 0
        """The number of examples that are truncated in their row."""
        if cache.by_pieces or source.long_examples != "cut":
            self._measure()

    def __len__(self) -> int:
        return self._row_stops[-1] if self._row_stops else 0

    @property
    def utilisation(self) -> float:
        """The share of all slots that hold a token; 1.0 if there are no rows."""
        slots = len(self) * self.sequence_length
        return self.size.tokens / slots if slots else 1.0

    def read_into(self, batch: Batch, slot: int, row: int, bos_id: int) -> None:
        """Reads row `row` and writes it into row `slot`, which is empty, of a batch.

        Raises:
          UserError: The cache was damaged or deleted after it was opened.
        """
        place, local_row = self._locate(row)
        shard = self._shards[place]
        try:
            opened = self._open(shard)
            pieces = opened.row(local_row)
            if not len(pieces) or pieces["length"].min() < 1 or pieces["length"].sum() > self.sequence_length:
                raise ValueError("these pieces are no row")
            (bodies, *hundredths), checksum = _read_row(opened.tokens, opened.hundredths, pieces)
            if checksum != opened.checksums.read(local_row, local_row + 1)[0]:
                raise ValueError("this is not what was written")
        except OSError as error:
            raise cache_error(shard.path(self._stored, "ids"), error) from error
        except ValueError as error:
            raise _damaged(shard) from error
        weights = [each / np.float32(100) for each in hundredths[0]] if hundredths else None
        packing.fill_row(batch, slot, bodies, bos_id, weights)

    def origin(self, row: int) -> list[Origin]:
        """Returns where each segment of a row comes from, in order.

        This takes seconds, because it reads the shard's documents again.
        """
        place, local_row = self._locate(row)
        shard = self._shards[place]
        lengths = shard.lengths(self._stored)
        stops = np.cumsum(lengths)
        pieces = self._open(shard).row(local_row)
        documents = np.searchsorted(stops, pieces["offset"], side="right")
        starts = pieces["offset"] - (stops - lengths)[documents]
        places = self.cache.places(self._stored, shard.number, set(documents.tolist()))
        return [
            Origin(self.cache.source.name, places[document], shard.number, document, start, start + length)
            for document, start, length in zip(
                documents.tolist(), starts.tolist(), pieces["length"].tolist(), strict=True
            )
        ]

    def _locate(self, row: int) -> tuple[int, int]:
        place = bisect.bisect_right(self._row_stops, row)
        return place, row - (self._row_stops[place - 1] if place else 0)

    def _open(self, shard: CachedShard) -> _OpenShard:
        return _open_shard(shard, self._stored, self.split, self._index)

    def _complete(self, place: int) -> int:
        """Builds the index of a shard if it is missing or incomplete, and returns its number of rows."""
        shard = self._shards[place]
        try:
            with contextlib.suppress(FileNotFoundError, ValueError):  # not built yet, or incomplete
                opened = self._open(shard)
                end = opened.starts.read(len(opened.starts) - 1, len(opened.starts)).tolist()
                kinds_fit = opened.pieces.dtype == packing.PIECE and opened.starts.dtype == np.int64
                if (
                    kinds_fit
                    and end == [len(opened.pieces)]
                    and len(opened.checksums) == len(opened.starts) - 1
                ):
                    return len(opened.starts) - 1
            group_size = self.cache.source.group_size
            pieces = self._pieces(shard)
            if self.cache.by_pieces:
                mine = self._held_out_groups[place] == (self.split == "held_out")
                pieces = pieces[np.repeat(mine, group_size)]
            built = packing.build_row_index(pieces, self.sequence_length, group_size)
            save_array(shard.path(self.split, f"{self._index}.pieces.npy"), built.pieces)
            save_array(shard.path(self.split, f"{self._index}.starts.npy"), built.starts)
            tokens, hundredths = shard.tokens(self._stored), shard.weights(self._stored)
            checksums = [_read_row(tokens, hundredths, built.row(i))[1] for i in range(len(built))]
            save_array(shard.path(self.split, f"{self._index}.checksums.npy"), np.array(checksums, np.uint32))
            _open_shard.cache_clear()
            return len(built)
        except OSError as error:
            raise cache_error(shard.path(self.split, self._index), error) from error

    def _pieces(self, shard: CachedShard) -> NDArray[Any]:
        """Returns all pieces of a shard as PIECE; those of both splits if pieces are held out."""
        source = self.cache.source
        if not shard.is_as_written(self._stored):
            raise _damaged(shard)
        lengths = shard.lengths(self._stored)
        if source.long_examples == "cut":
            return packing.cut_documents(lengths, self.sequence_length)
        return packing.keep_examples(lengths, self.sequence_length, source.group_size)

    @functools.cached_property
    def _held_out_groups(self) -> list[NDArray[np.bool_]]:
        """For each shard, a mask of the pieces (or groups of examples) that are held out.

        Held out are those whose ids have the smallest hashes, so equal pieces are always in the same split.
        At least one is held out, unless all are equal.
        """
        digests = []
        for shard in self._shards:
            groups = self._pieces(shard).reshape(-1, self.cache.source.group_size)
            tokens = shard.tokens(self._stored)
            stops = (groups["offset"] + groups["length"])[:, -1].tolist()
            contents = map(tokens.read, groups["offset"][:, 0].tolist(), stops)
            hashes = [hashlib.blake2b(content.tobytes(), digest_size=8).digest() for content in contents]
            digests.append(np.frombuffer(b"".join(hashes), "<u8"))
        distinct = np.unique(np.concatenate(digests))
        count = min(max(round(self.cache.held_out * len(distinct)), 1), len(distinct) - 1)
        return [np.isin(each, distinct[:count]) for each in digests]

    def _measure(self) -> None:
        """Counts the tokens and truncated examples of rows that do not hold all of the stored split.

        Raises UserError if an example does not fit into a row and is to be refused.
        """
        tokens = 0
        for place, shard in enumerate(self._shards):
            opened = self._open(shard)
            pieces = opened.pieces.read(0, len(opened.pieces))
            tokens += int(pieces["length"].sum())
            if self.cache.source.long_examples != "cut":
                lengths = shard.lengths(self._stored)
                examples = np.searchsorted(np.cumsum(lengths), pieces["offset"], side="right")
                if max(examples) >= len(lengths):
                    raise _damaged(self._shards[place])
                shortened = examples[pieces["length"] < lengths[examples]]
                self.truncated += len(shortened)
                if len(shortened) and self.cache.source.long_examples == "refuse":
                    self._refuse(place, int(shortened[0]), int(lengths[shortened[0]]))
        self.size = dataclasses.replace(self.size, tokens=tokens)
        if self.cache.by_pieces and self.split == "held_out":
            self.size = SplitSize(tokens=tokens)

    def _refuse(self, place: int, example: int, length: int) -> None:
        shard = self._shards[place].number
        where = self.cache.places(self._stored, shard, {example})[example]
        raise UserError(
            f"{where} is an example of {length:,} tokens, which does not fit into a row of "
            f"{self.sequence_length:,}; shorten it, or raise data.sequence_length."
        )


def _damaged(shard: CachedShard) -> UserError:
    return UserError(
        f"The cache {shard.directory} is damaged at shard {shard.number}; delete that directory."
    )
