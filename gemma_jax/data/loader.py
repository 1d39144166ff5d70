"""Loads batches of packed rows. The data position is one integer: how many rows were consumed so far."""

import bisect
import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gemma_jax.config.sections import DataConfig, ExampleDataConfig
from gemma_jax.data import packing
from gemma_jax.data.documents import open_sources
from gemma_jax.data.packing import Batch, PairBatch
from gemma_jax.data.rows import Origin, PackedRows, find_limits
from gemma_jax.data.source import SPLITS, Source
from gemma_jax.data.statistics import SourceStatistics, source_statistics
from gemma_jax.data.token_cache import build_token_cache

if TYPE_CHECKING:
    from gemma_jax.tokenizer import Tokenizer

LocalRows = Sequence[int] | None
"""Which rows of a global batch to load: the indices that one host feeds, or None for all."""

_BATCHES_AHEAD = 4


class Loader:
    """An endless stream of training rows, in which row i is a function of the seed and i alone.

    Without weights, an epoch is every row of every source once, in an order that depends on the seed and the
    epoch. With weights, each source has its own epochs and order, and the sources are interleaved in a fixed
    pattern: in any stretch of the stream, the number of rows from each source is proportional to its weight,
    to within one row. The proportions are accurate to 1% (Grain rounds weights so that the smallest is 100).

    Grain's `MapDataset` computes the order. Its `shuffle` is a keyed permutation of row indices (four rounds
    of `index_shuffle`) with a new key each epoch, so no order is stored and any row can be found directly.
    """

    def __init__(self, rows: "Rows", weights: Sequence[float], seed: int):
        """Creates the stream from one weight for each source, or no weights."""
        import grain

        self._rows = rows
        self.num_rows = len(rows)
        """The number of rows of all sources together."""

        def shuffled(number: int, length: int) -> grain.MapDataset:
            # The key is a hash of the seed. Grain adds the epoch to it; with the seed itself, the second
            # epoch would have the order of the next seed's first epoch.
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
        """Returns rows `start_row` to `start_row + batch_size` of the stream, or `local_rows` of these.

        Raises:
          UserError: The cache was damaged or deleted.
        """
        wanted = range(batch_size) if local_rows is None else local_rows
        return self._rows.read([self._order[start_row + row] for row in wanted])

    def iterate(self, start_row: int, batch_size: int, local_rows: LocalRows = None) -> "BatchIterator":
        """Returns an endless iterator of batches from `start_row` on, read ahead on a background thread."""
        return BatchIterator(lambda row: self.batch(row, batch_size, local_rows), start_row, batch_size)

    def origin(self, row: int) -> list[Origin]:
        """Returns where each segment of a row of the stream comes from, in order. Takes seconds."""
        return self._rows.origin(self._order[row])


class HeldOut:
    """The held-out rows, in a fixed order."""

    def __init__(self, rows: "Rows"):
        self._rows = rows
        self.num_rows = len(rows)

    def batches(
        self, batch_size: int, max_rows: int | None = None, local_rows: LocalRows = None
    ) -> Iterator[Batch]:
        """Yields each row once, or `max_rows` evenly spaced rows. Empty rows fill up the last batch."""
        count = self.num_rows if max_rows is None else min(max_rows, self.num_rows)
        chosen: list[int | None] = [number * self.num_rows // count for number in range(count)]
        chosen += [None] * (-count % batch_size)
        wanted = range(batch_size) if local_rows is None else local_rows
        for start in range(0, len(chosen), batch_size):
            yield self._rows.read([chosen[start + row] for row in wanted])


class BatchIterator(Iterator[Batch]):
    """Iterates over batches that a background thread reads ahead. Close it, or use it in a `with` statement.

    `next_row` is the data position: the first row of the next batch that `next` returns. `wait_seconds` is
    the time that the consumer has spent waiting for batches. If the background thread fails to read a batch,
    `next` raises that error when it reaches the batch.
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
        """Ends the background thread. Batches read ahead are dropped; `next_row` does not change."""
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
    """The corpora of a config, tokenised, packed and opened for training."""

    train: Loader
    held_out: HeldOut
    statistics: tuple[SourceStatistics, ...]
    rows: tuple["Rows", "Rows"]
    """The rows to train on and those held out, in the order of the corpora."""
    trained_positions: int
    """The most positions of a row that have a loss weight above 0; all of them in corpora without weights."""

    @functools.cached_property
    def most_segments(self) -> int:
        """The largest number of segments in a row. Reads the indexes of all rows."""
        return max(source.most_segments for rows in self.rows for source in rows.sources)


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
    """Tokenises and packs the parts of the corpora that the cache does not hold yet, and opens the result.

    Args:
      data: The corpora and the shape of rows. `batch_size` is not used here.
      tokenizer: Makes token ids of text.
      seed: Decides the order of training rows; at least 0.
      progress: Called after each shard with the bytes of all corpora, the shard's bytes and its tokens.
      sources: Sources of examples to use instead of those that data.sources names.
      process_index, process_count: The index of this process and the number of processes that share the
        cache directory and divide the work.

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
    L = data.sequence_length
    shared = not isinstance(data, ExampleDataConfig) or data.packing == "on"
    limits = find_limits(caches, L, shared=shared)
    train, held_out = (
        Rows([PackedRows(cache, split, L, limits) for cache in caches], *ids) for split in SPLITS
    )
    statistics = tuple(map(source_statistics, train.sources, held_out.sources))
    loader = Loader(train, data.weights, seed)
    return Dataset(loader, HeldOut(held_out), statistics, (train, held_out), limits.trained)


class Rows:
    """The rows of several corpora, indexed consecutively: those of the first corpus come first."""

    def __init__(self, sources: Sequence[PackedRows], bos_id: int, pad_id: int):
        self.sources = sources
        self._bos_id = bos_id
        self._pad_id = pad_id
        self.firsts = [0, *itertools.accumulate(map(len, sources))][:-1]
        self.reference: NDArray[np.float32] | None = None
        """[rows, S]: `PairBatch.reference` of every row, where preferences need it."""

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def read(self, rows: Sequence[int | None]) -> Any:
        """Returns a `Batch` of these rows, or a `PairBatch` if there is a reference; None is an empty row."""
        batch = packing.empty_rows(len(rows), self.sources[0].sequence_length, self._pad_id)
        for slot, row in enumerate(rows):
            if row is not None:
                source = bisect.bisect_right(self.firsts, row) - 1
                self.sources[source].read_into(batch, slot, row - self.firsts[source], self._bos_id)
        if self.reference is not None:
            return PairBatch(batch, self.reference[[row or 0 for row in rows]])
        return batch

    def origin(self, row: int) -> list[Origin]:
        source = bisect.bisect_right(self.firsts, row) - 1
        return self.sources[source].origin(row - self.firsts[source])
