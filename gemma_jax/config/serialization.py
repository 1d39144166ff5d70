"""Converts configs to JSON and back. The JSON is not trusted: every key and type is checked."""

import dataclasses
import difflib
import json
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar

from gemma_jax.config.experiments import FinetuneConfig, PretrainConfig, TrainingConfig
from gemma_jax.config.sections import leaves
from gemma_jax.errors import UserError
from gemma_jax.paths import parse_json

Config = TypeVar("Config")

# By the name that a run records.
EXPERIMENTS: dict[str, type[TrainingConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}

# Shortens values for messages, however long or deeply nested they are.
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 100


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    """Returns `; did you mean X?` with the most similar known word, or "" if none is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def to_dict(config: TrainingConfig) -> dict[str, Any]:
    """Returns a config as a plain dictionary, with the kind of experiment under the key `experiment`."""
    kinds = [kind for kind, cls in EXPERIMENTS.items() if isinstance(config, cls)]
    return {"experiment": kinds[0], **dataclasses.asdict(config)}


def to_json(config: TrainingConfig) -> str:
    """Returns the resolved config as JSON, ending in a newline."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, origin: str) -> TrainingConfig:
    """Reads a config that `to_json` wrote.

    Args:
      text: The JSON.
      origin: Where the JSON comes from, for messages.

    Raises:
      UserError: The JSON is invalid, an experiment or key is unknown, or a value has another type.
    """
    return from_record(parse_json(text, origin), origin)


def from_record(data: Any, origin: str) -> TrainingConfig:
    """Reads a config from the dictionary that `to_dict` returned. See `from_json`."""
    if not isinstance(data, dict) or "experiment" not in data:
        raise UserError(f"{origin} has no key 'experiment', so it is not a config of gemma_jax.")
    kind = data["experiment"]
    if not isinstance(kind, str) or kind not in EXPERIMENTS:
        raise UserError(f"{origin}: experiment {_shown.repr(kind)} is not one of {', '.join(EXPERIMENTS)}.")
    fields = {key: value for key, value in data.items() if key != "experiment"}
    return from_dict(EXPERIMENTS[kind], fields, origin)


def from_dict(cls: type[Config], data: Any, origin: str, prefix: str = "") -> Config:
    """Creates a config of `cls` from plain data; missing keys keep their defaults.

    Raises:
      UserError: A key is unknown or a value has another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    if not isinstance(data, dict):
        raise UserError(
            f"{origin}: {prefix.rstrip('.') or 'the config'} must be an object with {', '.join(fields)}, not "
            f"{_shown.repr(data)}."
        )
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            raise UserError(
                f"{origin}: unknown key {_shown.repr(f'{prefix}{key}')}{suggestion(str(key), fields) or '.'}"
            )
        values[key] = _checked(fields[key].type, value, origin, f"{prefix}{key}")
    return cls(**values)


def _checked(annotation: Any, value: Any, origin: str, field: str) -> Any:
    """Returns `value` converted to `annotation`, or raises UserError if it has another type.

    An annotation is int, float, str, bool, a Literal, X | None, a tuple or a dataclass.
    """
    name = f"{origin}: {field}"
    kind, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return from_dict(typing.cast(type, annotation), value, origin, f"{field}.")
    if kind is types.UnionType:
        return None if value is None else _checked(arguments[0], value, origin, field)
    if kind is Literal:
        if value not in arguments:
            raise UserError(
                f"{name} must be one of {', '.join(map(str, arguments))}, not {_shown.repr(value)}."
            )
        return value
    if kind is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} must be a list, not {_shown.repr(value)}.")
        return tuple(_checked(arguments[0], item, origin, f"{field}[{i}]") for i, item in enumerate(value))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise UserError(f"{name} is {_shown.repr(value)}, too large for a number.") from error
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        wanted = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[annotation]
        raise UserError(f"{name} must be {wanted}, not {_shown.repr(value)}.")
    return value


def differences(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Returns dotted name, old value and new value of each field in which two configs of a class differ."""
    pairs = zip(leaves(before), leaves(now), strict=True)
    return [(name, then, value) for (name, _, then), (_, _, value) in pairs if then != value]


def within(name: str, sections: typing.Iterable[str]) -> bool:
    """Whether a dotted name is one of `sections` (or fields), or is inside one of them."""
    return any(f"{name}.".startswith(f"{section}.") for section in sections)


def replace(config: Config, changes: typing.Mapping[str, Any]) -> Config:
    """Returns `config` with changed fields, given by dotted name, as in {"optimizer.learning_rate": 1e-3}."""
    for name, value in changes.items():
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(config: Any, names: list[str], value: Any) -> Any:
    head, *rest = names
    return dataclasses.replace(
        config, **{head: _replaced(getattr(config, head), rest, value) if rest else value}
    )
