"""Batches of packed rows by number: one integer, the rows consumed so far, is the whole data position."""

import bisect
import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

from gemma_jax.config.sections import DataConfig
from gemma_jax.data import packing
from gemma_jax.data.documents import open_source
from gemma_jax.data.packing import Batch
from gemma_jax.data.rows import Origin, PackedRows
from gemma_jax.data.source import Source
from gemma_jax.data.statistics import SourceStatistics, source_statistics
from gemma_jax.data.token_cache import build_token_cache
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from gemma_jax.tokenizer import Tokenizer

LocalRows = slice | Sequence[int]
"""Which rows of a global batch are wanted: all of slice(None), or the numbers that one host feeds."""

Row = TypeVar("Row")

_BATCHES_AHEAD = 4


class Loader:
    """An endless stream of training rows, in which row i is a function of the seed and i alone.

    Without weights, an epoch is every row of every source once, in an order that the seed and the epoch
    decide. With weights, each source has epochs and orders of its own, and rows are taken from the sources in
    fixed turns: any stretch of the stream has them in proportion to the weights, within a row each. The
    proportions are kept to 1% (Grain rounds weights so that the smallest is 100).

    Grain's `MapDataset` computes the order; `shuffle` is a keyed permutation of row numbers (four rounds of
    `index_shuffle`), keyed anew each epoch, so that nothing is stored and any row is found directly.
    """

    def __init__(
        self,
        sources: Sequence[PackedRows],
        weights: Sequence[float],
        seed: int,
        *,
        bos_id: int,
        pad_id: int,
    ):
        """Raises UserError for weights that do not fit the sources."""
        self._rows = _Rows(sources, bos_id, pad_id)
        self.num_rows = len(self._rows)
        """Rows of an epoch of all sources."""
        if weights and len(weights) != len(sources):
            raise UserError(
                f"data.weights has {len(weights)} numbers for {len(sources)} sources; give one each, or none."
            )
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data.weights holds {weight:g}; give positive numbers or leave the source out."
                )
        import grain

        def shuffled(number: int, length: int) -> grain.MapDataset:
            # A hash of the seed: Grain adds the epoch to it, and must not meet the next seed's epochs there.
            key = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            return grain.MapDataset.range(length).shuffle(seed=key).repeat()

        if weights:
            firsts = self._rows.firsts
            self._order = grain.MapDataset.mix(
                [
                    shuffled(number, len(source)).map(lambda row, first=first: first + row)
                    for number, (source, first) in enumerate(zip(sources, firsts, strict=True))
                ],
                weights=list(weights),
            )
        else:
            self._order = shuffled(0, self.num_rows)

    def batch(self, start_row: int, batch_size: int, local_rows: LocalRows = slice(None)) -> Batch:
        """Rows `start_row` to `start_row + batch_size` of the stream, or those that `local_rows` names.

        Raises:
          UserError: The cache was damaged or deleted.
        """
        wanted = _select(range(start_row, start_row + batch_size), local_rows)
        return self._rows.read([self._order[row] for row in wanted])

    def iterate(
        self, start_row: int, batch_size: int, local_rows: LocalRows = slice(None)
    ) -> "BatchIterator":
        """Endless batches from `start_row` on, read ahead on a background thread."""
        return BatchIterator(lambda row: self.batch(row, batch_size, local_rows), start_row, batch_size)

    def origin(self, row: int) -> list[Origin]:
        """Where each segment of a row of the stream comes from, in order. Takes seconds."""
        return self._rows.origin(self._order[row])


