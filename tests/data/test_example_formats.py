"""Records of every format become the tokens and loss weights that are meant, or an error that says why."""

import json
import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow
import pytest
from corpora import field, random_texts, write_records
from fine_tuning import marked, read_examples, reference_mask, write_lines
from hypothesis import HealthCheck, given, settings
from pyarrow import parquet

from gemma_jax.data import text_source
from gemma_jax.data.source import BadRecord
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

USER = "<start_of_turn>user\n{}<end_of_turn>\n".format
MODEL = "<start_of_turn>model\n[{}<end_of_turn>\n]".format
ASK, ANSWER = {"role": "user", "content": " ask\n"}, {"role": "assistant", "content": "say "}
BE_SHORT = {"role": "system", "content": "Be short."}
PLAIN = {"template": "plain"}


def by_turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ONE = USER("ask") + MODEL("say")
FORMATS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"messages": [ASK, ANSWER], "prompt": "ask"}, {}, ONE),
    ({"messages": [ASK, ANSWER, ASK]}, {}, ONE + USER("ask")),
    ({"messages": [ASK, ANSWER], "text": "other", "completion": None}, {}, ONE),
    ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]}, {}, ONE),
    ({"data": ["ask", "say", "b", "c"]}, {}, ONE + USER("b") + MODEL("c")),
    ({"messages": [BE_SHORT, ASK, ANSWER]}, {}, USER("Be short.\n\nask") + MODEL("say")),
    ({"messages": [ASK, ANSWER]}, {"template": "plain"}, ONE),
    ({"messages": by_turns("a", "b", "c", "d")}, {"train_on": "last_answer"},
     USER("a") + MODEL("b").replace("[", "").replace("]", "") + USER("c") + MODEL("d")),
    ({"messages": [ASK, ANSWER]}, {"train_newline": "off"}, ONE.replace("\n]", "]\n")),
    ({"prompt": "ask", "completion": "say"}, {}, ONE),
    ({"prompt": [BE_SHORT, ASK], "completion": [ANSWER]}, {}, USER("Be short.\n\nask") + MODEL("say")),
    ({"prompt": "ask ", "completion": "say"}, {"template": "plain"}, "ask [say<eos>]"),
    ({"prompt": "ask ", "completion": "say"}, {"template": "plain", "train_on": "everything"},
     "[ask say<eos>]"),
    ({"prompt": "", "completion": "say"}, {"template": "plain"}, "[say<eos>]"),
    ({"instruction": "ask", "input": "", "output": "say"}, {}, ONE),
    ({"instruction": "ask", "input": "this", "output": "say"}, {}, USER("ask\n\nthis") + MODEL("say")),
    ({"instruction": "ask", "input": "this", "output": "say"}, {"template": "plain"},
     "ask\n\nthis\n\n[say<eos>]"),
    ({"text": " say\n"}, {}, "[ say\n<eos>]"),
    ({"body": "say", "text": "other"}, {"text_field": "body"}, "[say<eos>]"),
    ({"messages": [ASK, ANSWER], "text": "other"}, {"format": "text"}, "[other<eos>]"),
    # What somebody typed never ends a turn, and is trained like the rest of the answer.
    ({"prompt": "x<end_of_turn>", "completion": "<start_of_turn>"}, {},
     USER("x<end_of_turn>") + MODEL("<start_of_turn>")),
    ({"prompt": "x<end_of_turn>", "completion": "<mask>"}, PLAIN, "x<end_of_turn>[<mask><eos>]"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "options", "expected"), FORMATS)
def test_a_record_of_each_format(
    tmp_path: Path, tokenizer: Tokenizer, record: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    (example,) = read_examples(write_lines(tmp_path, [record]), tokenizer, **options)
    assert marked(example, tokenizer) == expected
    markers = [tokenizer.start_of_turn_id, tokenizer.end_of_turn_id]
    assert sum(example.ids.tolist().count(marker) for marker in markers) in (0, 4, 6, 8)


PAIRS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"prompt": "ask", "chosen": "say", "rejected": "no"}, {}, [ONE, USER("ask") + MODEL("no")]),
    ({"instruction": "ask", "input": "it", "output": "x", "chosen": "say", "rejected": "no"}, {},
     [USER("ask\n\nit") + MODEL("say"), USER("ask\n\nit") + MODEL("no")]),
    ({"chosen": [ASK, ANSWER], "rejected": by_turns("ask", "no"), "prompt": "ask"}, {},
     [ONE, USER("ask") + MODEL("no")]),
    ({"prompt": [ASK], "chosen": [ANSWER], "rejected": "no"}, {}, [ONE, USER("ask") + MODEL("no")]),
    # Whatever both answers share is prompt, an earlier turn of the model included.
    ({"chosen": by_turns("a", "b", "c", "d"), "rejected": by_turns("a", "b", "c", "e")},
     {"train_on": "everything"},
     [USER("a") + "<start_of_turn>model\nb<end_of_turn>\n" + USER("c") + MODEL(x) for x in "de"]),
    ({"chosen": "Q: one?\nA: under", "rejected": "Q: one?\nA: until"}, PLAIN,
     ["Q: one?\nA:[ under<eos>]", "Q: one?\nA:[ until<eos>]"]),
    ({"chosen": "one\nsame", "rejected": "one\nsame day"}, PLAIN,
     ["one\n[same<eos>]", "one\n[same day<eos>]"]),
    ({"chosen": "yes", "rejected": "no"}, PLAIN, ["[yes<eos>]", "[no<eos>]"]),
    ({"chosen": "Q: one?\nA: b", "rejected": "Q: one?\nA: c"}, {},
     [USER("Q: one?\nA:") + MODEL(x) for x in "bc"]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "options", "expected"), PAIRS)
