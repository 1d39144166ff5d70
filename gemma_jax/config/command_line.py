"""Configs from a command line: one option a field, named by its dotted path."""

import argparse
import dataclasses
import importlib.util
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gemma_jax.config.serialization import from_json, replace, suggestion
from gemma_jax.errors import UserError

Config = TypeVar("Config")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`).")


def _add_options(parser: argparse.ArgumentParser, config: Any) -> None:
    """One option for each leaf field of `config`, sections as titled groups."""
    leaves: list[tuple[Any, str, Any]] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            group = parser.add_argument_group(field.name, type(value).__doc__)
            leaves += [(group, f"{field.name}.{f.name}", f) for f in dataclasses.fields(value)]
        else:
            leaves.append((parser, field.name, field))
    for group, name, field in leaves:
        default: Any = config
        for part in name.split("."):
            default = getattr(default, part)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
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
            kind = arguments[0]
            options |= {"type": kind, "nargs": "+", "action": "extend", "metavar": kind.__name__.upper()}
        else:
            options |= {"type": field.type, "metavar": field.type.__name__.upper()}
        group.add_argument(f"--{name}", **options)


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
    # Both spellings of an option are common; the fields have underscores.
    spelled = [_underscored(argument) for argument in arguments]
    values, unknown = parser.parse_known_args(spelled)
    if unknown:
        known = [o for action in parser._actions for o in action.option_strings]
        word = unknown[0].split("=")[0]
        # A field without its section (--learning_rate) is the commonest slip.
        with_section = [o for o in known if word.startswith("--") and o.endswith("." + word[2:])]
        hint = f"; did you mean {with_section[0]}?" if with_section else suggestion(word, known)
        raise UserError(f"unknown option {word}{hint} (see `{prog} --help`).")
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(values).items()}
    return replace(config, changes)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    negated = name.startswith("--no-")
    name = ("--no-" + name[5:].replace("-", "_")) if negated else "--" + name[2:].replace("-", "_")
    return name + equals + value


def config_folders() -> list[Path]:
    """Where a bare config name is looked for: ./configs, then configs/ beside the package's source."""
    return [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]


def load(name: str, kind: type[Config]) -> tuple[Config, str]:
    """The config called `name`, and the name of its experiment.

    Args:
      name: a bare name under configs/, a .py file that defines `config`, a saved .json, or a run directory.
      kind: the class that is wanted.

    Raises:
      UserError: nothing there, a file that defines no `config`, or a config of another kind.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    elif not path.suffix and not path.is_file():
        found = [folder / f"{name}.py" for folder in config_folders() if (folder / f"{name}.py").is_file()]
        path = found[0] if found else path
    if not path.is_file():
        names = sorted({p.stem for folder in config_folders() for p in folder.glob("*.py")})
        raise UserError(
            f"no config {name!r}{suggestion(name, names)} (a file, a run directory, or one of: {', '.join(names)})."
        )
    if path.suffix == ".py":
        config = _run_config_file(path)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text, so it is no config.") from error
        config = from_json(text, str(path))
    if not isinstance(config, kind):
        raise UserError(f"{path} holds a {type(config).__name__}, but a {kind.__name__} is needed here.")
    return config, path.parent.name if path.name == "config.json" else path.stem


def _run_config_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # No stale byte code beside the user's own files.
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, TypeError, NameError, ImportError, AttributeError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else _last_line(error, path)
        raise UserError(f"{path}, line {line}: {error}.") from error
    finally:
        sys.dont_write_bytecode = written
    if not hasattr(module, "config"):
        raise UserError(f"{path} defines no `config`; a config file ends in `config = PretrainConfig(...)`.")
    return module.config


def _last_line(error: BaseException, path: Path) -> int:
    lines = [0]
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1]
