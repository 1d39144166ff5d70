"""Configs to JSON and back, whatever the JSON says."""

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.config import (
    PRESETS,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    ParameterGroup,
    PretrainConfig,
    differences,
    from_json,
    from_record,
    replace,
    to_dict,
    to_json,
    validate,
)
from gemma_jax.errors import UserError
from tests.messages import naming

# No field at its default where that shows something: tuples, floats, choices, signs.
EXAMPLE = PretrainConfig(
    run_dir="runs/\u00e9 \u4e2d",
    steps=7,
    model=PRESETS["gemma_tiny"],
    data=DataConfig(sources=("a/*.txt", "b.jsonl"), weights=(0.25, 2.0), bad_records="skip"),
    optimizer=OptimizerConfig(
        learning_rate=1e-30,
        epsilon=0.1 + 0.2,
        groups=(ParameterGroup("*norm", 0.5), ParameterGroup("embedding", weight_decay=0.0)),
    ),
    mesh=MeshConfig(data=-1, fsdp=2),
)


@pytest.mark.parametrize("config", [EXAMPLE, PretrainConfig()])
def test_json_and_back_is_the_same_config(config: PretrainConfig) -> None:
    text = to_json(config)
    again = from_json(text, "here")
    assert again == config and type(again) is type(config)
    assert to_json(again) == text and text.endswith("}\n")
    assert from_record(to_dict(config), "here") == config


def test_keys_that_are_left_out_keep_their_defaults() -> None:
    config = from_json('{"experiment": "pretrain", "optimizer": {"b2": 0.5}}', "here")
    assert config == PretrainConfig(optimizer=OptimizerConfig(b2=0.5))


def test_an_integer_is_a_number_but_true_is_not() -> None:
    config = from_json('{"experiment": "pretrain", "optimizer": {"learning_rate": 1}}', "here")
    assert type(config.optimizer.learning_rate) is float
    with pytest.raises(UserError, match=naming("optimizer.learning_rate", "number", "True")):
        from_json('{"experiment": "pretrain", "optimizer": {"learning_rate": true}}', "here")


PRETRAIN = '{"experiment": "pretrain", '
WRONG: dict[str, tuple[str, tuple[object, ...]]] = {
    "not JSON": ("{", ("JSON",)),
    "deeper than the parser goes": ("[" * 100_000, ("JSON",)),
    "unknown experiment": ('{"experiment": "pretrian"}', ("'pretrian'", "pretrain")),
    "the same key twice": (PRETRAIN + '"steps": 1, "steps": 2}', ("twice",)),
    "unknown key": (
        PRETRAIN + '"optimizer": {"learning_rat": 1}}',
        ("'optimizer.learning_rat'", "learning_rate"),
    ),
    "number for an integer": (PRETRAIN + '"steps": 1.5}', ("steps", "integer", 1.5)),
    "string for a list": (PRETRAIN + '"data": {"sources": "a"}}', ("data.sources", "list", "'a'")),
    "groups as runs had them before": (
        PRETRAIN + '"optimizer": {"groups": ["embedding weight_decay=0"]}}',
        ("optimizer.groups[0]", "pattern", "learning_rate_factor", "weight_decay", "'"),
    ),
    "unknown key of a group": (
        PRETRAIN + '"optimizer": {"groups": [{"patern": "a"}]}}',
        ("'optimizer.groups[0].patern'", "pattern"),
    ),
    "too large for a float": (
        PRETRAIN + '"optimizer": {"b1": 1' + "0" * 400 + "}}",
        ("optimizer.b1", "large"),
    ),
    "value too long to be shown whole": (PRETRAIN + '"steps": "' + "x" * 10**6 + '"}', ("steps", "integer")),
}


@pytest.mark.parametrize(("text", "told"), WRONG.values(), ids=WRONG)
def test_wrong_json_ends_in_one_short_sentence(text: str, told: tuple[object, ...]) -> None:
    with pytest.raises(UserError, match=naming(*told)) as error:
        from_json(text, "here.json")
    message = str(error.value)
    assert message.startswith("here.json") and "\n" not in message and len(message) < 400


# Any JSON value, with those that Python can hold and the fields cannot.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """The JSON of an example with values changed, keys renamed, added or removed, or characters damaged."""
    data: Any = to_dict(EXAMPLE)
    for _ in range(draw(st.integers(1, 3))):
        place = data
        while True:
            key = draw(st.sampled_from(sorted(place)))
            if not (isinstance(place[key], dict) and place[key] and draw(st.booleans())):
                break
            place = place[key]
        change = draw(st.sampled_from(["value", "remove", "rename", "add"]))
        value = draw(values)
        if change in ("remove", "rename"):
            value = place.pop(key)
        if change in ("rename", "add"):
            key = draw(st.text(max_size=8) | st.just(key + "s"))
        if change != "remove":
            place[key] = value
        if not data:
            break
    text = json.dumps(data)
    if draw(st.booleans()):
        start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 4))
        text = text[:start] + draw(st.text('{}[]",:0e.\\u', max_size=3)) + text[start + length :]
    return text


@settings(max_examples=400, deadline=None)
@given(mutated())
def test_damaged_json_gives_a_config_or_a_user_error_and_nothing_else(text: str) -> None:
    try:
        config = from_json(text, "here")
    except UserError:
        return
    assert type(config) is PretrainConfig
    assert to_json(from_json(to_json(config), "here")) == to_json(config)
    with contextlib.suppress(UserError):
        validate(config)


def test_replace_changes_the_named_fields_and_differences_finds_them() -> None:
    config, groups = PretrainConfig(), (ParameterGroup("*", 0.5),)
    changed = replace(config, {"steps": 3, "optimizer.b1": 0.5, "optimizer.groups": groups})
    assert changed == dataclasses.replace(config, steps=3, optimizer=OptimizerConfig(b1=0.5, groups=groups))
    assert config == PretrainConfig() and differences(config, config) == []
    assert differences(config, changed) == [
        ("steps", 1000, 3), ("optimizer.b1", 0.9, 0.5), ("optimizer.groups", (), groups),
    ]  # fmt: skip