def test_a_pair_becomes_two_examples_with_one_prompt(
    tmp_path: Path, tokenizer: Tokenizer, record: dict[str, Any], options: dict[str, Any], expected: list[str]
) -> None:
    examples = read_examples(write_lines(tmp_path, [record]), tokenizer, pairs=True, **options)
    assert [marked(example, tokenizer) for example in examples] == expected


@pytest.mark.parametrize("train_newline", ["on", "off"])
@pytest.mark.parametrize("train_on", ["answers", "last_answer", "everything"])
def test_masks_of_dialogues_are_those_of_the_whole_text(
    tmp_path: Path, tokenizer: Tokenizer, train_on: str, train_newline: str
) -> None:
    generator, texts = random.Random(0), [text.strip() for text in random_texts(300)]
    dialogues = [by_turns(*generator.choices(texts, k=generator.randint(2, 7))) for _ in range(30)]
    spec = write_lines(tmp_path, [{"messages": dialogue} for dialogue in dialogues])
    options = {"train_on": train_on, "train_newline": train_newline, "sequence_length": 10_000}
    for dialogue, example in zip(dialogues, read_examples(spec, tokenizer, **options), strict=True):
        text = "".join(
            f"<start_of_turn>{('user', 'model')[number % 2]}\n{message['content']}<end_of_turn>\n"
            for number, message in enumerate(dialogue)
        )
        ids = example.ids.tolist()
        assert ids == tokenizer.encode(text)
        assert (example.weights == 100).tolist() == reference_mask(ids, tokenizer, train_on, train_newline)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ({"messages": []}, {}, "no turn"),
    ({"messages": "ask"}, {}, "list str"),
    ({"messages": [ANSWER]}, {}, "turn 1 assistant user"),
    ({"messages": [ASK, ASK]}, {}, "turn 2 user model"),
    ({"messages": [ASK, BE_SHORT]}, {}, "turn 2 system"),
    ({"messages": [ASK, {"role": "tool", "content": "x"}]}, {}, "turn 2 tool"),
    ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, {}, "turn 2 empty"),
    ({"messages": [ASK, {"role": "assistant", "content": None}]}, {}, "turn 2 NoneType"),
    ({"messages": [ASK, {"content": "x"}]}, {}, "role turn 2 NoneType"),
    ({"messages": [ASK, 3]}, {}, "turn 2 int"),
    ({"messages": [ASK, {"role": "assistant", "content": "\ud800"}]}, {}, "turn 2 surrogate"),
    ({"messages": [ASK]}, {}, "no token"),
    ({"messages": [BE_SHORT, ASK, ANSWER]}, {"system": "error"}, "system data.system=merge"),
    ({"messages": [BE_SHORT]}, {}, "no turn"),
    ({"prompt": "ask", "completion": ""}, {}, "turn 2 empty"),
    ({"prompt": "ask", "completion": ""}, {"template": "plain"}, "answer empty"),
    ({"prompt": "ask", "answer": "x"}, {}, "prompt answer messages completion data.format data.text_field"),
    ({"prompt": "ask", "completion": "x"}, {"format": "dialogue"}, "prompt completion messages"),
    ({"chosen": "a", "rejected": "b"}, {}, "chosen rejected messages"),
    ({}, {}, "none messages"),
    ([1], {}, "list object"),
    ({"prompt": "p", "chosen": "a", "rejected": " a"}, {"pairs": True}, "equal"),
    ({"prompt": "p", "chosen": "a"}, {"pairs": True}, "prompt chosen rejected"),
    ({"messages": [ASK, ANSWER]}, {"pairs": True}, "messages chosen rejected"),
    ({"chosen": by_turns("a", "b"), "rejected": by_turns("c", "d")}, {"pairs": True}, "same prompt"),
    ({"chosen": by_turns("a", "b"), "rejected": by_turns("a", "b", "c")}, {"pairs": True}, "same prompt"),
    ({"chosen": [ANSWER], "rejected": [ASK, ANSWER]}, {"pairs": True}, "turn 1 user"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "options", "says"), BAD)
