"""The packed rows of a cached corpus, read by number. Their index is kept beside the cache.

For each shard and split, `NNNNN.SPLIT.rows-L.pieces.npy` and `NNNNN.SPLIT.rows-L.starts.npy` hold the
`RowIndex` for rows of L tokens. Rows never mix shards, so that an index needs one shard's lengths only.
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma_jax.data import packing
from gemma_jax.data.packing import Batch
from gemma_jax.data.storage import ArrayFile, cache_error, save_array
from gemma_jax.data.token_cache import CachedShard, Split, TokenCache
from gemma_jax.errors import UserError

_OPEN_SHARDS = 64
"""Shards whose files stay open, over all corpora: each has three files, and 1,024 are a common limit."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a segment's targets come from: tokens `start` to `stop` of a document's body (which ends in eos).

    `place` names the document's file, line or record. `document` counts this split's documents in the shard.
    """

    source: str
    place: str
    shard: int
    document: int
    start: int
    stop: int


class _OpenIndex(NamedTuple):
    """A `RowIndex` that is read by ranges."""

    pieces: ArrayFile
    starts: ArrayFile

    def row(self, number: int) -> NDArray[Any]:
        """PIECE [pieces of the row]. OSError and ValueError as `ArrayFile.read` raises them."""
        start, stop = self.starts.read(number, number + 2).tolist()
        return self.pieces.read(start, min(stop, len(self.pieces)))


class _OpenShard(NamedTuple):
    tokens: ArrayFile
    rows: _OpenIndex


class PackedRows:
    """The rows of one split of one corpus, numbered from 0 in the order of its shards."""

    def __init__(self, cache: TokenCache, split: Split, sequence_length: int):
        """Packs the shards that have no index for this length yet.

        Raises:
          UserError: The cache cannot be read or written.
        """
        self.cache = cache
        self.split = split
        self.sequence_length = sequence_length
        _open_shard.cache_clear()  # a damaged file may have been replaced since it was opened
        self._shards = [shard for shard in cache.shards if shard.sizes[split].documents]
        counts = [len(_open_index(shard, split, sequence_length).starts) - 1 for shard in self._shards]
        self._row_stops = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._row_stops[-1] if self._row_stops else 0

    @property
    def utilisation(self) -> float:
        """Share of all slots that hold a token; 1.0 if there are no rows."""
        slots = len(self) * self.sequence_length
        return self.cache.size(self.split).tokens / slots if slots else 1.0

    def read_into(self, batch: Batch, slot: int, row: int, bos_id: int) -> None:
        """Writes row number `row` into an empty row of a batch.

        Raises:
          UserError: The cache was damaged or deleted after it was opened.
        """
        place, local_row = self._locate(row)
        shard = self._shards[place]
        try:
            opened = _open_shard(shard, self.split, self.sequence_length)
            pieces = opened.rows.row(local_row)
            stops = pieces["offset"] + pieces["length"]
            bodies = [
                opened.tokens.read(start, stop)
                for start, stop in zip(pieces["offset"].tolist(), stops.tolist(), strict=True)
            ]
        except OSError as error:
            raise cache_error(shard.path(self.split, "ids"), error) from error
        except ValueError as error:
            raise _damaged(shard) from error
        whole = (
            [len(body) for body in bodies] == pieces["length"].tolist()
            and 0 < sum(map(len, bodies)) <= self.sequence_length
            and all(len(body) > 0 and body.max() < self.cache.vocab_size for body in bodies)
        )
        if not whole:
            raise _damaged(shard)
        packing.fill_row(batch, slot, bodies, bos_id)

    def origin(self, row: int) -> list[Origin]:
        """Where each segment of a row comes from, in order. Reads the shard's documents again: seconds."""
        place, local_row = self._locate(row)
        shard = self._shards[place]
        lengths = shard.lengths(self.split)
        stops = np.cumsum(lengths)
        pieces = _open_shard(shard, self.split, self.sequence_length).rows.row(local_row)
        documents = np.searchsorted(stops, pieces["offset"], side="right")
        starts = pieces["offset"] - (stops - lengths)[documents]
        places = self.cache.places(self.split, shard.number, set(documents.tolist()))
        return [
            Origin(self.cache.source.name, places[document], shard.number, document, start, start + length)
            for document, start, length in zip(
                documents.tolist(), starts.tolist(), pieces["length"].tolist(), strict=True
            )
        ]

    def _locate(self, row: int) -> tuple[int, int]:
        place = bisect.bisect_right(self._row_stops, row)
        return place, row - (self._row_stops[place - 1] if place else 0)


@functools.lru_cache(_OPEN_SHARDS)
def _open_shard(shard: CachedShard, split: Split, sequence_length: int) -> _OpenShard:
    return _OpenShard(shard.tokens(split), _open_index(shard, split, sequence_length))


def _open_index(shard: CachedShard, split: Split, sequence_length: int) -> _OpenIndex:
    """The index beside the shard, which is built where it is missing or not whole."""
    pieces_path = shard.path(split, f"rows-{sequence_length}.pieces.npy")
    starts_path = shard.path(split, f"rows-{sequence_length}.starts.npy")
    try:
        with contextlib.suppress(FileNotFoundError, ValueError):  # not built yet, or not whole
            index = _OpenIndex(ArrayFile(pieces_path), ArrayFile(starts_path))
            end = index.starts.read(len(index.starts) - 1, len(index.starts)).tolist()
            kinds_fit = index.pieces.dtype == packing.PIECE and index.starts.dtype == np.int64
            if kinds_fit and end == [len(index.pieces)]:
                return index
        lengths = shard.lengths(split)
        if lengths.sum() != shard.sizes[split].tokens or np.min(lengths) < 1:
            raise _damaged(shard)
        built = packing.build_row_index(lengths, sequence_length)
        save_array(pieces_path, built.pieces)
        save_array(starts_path, built.starts)
        return _OpenIndex(ArrayFile(pieces_path), ArrayFile(starts_path))
    except OSError as error:
        raise cache_error(pieces_path, error) from error


def _damaged(shard: CachedShard) -> UserError:
    return UserError(
        f"The cache {shard.directory} is damaged at shard {shard.number}; delete that directory."
    )
