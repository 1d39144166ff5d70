import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest
from corpora import random_texts, write_texts

from gemma_jax.config.sections import DataConfig
from gemma_jax.data import source as source_module
from gemma_jax.data.loader import Dataset, Loader, prepare
from gemma_jax.data.packing import Batch
from gemma_jax.tokenizer import Tokenizer

LENGTH = 48


def config(folder: Path, counts: tuple[int, ...] = (60, 25), weights: tuple[float, ...] = ()) -> DataConfig:
    sources = tuple(
        write_texts(folder / f"texts{seed}", random_texts(count, seed)) for seed, count in enumerate(counts)
    )
    return DataConfig(
        sources=sources,
        weights=weights,
        held_out=0.2,
        sequence_length=LENGTH,
        cache_dir=str(folder / "cache"),
    )


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 8000)


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer, small_shards: None) -> Dataset:
    return prepare(config(tmp_path), tokenizer, seed=5)


def same(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def row_keys(batch: Batch) -> list[bytes]:
    return [
        tokens.tobytes() + targets.tobytes()
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True)
    ]


def test_an_epoch_is_every_row_once_and_the_next_has_another_order(dataset: Dataset) -> None:
    rows = dataset.train.num_rows
    first, second = (row_keys(dataset.train.batch(epoch * rows, rows)) for epoch in range(2))
    assert len(set(first)) == rows
    assert sorted(first) == sorted(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < rows / 4
    trained = sum(s.train.tokens for s in dataset.statistics)
    assert dataset.train.batch(0, rows).loss_weights.sum() == trained
    # Shuffled, not only rotated or reversed.
    order = [first.index(key) for key in second]
    assert 0.2 < np.mean(np.diff(order) > 0) < 0.8


@pytest.mark.parametrize(("hosts", "batch_size"), [(1, 4), (1, 6), (4, 4), (4, 12)])
def test_a_position_of_two_hosts_is_resumed_by_one_and_by_four(
    dataset: Dataset, hosts: int, batch_size: int
) -> None:
    whole = dataset.train.batch(0, 24)
    halves = [dataset.train.iterate(0, 4, range(h * 2, h * 2 + 2)) for h in range(2)]
    first = [joined([next(half) for half in halves]) for _ in range(3)]
    positions = {half.next_row for half in halves}
    for half in halves:
        half.close()
    assert positions == {12}
    share = batch_size // hosts
    with contextlib.ExitStack() as stack:
        resumed = [
            stack.enter_context(dataset.train.iterate(12, batch_size, range(h * share, (h + 1) * share)))
            for h in range(hosts)
        ]
        rest = [next(host) for _ in range(12 // batch_size) for host in resumed]
    assert {host.next_row for host in resumed} == {24}
    assert same(joined([*first, *rest]), whole)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.2, 0.8)])
def test_sources_are_mixed_by_weight(
    tmp_path: Path, tokenizer: Tokenizer, small_shards: None, weights: tuple[float, float]
) -> None:
    mixed = prepare(config(tmp_path, weights=weights), tokenizer, seed=1)
    plain = prepare(config(tmp_path), tokenizer, seed=1)
    first = plain.statistics[0].train_rows
    total = plain.train.num_rows
    single = prepare(config(tmp_path, counts=(60,)), tokenizer, seed=0)
    of_first = set(row_keys(single.train.batch(0, first)))
    assert len(of_first) == first < total
    stream = row_keys(mixed.train.batch(0, 4 * total))
    from_first = np.array([key in of_first for key in stream])
    share = weights[0] / sum(weights)
    assert abs(from_first.mean() - share) < 0.02
    # In any stretch of the stream, within a row.
    for start in range(0, len(stream) - 40, 17):
        assert abs(from_first[start : start + 40].sum() - 40 * share) <= 1.5
    # Each source goes through all of its rows before it comes to any again, in a new order then.
    mine = [key for key, is_first in zip(stream, from_first, strict=True) if is_first]
    epochs = [mine[start : start + first] for start in range(0, len(mine) - first + 1, first)]
    assert all(set(epoch) == of_first for epoch in epochs)
    if len(epochs) > 1:
        assert epochs[0] != epochs[1]
    again = prepare(config(tmp_path, weights=weights), tokenizer, seed=1)
    assert same(again.train.batch(777, 9), mixed.train.batch(777, 9))


def test_held_out_rows_come_once_in_a_fixed_order_and_the_last_batch_is_filled_up(dataset: Dataset) -> None:
    held = dataset.held_out
    size = 4 if held.num_rows % 4 else 5  # one that does not divide, so that the last batch is filled up
    batches = [*held.batches(size)]
    whole = joined(batches)
    filler = -held.num_rows % size
    assert filler and len(whole.tokens) == held.num_rows + filler
    assert whole.loss_weights.sum() == sum(source.held_out.tokens for source in dataset.statistics)
    assert not whole.loss_weights[-filler:].any() and not whole.segment_ids[-filler:].any()
    hosts = [[*held.batches(size, local_rows=rows)] for rows in (range(2), range(2, size))]
    assert all(same(joined([a, b]), batch) for a, b, batch in zip(*hosts, batches, strict=True))
    some = joined([*held.batches(2, max_rows=5)])
    assert len(some.tokens) == 6 and not some.loss_weights[5].any()
    keys = row_keys(whole)
    places = [keys.index(key) for key in row_keys(some)[:5]]
    assert places == sorted(set(places)) and places[-1] > held.num_rows / 2, "not evenly spread"


def test_an_error_of_the_reading_thread_reaches_the_consumer_and_close_ends_it(dataset: Dataset) -> None:
    class Failing(Loader):
        def __init__(self, inner: Loader):
            self.inner = inner

        def batch(self, start_row: int, batch_size: int, local_rows: object = None) -> Batch:
            if start_row >= 8:
                raise OSError("the disk is gone")
            return self.inner.batch(start_row, batch_size)

    threads = threading.active_count()
    iterator = Failing(dataset.train).iterate(0, 4)
    assert same(next(iterator), dataset.train.batch(0, 4))
    assert same(next(iterator), dataset.train.batch(4, 4))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(iterator)
    assert iterator.next_row == 8
    iterator.close()
    iterator.close()
    assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)


def test_too_few_documents_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for texts, says in (
        (["one"], "small"),
        (["one", "two"], "pieces"),
    ):
        tiny = DataConfig(
            sources=(write_texts(tmp_path / str(len(texts)), texts),), cache_dir=str(tmp_path / "cache")
        )
        dataset = prepare(tiny, tokenizer, 0)
        assert says in " ".join(dataset.statistics[0].sentences())
        assert dataset.train.num_rows == 1 and dataset.held_out.num_rows == len(texts) - 1
        assert len([*dataset.held_out.batches(4)]) == len(texts) - 1
