"""Configs from a command line: one option a field, named by its dotted path."""

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


# argparse drops a value `--` (cpython issue 109475), so it is passed as another word.
_DASHES, _MARKED_DASHES = "--", "--\0"


class _Parser(argparse.ArgumentParser):
    given: Sequence[str] = ()  # the words that are parsed

    def error(self, message: str) -> NoReturn:
        if missing := re.match(r"argument (--\S+): expected", message):
            following = [b for a, b in itertools.pairwise(self.given) if a == missing[1]]
            if following and following[-1] not in self._option_string_actions:
                message += f"; a value that begins with a dash is written {missing[1]}={following[-1]}"
        raise UserError(f"{message} (see `{self.prog} --help`).")


def _add_options(parser: argparse.ArgumentParser, config: Any) -> None:
    """One option for each leaf field of `config`, sections as titled groups."""
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
            # `--prompt A --prompt B` and `--data.sources A B` are both what people write.
            options |= {"type": _reader(arguments[0]), "nargs": "+", "action": "extend"}
            options["metavar"] = _form(arguments[0])
        else:
            options |= {"type": _reader(field.type), "metavar": _form(field.type)}
        groups[name.rpartition(".")[0]].add_argument(f"--{name}", **options)


def _form(kind: Any) -> str:
    """How a value is written, for `--help`: FLOAT; or of a small dataclass 'PATTERN weight_decay=FLOAT'."""
    if not dataclasses.is_dataclass(kind):
        return str(_scalar(kind).__name__).upper()
    first, *rest = dataclasses.fields(kind)
    return " ".join([f"'{first.name.upper()}", *(f"{f.name}={_form(f.type)}" for f in rest)]) + "'"


def _scalar(annotation: Any) -> Any:
    """The type that makes a value from text: of `X | None` that is X."""
    return (typing.get_args(annotation) or (annotation,))[0]


def _shown(value: Any) -> str:
    """An element of a tuple as it is written on a command line."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    first, *rest = (getattr(value, field.name) for field in dataclasses.fields(value))
    names = [field.name for field in dataclasses.fields(value)][1:]
    words = [f"{name}={x}" for name, x in zip(names, rest, strict=True) if x is not None]
    return repr(" ".join([str(first), *words]))


def _reader(kind: Any) -> Callable[[str], Any]:
    """What makes a value of `kind` from the text of an option."""

    def read(text: str) -> Any:
        text = _DASHES if text == _MARKED_DASHES else text
        return _element(kind, text) if dataclasses.is_dataclass(kind) else kind(text)

    read.__name__ = kind.__name__  # argparse's messages name it
    return read


def _element(kind: Any, text: str) -> Any:
    """A small dataclass from its first field and `name=value` words behind it: 'embedding weight_decay=0'.

    The first field may hold spaces and equals signs: only words at the end are taken, and only known names.

    Raises:
      argparse.ArgumentTypeError: a name that is unknown or given twice, or a value of another type.
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
        try:
            values[name] = _scalar(types[name])(value)
        except ValueError as error:
            wanted = _scalar(types[name]).__name__
            raise argparse.ArgumentTypeError(f"invalid {wanted} value of {name}: {value!r}") from error
        text = text[: word.start()].rstrip()
    try:
        return from_dict(kind, {first.name: text, **values}, kind.__name__)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def parse(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """`config` with the fields that `arguments` override (`--section.field value`).

    `--help` prints every field with its type, default and meaning, and exits.

    Raises:
      UserError: an unknown option (the nearest known one is suggested) or a value of another type.
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
    # Both spellings of an option are common, --top-k and --top_k; anything else is left as it was typed.
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
        # The commonest slips: a field without its section (--learning_rate), or cut short (--temp).
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
    """What stands in front of every command: the words that it needs first, then the options of its config.

    `--help` prints every option and exits, also without the words.

    Args:
      arguments: of the command.
      prog: what it is called in messages.
      words: what it needs first, by names that say what they are: "CHECKPOINT", "SOURCE DESTINATION".
      default: the config whose fields are the options.
      load: makes another default from the words, such as the config that they name.
      validate: raises UserError for values that contradict each other.

    Returns:
      The words, and the config with the fields that the options override.

    Raises:
      UserError: words are missing, or as `parse`, `load` and `validate` do.
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
    """Where a bare config name is looked for: ./configs, then configs/ beside the package's source."""
    return [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]


def load(name: str, kind: type[Training]) -> tuple[Training, str]:
    """The config called `name`, and the name of its experiment.

    Args:
      name: a bare name under configs/, a .py file that defines `config`, a saved .json, or a run directory.
      kind: the class that is wanted.

    Raises:
      UserError: nothing there, a file that defines no `config`, or a config of another kind.
    """
    # os.path asks without raising where a name is too long or a folder may not be read; Path does not.
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
    # Python checks no types: PretrainConfig(steps="100") would fail much later.
    config = from_dict(type(config), dataclasses.asdict(config), str(path))
    return config, path.parent.name if path.name == "config.json" else path.stem


def _run_config_file(path: Path) -> Any:
    """The `config` that a file of the user defines.

    Raises:
      UserError: the file raises an exception, which is reported with its line, or defines no `config`.
    """
    path = path.absolute()  # as trace-backs name it
    try:
        defined = runpy.run_path(str(path))
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:  # whatever it is, the user's own file raised it
        calls = traceback.extract_tb(error.__traceback__)
        line = next((call.lineno for call in reversed(calls) if call.filename == str(path)), 0)
        message = f"{type(error).__name__}: {error}{_mistyped_field(error) or '.'}"
        raise UserError(f"{path}, line {line}: {message}") from error
    if "config" not in defined:
        raise UserError(f"{path} defines no `config`; a config file ends in `config = PretrainConfig(...)`.")
    return defined["config"]


def _mistyped_field(error: Exception) -> str:
    """The suggestion for PretrainConfig(step=100), whose message Python writes."""
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unexpected is None:
        return ""
    kinds = [kind for kind in vars(sections).values() if dataclasses.is_dataclass(kind)]
    fields = [f.name for kind in (*kinds, *EXPERIMENTS.values()) for f in dataclasses.fields(kind)]
    return suggestion(unexpected[1], fields)