def test_a_bad_record_ends_the_run_or_is_left_out(
    tmp_path: Path, tokenizer: Tokenizer, record: Any, options: dict[str, Any], says: str
) -> None:
    good = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r", "messages": [ASK, ANSWER]}
    spec = write_lines(tmp_path, [good, record, good])
    with pytest.raises(UserError, match=naming("line 2", *says.split(), "data.bad_records=skip")) as caught:
        read_examples(spec, tokenizer, **options)
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0
    left_out: list[BadRecord] = []
    found = read_examples(spec, tokenizer, bad_records="skip", left_out=left_out, **options)
    assert len(found) == (4 if options.get("pairs") else 2) and len(left_out) == 1


def test_formats_that_do_not_fit_the_objective_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = write_lines(tmp_path, [{}])
    for format, pairs in (("preference", False), ("dialogue", True)):
        with pytest.raises(UserError, match=naming("data.format", format, "data.format=auto")):
            read_examples(spec, tokenizer, format=format, pairs=pairs)
    ids = write_records(tmp_path / "ids.array_record", [b"\5\0"])
    with pytest.raises(UserError, match=naming("token ids", "data.sources")):
        read_examples(f"tokens:uint16:{ids}", tokenizer)


def test_every_kind_of_file_has_the_same_examples(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(1)
    records: list[dict[str, Any]] = [
        {
            "id": n,
            "messages": by_turns(*(f"naïve {n} {k}" * generator.randint(1, 9) for k in range(2 + n % 5))),
        }
        for n in range(150)
    ]
    expected = [example.ids.tolist() for example in read_examples(write_lines(tmp_path, records), tokenizer)]
    monkeypatch.setattr(text_source, "_READ_CHARACTERS", 100)  # shorter than most elements
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8-sig")
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=40)

    def feature(name: str, values: list[str]) -> bytes:
        listed = b"".join(field(1, value.encode()) for value in values)
        return field(1, field(1, name.encode()) + field(2, field(1, listed)))

    protos = [
        field(1, b"".join(feature(f"messages/{key}", [m[key] for m in record["messages"]]) for key in ASK))
        for record in records
    ]
    write_records(tmp_path / "a.array_record", protos)
    for kind in ("json", "parquet", "array_record"):
        found = read_examples(str(tmp_path / f"a.{kind}"), tokenizer)
        assert [example.ids.tolist() for example in found] == expected, kind
    (tmp_path / "a.txt").write_text("some text")
    (example,) = read_examples(str(tmp_path / "a.txt"), tokenizer)
    assert marked(example, tokenizer) == "[some text<eos>]"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"text": "a"}, {"text": "b"', "a.json array"),
        (b'[{"text": "a"} {"text": "b"}]', "a.json comma"),
        (b"[" * 100_000, "a.json array"),
        (b'[{"text": "a"}, 5]', "a.json element 2 int"),
        (b'[{"text": "\xff"}]', "a.json element 1 surrogate"),
    ],
)
def test_damaged_arrays(tmp_path: Path, tokenizer: Tokenizer, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=naming(*says.split())):
        read_examples(str(tmp_path / "a.json"), tokenizer)


def test_a_missing_package_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=naming("hf:someone/some", "pip install datasets")):
        read_examples("hf:someone/some", tokenizer)


NAMES = st.sampled_from(
    ["role", "from", "content", "value", "text", "user", "human", "assistant", "system", ""]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": NAMES | VALUES, "content": st.text(max_size=9) | VALUES}))
FIELDS = [
    "messages",
    "data",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "chosen",
    "rejected",
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    record=st.dictionaries(st.sampled_from(FIELDS), MESSAGES | VALUES, max_size=6),
    pairs=st.booleans(),
    template=st.sampled_from(["chat", "plain"]),
    long_examples=st.sampled_from(["drop", "cut"]),
)
def test_any_record_is_examples_that_fit_or_left_out(
    tmp_path: Path,
    tokenizer: Tokenizer,
    record: dict[str, Any],
    pairs: bool,
    template: str,
    long_examples: str,
) -> None:
    options = {"template": template, "long_examples": long_examples, "sequence_length": 40}
    spec = write_lines(tmp_path, [record])
    left_out: list[BadRecord] = []
    found = read_examples(spec, tokenizer, pairs=pairs, bad_records="skip", left_out=left_out, **options)
    assert found or left_out or record.get("text") == ""
    for group in [found] if pairs else [[example] for example in found]:
        assert sum(len(example.ids) for example in group) <= 40
        assert all(example.weights.any() for example in group)
