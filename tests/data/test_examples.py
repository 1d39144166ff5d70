"""Examples with loss weights: from a source through cache, row index and loader to the loss."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_jax.config.sections import DataConfig
from gemma_jax.data import source as source_module
from gemma_jax.data.loader import Dataset, prepare
from gemma_jax.data.packing import Batch
from gemma_jax.data.source import Document, Example
from gemma_jax.data.text_source import JsonLines
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

LENGTH = 48


class Completions(JsonLines):
    """Lines with the ids of a prompt, which is not trained, and of an answer, with a weight."""

    weighted = True

    def _document(self, record: Any, number: int) -> Document:
        fields = self._fields(record)
        prompt, answer, weight = fields["prompt"], fields["answer"], fields["weight"]
        weights = [0] * len(prompt) + [weight] * len(answer)
        split_by = b"" if self.group_size > 1 else repr(prompt).encode()
        return Example(prompt + answer, weights, number, split_by)


class Pairs(Completions):
    """Two lines with the same prompt are the two answers of a preference."""

    group_size = 2


def lines_of(count: int, answers: int = 1, longest: int = 20) -> list[dict[str, Any]]:
    generator = random.Random(0)

    def ids(most: int) -> list[int]:
        return [generator.randrange(300, 500) for _ in range(generator.randint(1, most))]

    return [
        {"prompt": prompt, "answer": ids(longest), "weight": generator.choice([1, 0.1, 2.5])}
        for prompt in [ids(12) for _ in range(count)]
        for _ in range(answers)
    ]


def dataset_of(
    folder: Path, tokenizer: Tokenizer, kind: type[Completions], lines: Sequence[dict[str, Any]]
) -> Dataset:
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "a.jsonl", ns=(1, 1))  # the same lines have the same cache
    config = DataConfig(held_out=0.2, sequence_length=LENGTH, cache_dir=str(folder / "cache"))
    source = kind("examples", [str(folder / "a.jsonl")], "", "error")
    return prepare(config, tokenizer, 3, sources=[source])


def segments(batch: Batch) -> list[tuple[list[int], list[int], list[float]]]:
    """Inputs, targets and weights of each segment of all rows."""
    return [
        (tokens[mine].tolist(), targets[mine].tolist(), weights[mine].tolist())
        for tokens, targets, weights, ids in zip(
            batch.tokens, batch.targets, batch.loss_weights, batch.segment_ids, strict=True
        )
        for mine in [ids == number for number in range(1, ids.max() + 1)]
    ]


def test_examples_come_once_each_in_one_piece_with_their_exact_weights(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 4000)
    lines = lines_of(200)
    dataset = dataset_of(tmp_path, tokenizer, Completions, lines)
    held_out = [segment for batch in dataset.held_out.batches(3) for segment in segments(batch)]
    found = [*segments(dataset.train.batch(0, dataset.train.num_rows)), *held_out]
    expected = []
    for line in lines:
        ids = line["prompt"] + line["answer"]
        weights = np.float32([0] * len(line["prompt"]) + [line["weight"]] * len(line["answer"]))
        expected.append(([2, *ids[:-1]], ids, weights.tolist()))
    assert sorted(found) == sorted(expected)
    assert len(held_out) > 10 and dataset.statistics[0].utilisation > 0.9


def test_rows_of_examples_name_their_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = lines_of(60)
    train = dataset_of(tmp_path, tokenizer, Completions, lines).train
    for row in range(12):
        origins = train.origin(row)
        shown = segments(train.batch(row, 1))
        for origin, (_, targets, _) in zip(origins, shown, strict=True):
            line = lines[int(origin.place.rsplit(" ", 1)[1]) - 1]
            assert targets == line["prompt"] + line["answer"]
            assert (origin.start, origin.stop) == (0, len(targets))


def test_pairs_stay_together_in_a_row_and_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = lines_of(80, answers=2, longest=12)
    dataset = dataset_of(tmp_path, tokenizer, Pairs, lines)
    partner = {}
    for chosen, rejected in zip(lines[::2], lines[1::2], strict=True):
        both = [line["prompt"] + line["answer"] for line in (chosen, rejected)]
        partner[tuple(both[0])] = both[1]
    pairs = 0
    for batch in [dataset.train.batch(0, dataset.train.num_rows), *dataset.held_out.batches(1)]:
        for row in range(len(batch.tokens)):
            found = [targets for _, targets, _ in segments(Batch(*(array[row : row + 1] for array in batch)))]
            assert all(partner[tuple(a)] == b for a, b in zip(found[::2], found[1::2], strict=True))
            pairs += len(found) // 2
    assert pairs == 80 and dataset.held_out.num_rows


def test_examples_longer_than_a_row_are_refused_by_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = lines_of(40)
    lines[7] = {"prompt": [300, 301], "answer": [302] * LENGTH, "weight": 1}
    for _ in range(2):
        with pytest.raises(UserError, match=naming("a.jsonl", "line 8", 50, 48, "data.sequence_length")):
            dataset_of(tmp_path, tokenizer, Completions, lines)


@pytest.mark.parametrize(
    "change", [{"weight": 0}, {"weight": -1}, {"weight": 3}, {"weight": 0.005}, {"weight": float("nan")}]
)
def test_weights_that_teach_nothing_or_do_not_fit_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=naming("line 2", "weight")):
        dataset_of(tmp_path, tokenizer, Completions, [*lines_of(1), {**lines_of(1)[0], **change}])


def test_damaged_weights_are_written_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = dataset_of(tmp_path, tokenizer, Completions, lines_of(40)).train.batch(0, 5)
    (path,) = (tmp_path / "cache").rglob("*.train.weights")
    path.write_bytes(path.read_bytes()[:10])
    again = dataset_of(tmp_path, tokenizer, Completions, lines_of(40)).train.batch(0, 5)
    assert (first.loss_weights == again.loss_weights).all()
