"""Examples made of records, for tests, and an independent account of which of their tokens are trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.config import ExampleDataConfig
from gemma_jax.data.examples import open_example_sources
from gemma_jax.data.loader import Dataset, prepare
from gemma_jax.data.source import BadRecord, Example
from gemma_jax.tokenizer import Tokenizer


def write_lines(folder: Path, records: Sequence[Any]) -> str:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_examples(
    spec: str,
    tokenizer: Tokenizer,
    *,
    pairs: bool = False,
    left_out: list[BadRecord] | None = None,
    **settings: Any,
) -> list[Example]:
    """The examples of one corpus, in order. Records that are left out are appended to `left_out`."""
    (source,) = open_example_sources(ExampleDataConfig(sources=(spec,), **settings), tokenizer, pairs=pairs)
    skipped = [] if left_out is None else left_out
    found = [example for shard in source.shards for example in source.read(shard, skipped.append)]
    assert all(isinstance(example, Example) for example in found)
    return [example for example in found if isinstance(example, Example)]


def prepared(
    spec: str,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    pairs: bool = False,
    held_out: float = 0.0,
    **settings: Any,
) -> Dataset:
    data = ExampleDataConfig(sources=(spec,), cache_dir=str(folder), held_out=held_out, **settings)
    return prepare(data, tokenizer, 0, sources=open_example_sources(data, tokenizer, pairs=pairs))


def marked(example: Example, tokenizer: Tokenizer) -> str:
    """The text of an example with its trained tokens in brackets."""
    text, inside = "", False
    for token, weight in zip(example.ids.tolist(), example.weights.tolist(), strict=True):
        if inside != (weight > 0):
            inside = not inside
            text += "[" if inside else "]"
        text += "<eos>" if token == tokenizer.eos_id else tokenizer.decode([token])
    return text + ("]" if inside else "")


def reference_mask(ids: Sequence[int], tokenizer: Tokenizer, train_on: str, train_newline: str) -> list[bool]:
    """Which tokens of a dialogue are trained, read off the ids alone, as a person would.

    Every <end_of_turn> and every <start_of_turn> in `ids` must be a real one.
    """
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    (newline,) = tokenizer.encode("\n")
    model = tokenizer.encode("model")
    mask = [False] * len(ids)
    answers = []
    for at, token in enumerate(ids):
        if token == start and [*ids[at + 1 : at + 1 + len(model)]] == model:
            stop = [*ids].index(end, at)
            assert ids[at + 1 + len(model)] == newline == ids[stop + 1]
            answers.append((at + 2 + len(model), stop))
        if train_on == "everything":
            mask[at] = train_newline == "on" or not (token == newline and ids[at - 1] == end)
    for first, stop in answers[-1:] if train_on == "last_answer" else answers:
        mask[first : stop + 1] = [True] * (stop + 1 - first)
        mask[stop + 1] = train_newline == "on"
    return mask


def rows_of(dataset: Dataset) -> list[list[tuple[list[int], list[float]]]]:
    """The targets and weights of each segment of each row, those held out included."""
    batches = [dataset.train.batch(0, dataset.train.num_rows), *dataset.held_out.batches(1)]
    rows = []
    for batch in batches:
        for targets, weights, segments in zip(
            batch.targets, batch.loss_weights, batch.segment_ids, strict=True
        ):
            numbers = range(1, int(np.max(segments)) + 1)
            rows.append([(targets[segments == n].tolist(), weights[segments == n].tolist()) for n in numbers])
    return rows
