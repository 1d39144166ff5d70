"""Examples in rows: how long ones are cut, and how few positions of a row are trained."""

import random
from pathlib import Path
from typing import Any

import pytest
from corpora import random_texts
from fine_tuning import marked, prepared, read_examples, rows_of, write_lines

from gemma_jax.data import source as source_module
from gemma_jax.tokenizer import Tokenizer

LENGTH = 128


def dialogues(count: int, most_turns: int = 9, longest: int = 120) -> list[dict[str, Any]]:
    generator, texts = random.Random(0), random_texts(count, seed=5)

    def turn(number: int) -> dict[str, str]:
        return {
            "role": ("user", "assistant")[number % 2],
            "content": f"{number} " + generator.choice(texts)[: generator.randint(3, longest)],
        }

    return [{"messages": [turn(n) for n in range(generator.randint(2, most_turns))]} for _ in range(count)]


def test_long_dialogues_keep_as_many_turns_as_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = write_lines(tmp_path, dialogues(80, longest=300))
    whole = read_examples(spec, tokenizer, sequence_length=10_000)
    cut = {
        example.number: example
        for example in read_examples(spec, tokenizer, sequence_length=LENGTH, long_examples="cut")
    }
    end = tokenizer.end_of_turn_id
    shortened = 0
    for example in whole:
        ids = example.ids.tolist()
        # After each answer: the only places where a dialogue may be cut.
        ends = [i + 2 for i, token in enumerate(ids) if token == end][1::2]
        fitting = len(ids) if len(ids) <= LENGTH else max((i for i in ends if i <= LENGTH), default=0)
        left = cut.get(example.number)
        assert (left.ids.tolist() if left else []) == ids[:fitting]
        shortened += bool(left) and fitting < len(ids)
        assert left is None or left.shortened == (fitting < len(ids))
    assert shortened > 10 and len(whole) - len(cut) > 3
    for mode, counts in (("drop", (sum(len(e.ids) > LENGTH for e in whole), 0)),
                         ("cut", (len(whole) - len(cut), shortened))):  # fmt: skip
        data = prepared(spec, tokenizer, tmp_path / "c", sequence_length=LENGTH, long_examples=mode)
        statistics = data.statistics[0]
        assert (statistics.dropped, statistics.shortened) == counts
        assert all(str(count) in " ".join(statistics.sentences()) for count in counts if count)


def test_the_last_answer_is_the_last_that_is_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["a", "b", "c", "d", "e" * 300, "f"]
    messages = [{"role": ("user", "model")[i % 2], "content": text} for i, text in enumerate(texts)]
    options = {"long_examples": "cut", "sequence_length": 64, "train_on": "last_answer"}
    (example,) = read_examples(write_lines(tmp_path, [{"messages": messages}]), tokenizer, **options)
    assert "[d<end_of_turn>\n]" in marked(example, tokenizer) and "[b" not in marked(example, tokenizer)


def test_a_long_text_becomes_several_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (text,) = random_texts(1, seed=3)
    spec = write_lines(tmp_path, [{"text": text * 9}])
    (whole,) = read_examples(spec, tokenizer, sequence_length=10_000)
    parts = read_examples(spec, tokenizer, sequence_length=LENGTH, long_examples="cut")
    assert [token for part in parts for token in part.ids.tolist()] == whole.ids.tolist()
    assert max(len(part.ids) for part in parts) == LENGTH
    assert len({part.digest for part in parts}) == 1  # all of them are on one side
    assert [part.shortened for part in parts] == [True] + [False] * (len(parts) - 1)


