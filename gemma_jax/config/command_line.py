"""Configs from a command line: one option a field, named by its dotted path."""

import argparse
import dataclasses
import importlib.util
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gemma_jax.config.serialization import EXPERIMENTS, from_json, from_record, replace, suggestion, to_dict
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
    options = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
    # Both spellings of an option are common, --top-k and --top_k; anything else is left as it was typed.
    spellings = {_underscored(option): option for option in options}
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append(spellings.get(_underscored(name), name) + equals + value)
    values, unknown = parser.parse_known_args(spelled)
    if unknown:
        word = unknown[0].split("=")[0]
        bare = word.lstrip("-").replace("-", "_")
        # The commonest slips: a field without its section (--learning_rate), or cut short (--temp).
        likely = [o for o in options if bare and (o.endswith(f".{bare}") or o.startswith(f"--{bare}"))]
        hint = f"; did you mean {likely[0]}?" if likely else suggestion(word, options)
        raise UserError(f"unknown option {word}{hint} (see `{prog} --help`).")
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(values).items()}
    return replace(config, changes)


def _underscored(name: str) -> str:
    return name[:2] + name[2:].replace("-", "_")


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
    # os.path asks without raising where a name is too long or a folder may not be read; Path does not.
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path / "config.json"):
        path = path / "config.json"
    elif not os.path.isfile(path):
        found = [
            folder / f"{name}.py" for folder in config_folders() if os.path.isfile(folder / f"{name}.py")
        ]
        path = found[0] if found else path
    if not os.path.isfile(path):
        names = sorted({p.stem for folder in config_folders() for p in folder.glob("*.py")})
        raise UserError(
            f"no config {name!r}{suggestion(name, names)} "
            f"(a file, a run directory, or one of: {', '.join(names)})."
        )
    if path.suffix == ".py":
        config = _run_config_file(path)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text, so it is no config.") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        config = from_json(text, str(path))
    if not isinstance(config, kind):
        raise UserError(f"{path} holds a {type(config).__name__}, but a {kind.__name__} is needed here.")
    if path.suffix == ".py":
        # Python checks no types: PretrainConfig(steps="100") would fail much later.
        config = from_record(to_dict(config), str(path))
    return config, path.parent.name if path.name == "config.json" else path.stem


def _run_config_file(path: Path) -> Any:
    """The `config` that a file of the user defines.

    Raises:
      UserError: the file raises an exception, which is told with its line, or defines no `config`.
    """
    path = path.absolute()  # as trace-backs name it
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # No stale byte code beside the user's own files.
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:  # whatever it is, the user's own file raised it
        where = f"{path}, line {_last_line(error, path)}"
        raise UserError(f"{where}: {type(error).__name__}: {error}{_mistyped_field(error) or '.'}") from error
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


def _mistyped_field(error: Exception) -> str:
    """The suggestion for PretrainConfig(step=100), whose message Python writes."""
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unexpected is None:
        return ""
    fields = [field for kind in EXPERIMENTS.values() for field in dataclasses.fields(kind)]
    fields += [
        f for field in fields if dataclasses.is_dataclass(field.type) for f in dataclasses.fields(field.type)
    ]
    return suggestion(unexpected[1], {field.name for field in fields})
