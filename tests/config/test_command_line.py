"""Configs from a command line, and the files that name them."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from gemma_jax.config import (
    ConvertConfig,
    DataConfig,
    OptimizerConfig,
    ParameterGroup,
    PretrainConfig,
    SampleConfig,
    TokenBias,
    load,
    parse,
    read_command,
    replace,
    to_json,
    validate,
)
from gemma_jax.errors import UserError
from tests.messages import naming


def leaves(config: Any, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """Type, default and meaning of every field, by dotted name."""
    found: dict[str, tuple[Any, Any, str]] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = (field.type, value, field.metadata.get("help", ""))
    return found


def another(annotation: Any, default: Any) -> tuple[list[str], Any]:
    """Returns a value other than the default: its words on a command line, and the value itself."""
    if annotation is bool:
        return [], True
    if typing.get_origin(annotation) is Literal:
        choice = next(choice for choice in typing.get_args(annotation) if choice != default)
        return [choice], choice
    if typing.get_origin(annotation) is tuple:
        kind = typing.get_args(annotation)[0]
        of_elements = {
            ParameterGroup: ("7 weight_decay=7", ParameterGroup("7", weight_decay=7.0)),
            TokenBias: ("7 bias=-7", TokenBias(7, -7.0)),
        }
        word, item = of_elements.get(kind) or ("7", kind("7"))
        return [word, word], (item, item)
    return ["77"], annotation(77)


@pytest.mark.parametrize("kind", [PretrainConfig, SampleConfig, ConvertConfig])
def test_every_field_can_be_set_and_help_has_its_meaning_and_default(
    kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option changes its own field, to the type that the field has, and no other."""
    with pytest.raises(SystemExit) as done:
        parse(kind(), ["--help"], "gemma test")
    assert done.value.code == 0
    # One entry an option, each on one line: descriptions are folded, so spaces are made one.
    text = capsys.readouterr().out
    entries = {
        match[1]: " ".join(match[0].split())
        for match in re.finditer(r"^  --([\w.]+).*\n(?:^ {10,}\S.*\n)*", text, re.MULTILINE)
    }
    fields = leaves(kind())
    assert entries.keys() == fields.keys()
    for name, (annotation, default, meaning) in fields.items():
        assert len(meaning) >= 10 and meaning.endswith("."), f"{name} has no meaning: {meaning!r}"
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert re.search(naming(meaning, shown or "empty"), entries[name]), name
        words, value = another(annotation, default)
        assert parse(kind(), [f"--{name}", *words], "gemma test") == replace(kind(), {name: value}), name


def grouped(*groups: ParameterGroup) -> PretrainConfig:
    return PretrainConfig(optimizer=OptimizerConfig(groups=groups))


@pytest.mark.parametrize(("text", "group"), [
    ("embedding learning_rate_factor=0.1  weight_decay=0", ParameterGroup("embedding", 0.1, 0.0)),
    ("*norm weight_decay=1e-3", ParameterGroup("*norm", None, 0.001)),
    # The first field may hold spaces and equals signs.
    ("a name=b c weight_decay=1 ", ParameterGroup("a name=b c", None, 1.0)),
    ("a=b", ParameterGroup("a=b")),
    ("embedding", ParameterGroup("embedding")),
    ("weight_decay=0", ParameterGroup("", None, 0.0)),
])  # fmt: skip
def test_a_small_dataclass_is_its_first_field_and_named_values(text: str, group: ParameterGroup) -> None:
    arguments = ["--optimizer.groups", text, "*"]
    assert parse(PretrainConfig(), arguments, "gemma test") == grouped(group, ParameterGroup("*"))


@pytest.mark.parametrize("arguments", [
    ["--top_k", "5", "--compute.scan_unroll", "2"],
    ["--top-k=4", "--top_k=5", "--compute.scan-unroll=2"],
])  # fmt: skip
def test_both_spellings_of_an_option(arguments: list[str]) -> None:
    config = parse(SampleConfig(), arguments, "gemma test")
    assert config == replace(SampleConfig(), {"top_k": 5, "compute.scan_unroll": 2})


def test_numbers_and_switches() -> None:
    config = parse(PretrainConfig(), ["--mesh.fsdp", "-1", "--optimizer.learning_rate", "1e-3"], "gemma test")
    assert config == PretrainConfig(optimizer=OptimizerConfig(learning_rate=0.001))
    assert parse(SampleConfig(json=True), ["--no-json"], "gemma test").json is False
    assert parse(SampleConfig(json=True), ["--no_json"], "gemma test").json is False


def test_tuples_are_lists_of_words_or_repeated_options_and_replace_the_default() -> None:
    sources = lambda *words: parse(PretrainConfig(), words, "gemma test").data.sources  # noqa: E731
    assert sources("--data.sources", "a", "b") == ("a", "b")
    assert sources("--data.sources", "a", "--data.sources", "b") == ("a", "b")
    assert sources() == DataConfig().sources


@pytest.mark.parametrize("text", ["a-b=c-d", "--top-k is an option", "__json", "-", "100%", "", "--", "--x"])
def test_the_value_of_an_option_is_left_as_it_was_typed(text: str) -> None:
    assert parse(SampleConfig(), [f"--prompt={text}", f"--stop={text}"], "gemma test") == SampleConfig(
        prompt=(text,), stop=(text,)
    )
    assert parse(PretrainConfig(), [f"--run-dir={text}"], "gemma test").run_dir == text


WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "type": (["--steps", "many"], ("--steps", "'many'")),
    "choice": (["--compute.remat", "all"], ("--compute.remat", "'all'")),
    "no value": (["--steps"], ("--steps", "expected")),
    "a dash": (["--run_dir", "-x"], ("--run_dir", "--run_dir=-x")),
    "a dash later": (["--data.sources", "a", "-x"], ("-x", "--OPTION=-x")),
    "typing slip": (
        ["--optimizer.learning_rat", "1"],
        ("--optimizer.learning_rat", "--optimizer.learning_rate"),
    ),
    "no section": (["--learning-rate=1"], ("--learning-rate", "--optimizer.learning_rate")),
    "one dash": (["-steps", "5"], ("-steps", "--steps")),
    "nothing like it": (["--zzzzzzzzzzzz", "5"], ("--zzzzzzzzzzzz (",)),
    "name in a group": (
        ["--optimizer.groups", "a weight_deca=1"],
        ("'weight_deca'", "weight_decay"),
    ),
    "value in a group": (["--optimizer.groups", "a weight_decay=x"], ("weight_decay", "'x'")),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG)
def test_wrong_options_end_in_one_sentence(arguments: list[str], told: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=naming(*told, "`gemma test --help`")) as error:
        parse(PretrainConfig(), arguments, "gemma test")
    assert "\n" not in str(error.value)


def test_the_words_of_a_command_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    def read(*arguments: str) -> tuple[list[str], PretrainConfig]:
        load = lambda a, b: PretrainConfig(run_dir=a + b)  # noqa: E731
        return read_command(
            arguments, "gemma test", "RUN STEP", PretrainConfig(), load=load, validate=validate
        )

    assert read("a", "b", "--steps", "500") == (["a", "b"], PretrainConfig(run_dir="ab", steps=500))
    for arguments in [(), ("a",), ("a", "--steps"), ("--steps", "5", "a", "b")]:
        with pytest.raises(UserError, match=naming("gemma test RUN STEP")):
            read(*arguments)
    with pytest.raises(UserError, match="^" + naming("steps", 0)):
        read("a", "b", "--steps", "0")
    with pytest.raises(UserError, match=naming("zzzz", "`gemma test a b --help`")):
        read("a", "b", "zzzz")
    for arguments in [("-h",), ("a", "--help"), ("a", "b", "--help")]:
        with pytest.raises(SystemExit):
            read(*arguments)
        assert "--steps INT" in capsys.readouterr().out


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that contains a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    source = "from gemma_jax.config import PretrainConfig\n\nconfig = PretrainConfig(steps=12)\n"
    (tmp_path / "configs" / "mine.py").write_text(source)
    (tmp_path / "run.v1").mkdir()
    (tmp_path / "run.v1" / "config.json").write_text(to_json(PretrainConfig(steps=13)))
    (tmp_path / "saved.json").write_text(to_json(PretrainConfig(steps=14)))
    return tmp_path


@pytest.mark.parametrize(("name", "steps", "experiment"), [
    ("mine", 12, "mine"),
    ("configs/mine.py", 12, "mine"),
    ("run.v1", 13, "run.v1"),
    ("run.v1/config.json", 13, "run.v1"),
    ("saved.json", 14, "saved"),
])  # fmt: skip
def test_what_a_config_may_be_called(home: Path, name: str, steps: int, experiment: str) -> None:
    config, called = load(name, PretrainConfig)
    assert (config.steps, called) == (steps, experiment)


def test_configs_beside_the_packages_source_are_found_from_anywhere(home: Path) -> None:
    assert load("demo", PretrainConfig)[1] == "demo"
    (home / "configs" / "demo.py").write_text(START + "config = PretrainConfig(steps=15)")
    assert load("demo", PretrainConfig)[0].steps == 15  # but those of the current folder come first


START = "from gemma_jax.config import *\n"
FILES: dict[str, tuple[str | bytes, tuple[object, ...]]] = {
    "syntax.py": (START + "config = (\n", ("syntax.py", 2, "'('")),
    "section.py": (
        START + "\nconfig = PretrainConfig(\n    optimizer=OptimizerConfig(learning_rat=1)\n)",
        ("section.py", 4, "TypeError", "'learning_rat'", "learning_rate"),
    ),
    "value.py": ("def f():\n  raise ValueError('odd\\nvalue')\nf()\n", ("value.py", 2, "ValueError", "odd")),
    "said.py": ("from gemma_jax.errors import UserError\nraise UserError('as it says')", ("as it says",)),
    "empty.py": ("", ("empty.py", "`config = PretrainConfig(...)`")),
    "type.py": (START + "config = PretrainConfig(steps='5')", ("type.py", "steps", "integer", "'5'")),
    "bytes.py": (b"config = '\xff'", ("bytes.py",)),
    "empty.json": ("", ("empty.json", "JSON")),
    "key.json": (
        '{"experiment": "pretrain", "stepz": 1}',
        ("key.json", "'stepz'", "steps"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)  # so that the file is named by a relative path, as people do
    content, told = FILES[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=naming(*told)):
        load(name, PretrainConfig)


def test_numbers_in_a_config_file_have_the_types_of_the_fields(home: Path) -> None:
    """A run compares its config with what was saved: 1 and 1.0 must not be two configs."""
    Path("whole.py").write_text(START + "config = PretrainConfig(optimizer=OptimizerConfig(weight_decay=1))")
    config, _ = load("whole.py", PretrainConfig)
    assert type(config.optimizer.weight_decay) is float


@pytest.mark.parametrize(("name", "told"), [
    ("mien", ("'mien'", "mine", "demo")),
    ("nothing.py", ("'nothing.py'", "demo")),
    ("x" * 5000, (f"'{'x' * 5000}'", "demo")),
])  # fmt: skip
def test_names_that_mean_nothing(home: Path, name: str, told: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=naming(*told)):
        load(name, PretrainConfig)
