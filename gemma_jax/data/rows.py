"""Reads the packed rows of a cached corpus by index. The row indexes are stored beside the cache.

For each shard and split, `NNNNN.SPLIT.rows-L.pieces.npy` and `NNNNN.SPLIT.rows-L.starts.npy` hold the
`RowIndex` for rows of L tokens, and `NNNNN.SPLIT.rows-L.checksums.npy` holds a CRC-32 of each row, over its
pieces and their contents. `rows-L-T` are rows of examples with at most T trained tokens, and `rows-L-single`
rows of one example or group each. So damage
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
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_jax.data import packing
from gemma_jax.data.cached_shard import CachedShard, SplitSize
from gemma_jax.data.packing import Batch
from gemma_jax.data.source import SPLITS, Split
from gemma_jax.data.storage import ArrayFile, cache_error, save_array
from gemma_jax.data.token_cache import TokenCache
from gemma_jax.errors import UserError

_OPEN_SHARDS = 64
"""The most shards open at once, over all corpora. Each has up to five files; a common limit is 1,024."""

_MEASURED_SHARDS = 16
"""The most shards that are packed again and again to choose the limits of their rows."""


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

    def __init__(self, cache: TokenCache, split: Split, sequence_length: int, limits: "Limits | None" = None):
        """Opens the rows, and packs the shards that have no such index yet.

        Raises:
          UserError: The cache cannot be read or written, or an example is refused because it is too long.
        """
        self.cache = cache
        self.split = split
        self.sequence_length = sequence_length
        self._limits = limits or Limits(sequence_length)
        self._stored = cache.stored_split(split)
        weighted = f"-{self._limits.trained if self._limits.shared else 'single'}"
        self._index = f"rows-{sequence_length}" + (weighted if cache.source.weighted else "")
        _open_shard.cache_clear()  # a damaged file may have been replaced since it was opened
        self._shards = [shard for shard in cache.shards if shard.sizes[self._stored].documents]
        self._row_stops = list(itertools.accumulate(map(self._complete, range(len(self._shards)))))
        self.size = cache.size(self._stored)
        if cache.by_pieces:
            self._measure()

    def __len__(self) -> int:
        return self._row_stops[-1] if self._row_stops else 0

    @property
    def utilisation(self) -> float:
        """The share of all slots that hold a token; 1.0 if there are no rows."""
        slots = len(self) * self.sequence_length
        return self.size.tokens / slots if slots else 1.0

    @property
    def most_segments(self) -> int:
        """The largest number of segments in a row; 0 if there are no rows. Reads the index of every shard."""
        starts = (self._open(shard).starts for shard in self._shards)
        return max((int(np.diff(each.read(0, len(each))).max(initial=0)) for each in starts), default=0)

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
            pieces, sizes = self._pieces(shard)
            if self.cache.by_pieces:
                mine = self._held_out_groups[place] == (self.split == "held_out")
                pieces, sizes = pieces[np.repeat(mine, self.cache.source.group_size)], sizes[mine]
            built = packing.build_row_index(pieces, sizes, self.sequence_length)
            save_array(shard.path(self.split, f"{self._index}.pieces.npy"), built.pieces)
            save_array(shard.path(self.split, f"{self._index}.starts.npy"), built.starts)
            tokens, hundredths = shard.tokens(self._stored), shard.weights(self._stored)
            checksums = [_read_row(tokens, hundredths, built.row(i))[1] for i in range(len(built))]
            save_array(shard.path(self.split, f"{self._index}.checksums.npy"), np.array(checksums, np.uint32))
            _open_shard.cache_clear()
            return len(built)
        except OSError as error:
            raise cache_error(shard.path(self.split, self._index), error) from error

    def _pieces(self, shard: CachedShard) -> tuple[NDArray[Any], NDArray[np.integer[Any]]]:
        """Returns all pieces of a shard as PIECE, and the sizes that decide how many groups share a row.

        If pieces are held out, these are the pieces of both splits.
        """
        L = self.sequence_length
        if not shard.is_as_written(self._stored):
            raise _damaged(shard)
        if not self.cache.source.weighted:
            pieces = packing.cut_documents(shard.lengths(self._stored), L)
            return pieces, pieces["length"]
        lengths, trained = example_groups(self.cache, shard, self._stored, L)
        pieces = packing.cut_documents(shard.lengths(self._stored), L)
        if not self._limits.shared:
            return pieces, np.full(len(lengths), L)
        return pieces, packing.sizes_with_capacity(lengths, trained, L, self._limits.trained)

    @functools.cached_property
    def _held_out_groups(self) -> list[NDArray[np.bool_]]:
        """For each shard, a mask of the pieces (or groups of examples) that are held out.

        Held out are those whose ids have the smallest hashes, so equal pieces are always in the same split.
        At least one is held out, unless all are equal.
        """
        digests = []
        for shard in self._shards:
            groups = self._pieces(shard)[0].reshape(-1, self.cache.source.group_size)
            tokens = shard.tokens(self._stored)
            stops = (groups["offset"] + groups["length"])[:, -1].tolist()
            contents = map(tokens.read, groups["offset"][:, 0].tolist(), stops)
            hashes = [hashlib.blake2b(content.tobytes(), digest_size=8).digest() for content in contents]
            digests.append(np.frombuffer(b"".join(hashes), "<u8"))
        distinct = np.unique(np.concatenate(digests))
        count = min(max(round(self.cache.held_out * len(distinct)), 1), len(distinct) - 1)
        return [np.isin(each, distinct[:count]) for each in digests]

    def _measure(self) -> None:
        """Counts the tokens of rows that do not hold all of the stored split."""
        opened = map(self._open, self._shards)
        tokens = sum(int(each.pieces.read(0, len(each.pieces))["length"].sum()) for each in opened)
        self.size = dataclasses.replace(self.size, tokens=tokens)
        if self.split == "held_out":
            self.size = SplitSize(tokens=tokens)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many examples of a weighted source a row holds."""

    trained: int
    """The most trained tokens of a row."""
    shared: bool = True
    """Whether several examples (or groups) share a row."""