class HeldOut:
    """The held-out rows, in a fixed order."""

    def __init__(self, sources: Sequence[PackedRows], *, bos_id: int, pad_id: int):
        self._rows = _Rows(sources, bos_id, pad_id)
        self.num_rows = len(self._rows)

    def batches(
        self, batch_size: int, max_rows: int | None = None, local_rows: LocalRows = slice(None)
    ) -> Iterator[Batch]:
        """Each row once, or `max_rows` of them evenly spread; the last batch is filled up with empty rows."""
        count = self.num_rows if max_rows is None else min(max_rows, self.num_rows)
        chosen: list[int | None] = [number * self.num_rows // count for number in range(count)]
        chosen += [None] * (-count % batch_size)
        for start in range(0, len(chosen), batch_size):
            yield self._rows.read(_select(chosen[start : start + batch_size], local_rows))


class BatchIterator(Iterator[Batch]):
    """Batches that a background thread reads ahead; close it, or use it in a `with`.

    `next_row` is the data position: the first row that no batch handed out so far has held. `wait_seconds` is
    the time that the consumer has spent waiting for batches. An error of the reading thread is raised by
    `next`, in its place in the stream.
    """

    def __init__(self, read: Callable[[int], Batch], start_row: int, batch_size: int):
        self.next_row = start_row
        self.wait_seconds = 0.0
        self._read = read
        self._batch_size = batch_size
        self._thread = ThreadPoolExecutor(1, "batches")
        self._ahead: collections.deque[Future[Batch]] = collections.deque()
        self._submitted = start_row
        self._fill()

    def __next__(self) -> Batch:
        if not self._ahead:
            raise RuntimeError("the batch iterator is closed")
        start = time.perf_counter()
        batch = self._ahead[0].result()
        self.wait_seconds += time.perf_counter() - start
        self._ahead.popleft()
        self.next_row += self._batch_size
        self._fill()
        return batch

    def close(self) -> None:
        """Ends the background thread; batches read ahead are dropped, and `next_row` stays."""
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self) -> None:
        while len(self._ahead) < _BATCHES_AHEAD:
            self._ahead.append(self._thread.submit(self._read, self._submitted))
            self._submitted += self._batch_size


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The corpora of a config, ready to be trained on."""

    train: Loader
    held_out: HeldOut
    statistics: tuple[SourceStatistics, ...]


def prepare(
    data: DataConfig,
    tokenizer: "Tokenizer",
    seed: int,
    progress: Callable[[int, int, int], None] | None = None,
    *,
    sources: Sequence[Source] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Dataset:
    """Tokenises and packs what the cache does not hold yet, and opens it.

    Args:
      data: The corpora and the shape of rows. `batch_size` plays no part here.
      seed: Decides the order of training rows; at least 0.
      progress: Called with bytes done, bytes in all, and tokens so far, over all corpora.
      sources: Sources of examples, in the place of those that data.sources names.
      process_index, process_count: Several processes that share a cache directory divide the work.

    Raises:
      UserError: A corpus is unknown, empty or unreadable; the cache cannot be written; weights do not fit.
    """
    if sources is None:
        sources = [
            open_source(spec, text_field=data.text_field, bad_records=data.bad_records)
            for spec in data.sources
        ]
    if not sources:
        raise UserError("data.sources is empty; name at least one corpus, such as python-stdlib.")
    total = sum(shard.size for source in sources for shard in source.shards)
    done = tokens = 0

    def add(more_bytes: int, more_tokens: int) -> None:
        nonlocal done, tokens
        done, tokens = done + more_bytes, tokens + more_tokens
        if progress is not None:
            progress(done, total, tokens)

    caches = [
        build_token_cache(
            source,
            tokenizer,
            held_out=data.held_out,
            cache_dir=data.cache_dir,
            progress=add,
            process_index=process_index,
            process_count=process_count,
        )
        for source in sources
    ]
    train = [PackedRows(cache, "train", data.sequence_length) for cache in caches]
    held_out = [PackedRows(cache, "held_out", data.sequence_length) for cache in caches]
    ids = {"bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    statistics = tuple(map(source_statistics, train, held_out))
    return Dataset(Loader(train, data.weights, seed, **ids), HeldOut(held_out, **ids), statistics)


class _Rows:
    """The rows of several corpora, numbered one corpus after the other."""

    def __init__(self, sources: Sequence[PackedRows], bos_id: int, pad_id: int):
        self._sources = sources
        self._bos_id = bos_id
        self._pad_id = pad_id
        self.firsts = [0, *itertools.accumulate(map(len, sources))][:-1]

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def read(self, rows: Sequence[int | None]) -> Batch:
        """A batch of these rows; None is a row without a segment."""
        batch = packing.empty_rows(len(rows), self._sources[0].sequence_length, self._pad_id)
        for slot, row in enumerate(rows):
            if row is not None:
                source = bisect.bisect_right(self.firsts, row) - 1
                self._sources[source].read_into(batch, slot, row - self.firsts[source], self._bos_id)
        return batch

    def origin(self, row: int) -> list[Origin]:
        source = bisect.bisect_right(self.firsts, row) - 1
        return self._sources[source].origin(row - self.firsts[source])


def _select(rows: Sequence[Row], local_rows: LocalRows) -> Sequence[Row]:
    if isinstance(local_rows, slice):
        return rows[local_rows]
    return [rows[number] for number in local_rows]
