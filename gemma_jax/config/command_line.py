"""Reads configs from a command line: there is one option for each field, named by its dotted path."""

import argparse
import dataclasses
import itertools
import os
import re
import runpy
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gemma_jax.config import sections
from gemma_jax.config.experiments import TrainingConfig
from gemma_jax.config.sections import leaves
from gemma_jax.config.serialization import EXPERIMENTS, from_dict, from_json, replace, suggestion
from gemma_jax.errors import UserError
from gemma_jax.paths import read_text

Config = TypeVar("Config")
Training = TypeVar("Training", bound=TrainingConfig)


# argparse drops a value `--` (cpython issue 109475), so it is replaced by another word while parsing.
_DASHES, _MARKED_DASHES = "--", "--\0"


class _Parser(argparse.ArgumentParser):
    given: Sequence[str] = ()  # the arguments being parsed

    def error(self, message: str) -> NoReturn:
        if missing := re.match(r"argument (--\S+): expected", message):
            following = [b for a, b in itertools.pairwise(self.given) if a == missing[1]]
            if following and following[-1] not in self._option_string_actions:
                message += f"; a value that begins with a dash is written {missing[1]}={following[-1]}"
        raise UserError(f"{message} (see `{self.prog} --help`).")


def _add_options(parser: argparse.ArgumentParser, config: Any) -> None:
    """Adds one option for each leaf field of `config`; each section is a titled group."""
    groups: dict[str, Any] = {"": parser}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(section := getattr(config, field.name)):
            groups[field.name] = parser.add_argument_group(field.name, type(section).__doc__)
    for name, field, default in leaves(config):
        shown = " ".join(map(_shown, default)) if isinstance(default, tuple) else str(default)
        # argparse formats help with %, so a literal one is doubled.
        meaning = f"{field.metadata['help']} (default: {shown or 'empty'})".replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": meaning}
        origin, arguments = typing.get_origin(field.type), typing.get_args(field.type)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif origin is Literal:
            options["choices"] = arguments
        elif origin is tuple:
            # Both `--prompt A --prompt B` and `--data.sources A B` are accepted.
            options |= {"type": _reader(arguments[0]), "nargs": "+", "action": "extend"}
            options["metavar"] = _form(arguments[0])
        else:
            options |= {"type": _reader(field.type), "metavar": _form(field.type)}
        groups[name.rpartition(".")[0]].add_argument(f"--{name}", **options)


def _form(kind: Any) -> str:
    """Returns the form of a value for `--help`: FLOAT; 'PATTERN weight_decay=FLOAT' for a small dataclass."""
    if not dataclasses.is_dataclass(kind):
        return str(_scalar(kind).__name__).upper()
    first, *rest = dataclasses.fields(kind)
    return " ".join([f"'{first.name.upper()}", *(f"{f.name}={_form(f.type)}" for f in rest)]) + "'"


def _scalar(annotation: Any) -> Any:
    """Returns the type that converts text to a value of `annotation`: X for `X | None`."""
    return (typing.get_args(annotation) or (annotation,))[0]


def _converted(annotation: Any, name: str, text: str) -> Any:
    """Returns the value of the field `name` of a small dataclass."""
    try:
        return _scalar(annotation)(text)
    except ValueError as error:
        wanted = _scalar(annotation).__name__
        raise argparse.ArgumentTypeError(f"invalid {wanted} value of {name}: {text!r}") from error