def test_prompts_of_a_pair_are_cut_identically(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = []
    for record in dialogues(80, longest=500):
        prompt = record["messages"][: (len(record["messages"]) - 1) // 2 * 2 + 1]
        chosen, rejected = ([*prompt, {"role": "assistant", "content": text}] for text in ("yes" * 5, "n"))
        records.append({"chosen": chosen, "rejected": rejected})
    spec = write_lines(tmp_path, records)
    options = {"pairs": True, "sequence_length": 2 * LENGTH}
    whole = read_examples(spec, tokenizer, pairs=True, sequence_length=10_000)
    left = read_examples(spec, tokenizer, long_examples="cut", **options)
    shortened = 0
    for chosen, rejected in zip(left[::2], left[1::2], strict=True):
        before = [example.ids.tolist() for example in whole if example.number == chosen.number]
        gone = [len(a) - len(b.ids) for a, b in zip(before, (chosen, rejected), strict=True)]
        assert gone[0] == gone[1] and chosen.digest == rejected.digest
        for ids, example in zip(before, (chosen, rejected), strict=True):
            assert example.ids.tolist() == ids[gone[0] :]
            assert marked(example, tokenizer).startswith("<start_of_turn>user\n")
            assert marked(example, tokenizer).count("[") == 1
        shortened += gone[0] > 0
    assert shortened > 10 and 0 < len(left) < len(whole)
    for packing in ("on", "off"):
        data = prepared(
            spec, tokenizer, tmp_path / "c", long_examples="cut", packing=packing, held_out=0.2, **options
        )
        rows = rows_of(data)
        partner = {tuple(a.ids.tolist()): b.ids.tolist() for a, b in zip(left[::2], left[1::2], strict=True)}
        for row in rows:
            ids = [targets for targets, _ in row]
            assert [partner[tuple(chosen)] for chosen in ids[::2]] == ids[1::2]
        assert sum(len(row) for row in rows) == len(left) and data.held_out.num_rows
        assert data.most_segments == max(map(len, rows))
        assert packing == "on" or data.most_segments == 2
        assert data.statistics[0].shortened == shortened


@pytest.mark.parametrize("train_on", ["answers", "everything"])
def test_rows_keep_to_the_trained_positions(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, train_on: str
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 80_000)
    spec = write_lines(tmp_path, dialogues(400, most_turns=4))
    options: dict[str, Any] = {"sequence_length": 512, "held_out": 0.1, "train_on": train_on}
    data = prepared(spec, tokenizer, tmp_path / "c", **options)
    rows = rows_of(data)
    trained = [sum(weight > 0 for _, weights in row for weight in weights) for row in rows]
    assert max(trained) <= data.trained_positions
    expected = read_examples(spec, tokenizer, sequence_length=512, train_on=train_on)
    found = sorted((targets, weights) for row in rows for targets, weights in row)
    assert found == sorted((e.ids.tolist(), (e.weights / 100).tolist()) for e in expected)
    assert data.most_segments == max(map(len, rows)) > 2
    if train_on == "answers":
        assert data.trained_positions < 0.8 * 512
        n = data.train.num_rows
        assert data.trained_positions * n <= 1.3 * sum(trained[:n])
        again = prepared(spec, tokenizer, tmp_path / "other", **options)
        assert again.trained_positions == data.trained_positions and rows_of(again) == rows
    alone = rows_of(prepared(spec, tokenizer, tmp_path / "c", packing="off", **options))
    assert sorted(targets for row in alone for targets, _ in row) == [targets for targets, _ in found]
    assert {len(row) for row in alone} == {1}


@pytest.mark.parametrize("length", [1024, 2048])
def test_few_positions_of_real_dialogues_are_sent_to_the_vocabulary(
    shared_data: Path, tmp_path: Path, length: int
) -> None:
    tokenizer = Tokenizer.load(shared_data / "gemma_tokenizer" / "tokenizer.model")
    spec = str(shared_data / "oasst_en100" / "en_100_messages_best_path.jsonl")
    data = prepared(spec, tokenizer, tmp_path, sequence_length=length)
    rows = rows_of(data)
    trained = sum(weight > 0 for row in rows for _, weights in row for weight in weights)
    assert data.trained_positions * len(rows) <= 1.3 * trained
    tokens = sum(len(targets) for row in rows for targets, _ in row)
    assert len(rows) <= 1.1 * tokens / length + 1


def test_a_prompt_decides_the_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"prompt": f"question {n // 3}", "completion": f"answer {n}"} for n in range(300)]
    data = prepared(write_lines(tmp_path, records), tokenizer, tmp_path, held_out=0.3, sequence_length=64)
    held = [targets for batch in data.held_out.batches(1) for targets in [batch.targets]]
    texts = "".join(tokenizer.decode(targets.ravel().tolist()) for targets in held)
    numbers = {int(part.split("<")[0]) for part in texts.split("question ")[1:]}
    assert len(numbers) > 10 and texts.count("question ") == 3 * len(numbers)