def find_limits(caches: Sequence[TokenCache], sequence_length: int, *, shared: bool) -> Limits:
    """Returns limits that all rows of some caches keep, with as few trained tokens in a row as is sensible.

    A limit that is close to the number of trained tokens in the average row saves work in the loss, but needs
    more rows: at most 5% more are allowed. If a source has no weights, all tokens of a row may be trained.

    Raises:
      UserError: An example, or a group, is longer than a row, or a cache cannot be read.
    """
    if not all(cache.source.weighted for cache in caches):
        return Limits(sequence_length)
    least, shards = 1, []
    for cache, split in itertools.product(caches, SPLITS):
        for shard in cache.shards if cache.stored_split(split) == split else ():
            lengths, trained = example_groups(cache, shard, split, sequence_length)
            least = max(least, int(trained.max(initial=0)))
            if split == cache.stored_split("train"):
                shards.append((lengths, trained))
    if not shared:
        return Limits(least, shared=False)
    chosen = shards[:: -(-len(shards) // _MEASURED_SHARDS)]
    return Limits(packing.smallest_trained_capacity(chosen, sequence_length, least))


def example_groups(
    cache: TokenCache, shard: CachedShard, stored: Split, sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the tokens, and those of them that are trained, of each group of examples of a weighted source.

    Returns:
      Two arrays, int64 [groups].

    Raises:
      UserError: A group is longer than a row, or the cache is damaged.
    """
    try:
        counts = shard.lengths(stored), shard.trained(stored)
    except OSError as error:
        raise cache_error(shard.path(stored, "lengths.npy"), error) from error
    if [zlib.crc32(each.tobytes()) for each in counts] != shard.checksums[stored][2:]:
        raise _damaged(shard)
    group_size = cache.source.group_size
    lengths, trained = (each.reshape(-1, group_size).sum(axis=1) for each in counts)
    for group in np.flatnonzero(lengths > sequence_length)[:1].tolist():
        first = group * group_size
        where = cache.places(stored, shard.number, {first})[first]
        raise UserError(
            f"{where} is an example of {lengths[group]:,} tokens, which does not fit into a row of "
            f"{sequence_length:,}; shorten it, or raise data.sequence_length."
        )
    return lengths, trained


def _damaged(shard: CachedShard) -> UserError:
    return UserError(
        f"The cache {shard.directory} is damaged at shard {shard.number}; delete that directory."
    )