def _shown(value: Any) -> str:
    """Returns an element of a tuple as it is written on a command line."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    first, *rest = (getattr(value, field.name) for field in dataclasses.fields(value))
    names = [field.name for field in dataclasses.fields(value)][1:]
    words = [f"{name}={x}" for name, x in zip(names, rest, strict=True) if x is not None]
    return repr(" ".join([str(first), *words]))


def _reader(kind: Any) -> Callable[[str], Any]:
    """Returns a function that converts the text of an option to a value of `kind`."""

    def read(text: str) -> Any:
        text = _DASHES if text == _MARKED_DASHES else text
        return _element(kind, text) if dataclasses.is_dataclass(kind) else kind(text)

    read.__name__ = kind.__name__  # argparse's messages show this name
    return read


def _element(kind: Any, text: str) -> Any:
    """Parses a small dataclass: its first field, then `name=value` words, as in 'embedding weight_decay=0'.

    The first field may contain spaces and equals signs: only words at the end with known names set others.

    Raises:
      argparse.ArgumentTypeError: A name is unknown or given twice, or a value has another type.
    """
    first, *rest = dataclasses.fields(kind)
    types = {field.name: field.type for field in rest}
    values: dict[str, Any] = {}
    text = text.strip()
    while word := re.search(r"(?:^|\s)(\w+)=(\S*)$", text):
        name, value = word.groups()
        if name not in types and not word.start():
            break
        hint = suggestion(name, types) or f"; the names are {', '.join(types)}"
        if name not in types:
            raise argparse.ArgumentTypeError(f"{text!r} sets {name!r}{hint}")
        if name in values:
            raise argparse.ArgumentTypeError(f"{name} is given twice")
        values[name] = _converted(types[name], name, value)
        text = text[: word.start()].rstrip()
    try:
        values = {first.name: _converted(first.type, first.name, text), **values}
        return from_dict(kind, values, kind.__name__)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def parse(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """Returns `config` with the fields that `arguments` override (`--section.field value`).

    `--help` prints every field with its type, default and meaning, and exits.

    Raises:
      UserError: An option is unknown (the nearest known one is suggested) or a value has another type.
    """
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--FIELD VALUE ...]",
        description=type(config).__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )
    _add_options(parser, config)
    options = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
    # Options may be spelled with dashes or underscores, as --top-k or --top_k. Other words stay as typed.
    spellings = {_underscored(option): option for option in options}
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        value = _MARKED_DASHES if value == _DASHES else value
        spelled.append(spellings.get(_underscored(name), name) + equals + value)
    parser.given = spelled
    values, unknown = parser.parse_known_args(spelled)
    if unknown:
        word = unknown[0].split("=")[0]
        bare = word.lstrip("-").replace("-", "_")
        # The commonest mistakes: a field without its section (--learning_rate), or abbreviated (--temp).
        likely = [o for o in options if bare and (o.endswith(f".{bare}") or o.startswith(f"--{bare}"))]
        hint = f"; did you mean {likely[0]}?" if likely else suggestion(word, options)
        if not hint and re.match(r"-[^-]", word):
            hint = f"; a value that begins with a dash is written --OPTION={word}"
        raise UserError(f"unknown option {word}{hint} (see `{prog} --help`).")
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(values).items()}
    return replace(config, changes)


def read_command(
    arguments: Sequence[str],
    prog: str,
    words: str,
    default: Config,
    *,
    load: Callable[..., Config] | None = None,
    validate: Callable[[Config], None] = lambda config: None,
) -> tuple[list[str], Config]:
    """Parses the arguments of a command: its positional words first, then the options of its config.

    `--help` prints every option and exits, even if the words are missing.

    Args:
      arguments: The command's arguments.
      prog: The command's name in messages.
      words: The names of the positional words, such as "CHECKPOINT" or "SOURCE DESTINATION".
      default: The config whose fields are the options.
      load: Returns another default config, given the words; for example, the config that a word names.
      validate: Raises UserError for values that contradict each other.

    Returns:
      The words, and the config with the fields that the options override.

    Raises:
      UserError: Words are missing, or `parse`, `load` or `validate` raises it.
    """
    wanted = words.split()
    given = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments[: len(wanted)]))
    if len(given) < len(wanted):
        parse(default, [a for a in arguments if a in ("-h", "--help")], f"{prog} {words}")
        things = " and ".join(f"a {word.lower().replace('_or_', ' or a ')}" for word in wanted)
        raise UserError(f"name {things} first: {prog} {words} [--FIELD VALUE ...] (see `{prog} --help`).")
    config = parse(load(*given) if load else default, arguments[len(wanted) :], " ".join([prog, *given]))
    validate(config)
    return given, config


def _underscored(name: str) -> str:
    return name[:2] + name[2:].replace("-", "_")


def config_folders() -> list[Path]:
    """Returns the folders to search for a bare config name: ./configs, then configs/ beside the package."""
    return [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]


def load(name: str, kind: type[Training]) -> tuple[Training, str]:
    """Returns the config that `name` refers to, and a name for it: that of its file or run directory.

    Args:
      name: A bare name under configs/, a .py file that defines `config`, a saved .json, or a run directory.
      kind: The class that the config must be an instance of.

    Raises:
      UserError: There is no such file, it cannot be read, it defines no `config`, or its config is of another
        class.
    """
    # os.path is used because Path raises if a name is too long or a folder may not be read.
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path / "config.json"):
        path = path / "config.json"
    elif not os.path.isfile(path):
        paths = [folder / f"{name}.py" for folder in config_folders()]
        path = next(filter(os.path.isfile, paths), path)
    if not os.path.isfile(path):
        names = sorted({p.stem for folder in config_folders() for p in folder.glob("*.py")})
        raise UserError(
            f"no config {name!r}{suggestion(name, names)} "
            f"(a file, a run directory, or one of: {', '.join(names)})."
        )
    try:
        is_python = path.suffix == ".py"
        config = _run_config_file(path) if is_python else from_json(read_text(path), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read as a config: {error}.") from error
    if not isinstance(config, kind):
        raise UserError(f"{path} holds a {type(config).__name__}, but a {kind.__name__} is needed here.")
    # Checks the fields' types, which Python does not: PretrainConfig(steps="100") would fail much later.
    config = from_dict(type(config), dataclasses.asdict(config), str(path))
    return config, path.parent.name if path.name == "config.json" else path.stem


def _run_config_file(path: Path) -> Any:
    """Runs a config file of the user and returns the `config` that it defines.

    Raises:
      UserError: The file raises an exception, which is reported with its line, or defines no `config`.
    """
    path = path.absolute()  # the form in which tracebacks name it
    try:
        defined = runpy.run_path(str(path))
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:  # any exception here comes from the user's own file
        calls = traceback.extract_tb(error.__traceback__)
        line = next((call.lineno for call in reversed(calls) if call.filename == str(path)), 0)
        message = f"{type(error).__name__}: {error}{_mistyped_field(error) or '.'}"
        raise UserError(f"{path}, line {line}: {message}") from error
    if "config" not in defined:
        raise UserError(f"{path} defines no `config`; a config file ends in `config = PretrainConfig(...)`.")
    return defined["config"]


def _mistyped_field(error: Exception) -> str:
    """Returns a suggestion if the error is a mistyped field, as in PretrainConfig(step=100), or else ""."""
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unexpected is None:
        return ""
    kinds = [kind for kind in vars(sections).values() if dataclasses.is_dataclass(kind)]
    fields = [f.name for kind in (*kinds, *EXPERIMENTS.values()) for f in dataclasses.fields(kind)]
    return suggestion(unexpected[1], fields)
