"""Batches of packed rows by number: one integer, the rows consumed so far, is the whole data position."""

import bisect
import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import numpy as np

from gemma_jax.config.sections import DataConfig
from gemma_jax.data import packing
from gemma_jax.data.documents import open_sources
from gemma_jax.data.packing import Batch
from gemma_jax.data.rows import Origin, PackedRows
from gemma_jax.data.source import SPLITS, Source
from gemma_jax.data.statistics import SourceStatistics, source_statistics
from gemma_jax.data.token_cache import build_token_cache

if TYPE_CHECKING:
    from gemma_jax.tokenizer import Tokenizer

LocalRows = Sequence[int] | None
"""Which rows of a global batch are wanted: the numbers that one host feeds, or all."""

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

    def __init__(self, rows: "Rows", weights: Sequence[float], seed: int):
        """Takes one weight for each source, or none."""
        import grain

        self._rows = rows
        self.num_rows = len(rows)
        """Rows of an epoch of all sources."""

        def shuffled(number: int, length: int) -> grain.MapDataset:
            # A hash of the seed: Grain adds the epoch to it, and must not meet the next seed's epochs there.
            key = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            return grain.MapDataset.range(length).shuffle(seed=key).repeat()

        if weights:
            orders = [
                shuffled(number, len(source)).map(lambda row, first=first: first + row)
                for number, (source, first) in enumerate(zip(rows.sources, rows.firsts, strict=True))
            ]
            self._order = grain.MapDataset.mix(orders, weights=list(weights))
        else:
            self._order = shuffled(0, self.num_rows)

    def batch(self, start_row: int, batch_size: int, local_rows: LocalRows = None) -> Batch:
        """Rows `start_row` to `start_row + batch_size` of the stream, or those that `local_rows` names.

        Raises:
          UserError: The cache was damaged or deleted.
        """
        wanted = range(batch_size) if local_rows is None else local_rows
        return self._rows.read([self._order[start_row + row] for row in wanted])

    def iterate(self, start_row: int, batch_size: int, local_rows: LocalRows = None) -> "BatchIterator":
        """Endless batches from `start_row` on, read ahead on a background thread."""
        return BatchIterator(lambda row: self.batch(row, batch_size, local_rows), start_row, batch_size)

    def origin(self, row: int) -> list[Origin]:
        """Where each segment of a row of the stream comes from, in order. Takes seconds."""
        return self._rows.origin(self._order[row])


class HeldOut:
    """The held-out rows, in a fixed order."""

    def __init__(self, rows: "Rows"):
        self._rows = rows
        self.num_rows = len(rows)

    def batches(
        self, batch_size: int, max_rows: int | None = None, local_rows: LocalRows = None
    ) -> Iterator[Batch]:
        """Each row once, or `max_rows` of them evenly spread; the last batch is filled up with empty rows."""
        count = self.num_rows if max_rows is None else min(max_rows, self.num_rows)
        chosen: list[int | None] = [number * self.num_rows // count for number in range(count)]
        chosen += [None] * (-count % batch_size)
        wanted = range(batch_size) if local_rows is None else local_rows
        for start in range(0, len(chosen), batch_size):
            yield self._rows.read([chosen[start + row] for row in wanted])


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
    progress: Callable[[int, int, int], None] = lambda total, num_bytes, tokens: None,
    *,
    sources: Sequence[Source] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Dataset:
    """Tokenises and packs what the cache does not hold yet, and opens it.

    Args:
      data: The corpora and the shape of rows. `batch_size` plays no part here.
      seed: Decides the order of training rows; at least 0.
      progress: Called for each shard with the bytes of all corpora, and its own bytes and tokens.
      sources: Sources of examples, in the place of those that data.sources names.
      process_index, process_count: Several processes that share a cache directory divide the work.

    Raises:
      UserError: A corpus is unknown, empty or unreadable, or the cache cannot be written.
    """
    if sources is None:
        sources = open_sources(data)
    total = sum(shard.size for source in sources for shard in source.shards)
    caches = [
        build_token_cache(
            source,
            tokenizer,
            held_out=data.held_out,
            cache_dir=data.cache_dir,
            progress=functools.partial(progress, total),
            process_index=process_index,
            process_count=process_count,
        )
        for source in sources
    ]
    ids = tokenizer.bos_id, tokenizer.pad_id
    train, held_out = (
        Rows([PackedRows(cache, split, data.sequence_length) for cache in caches], *ids) for split in SPLITS
    )
    statistics = tuple(map(source_statistics, train.sources, held_out.sources))
    return Dataset(Loader(train, data.weights, seed), HeldOut(held_out), statistics)


class Rows:
    """The rows of several corpora, numbered one corpus after the other."""

    def __init__(self, sources: Sequence[PackedRows], bos_id: int, pad_id: int):
        self.sources = sources
        self._bos_id = bos_id
        self._pad_id = pad_id
        self.firsts = [0, *itertools.accumulate(map(len, sources))][:-1]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def read(self, rows: Sequence[int | None]) -> Batch:
        """A batch of these rows; None is a row without a segment."""
        batch = packing.empty_rows(len(rows), self.sources[0].sequence_length, self._pad_id)
        for slot, row in enumerate(rows):
            if row is not None:
                source = bisect.bisect_right(self.firsts, row) - 1
                self.sources[source].read_into(batch, slot, row - self.firsts[source], self._bos_id)
        return batch

    def origin(self, row: int) -> list[Origin]:
        source = bisect.bisect_right(self.firsts, row) - 1
        return self.sources[source].origin(row - self.firsts[source])
