"""Reads and writes what a run directory holds besides checkpoints and metrics: its config and a data record.

Also checks a config against an existing run, which it may resume, overwrite or fork.
"""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_jax.config import TrainingConfig, differences, from_json, load, replace, to_json, within
from gemma_jax.errors import UserError
from gemma_jax.paths import LARGE_FILE, check_writable_path, children, read_json, read_text, user_path

if TYPE_CHECKING:
    from etils import epath

    from gemma_jax.data.loader import Dataset
    from gemma_jax.tokenizer import Tokenizer

Config = TypeVar("Config", bound=TrainingConfig)

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
TOKENIZER_FILE = "tokenizer.model"

# The files and folders that a run writes into its directory. When a run is deleted, the config is deleted
# last, because a directory with a config counts as a run.
OF_A_RUN = (
    *("checkpoints", "metrics.jsonl", "metrics.jsonl.tmp", "loss.png", "profile", "tensorboard"),
    *("wandb-id.txt", DATA_FILE, TOKENIZER_FILE, f"{CONFIG_FILE}.tmp", CONFIG_FILE, "lock"),
)

# Settings that may differ when a run is resumed: where and how fast it runs, not what it computes.
MAY_CHANGE = (
    *("run_dir", "steps", "existing_run", "profile", "compute", "mesh", "hosts", "stability", "checkpoint"),
    *("evaluation", "logging", "data.cache_dir", "init_from"),
)

# Settings that a fork must keep: they decide the names, shapes and meaning of the arrays, and how many rows a
# step uses (the fork continues at the same position in the data).
KEPT = ("model", "tokenizer", "optimizer.name", "data.batch_size")
# Exceptions among these: settings that change no array, so that a fork can have a longer context.
FREE = ("model.context_length", "model.rope_base")


def load_config(name: str, kind: type[Config]) -> tuple[Config, str]:
    """Returns the same as `gemma_jax.config.load`, but also reads the config of a run in a bucket.

    Raises:
      UserError: For the same reasons as in `load` and `open_run`.
    """
    if "://" not in name:
        return load(name, kind)
    run_dir, config = open_run(name.removesuffix(f"/{CONFIG_FILE}"), kind)
    return config, run_dir.name


def open_run(name: str, kind: type[Config]) -> "tuple[epath.Path, Config]":
    """Returns the directory and the config of a run.

    Args:
      name: The directory of the run, local or in a bucket.
      kind: The class that the config must have.

    Raises:
      UserError: There is no run with such a config.
    """
    run_dir = user_path(name)
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{name} is not the directory of a run: it holds no {CONFIG_FILE}.")
    config = from_json(read_text(path), str(path))
    if not isinstance(config, kind):
        raise UserError(
            f"{path} holds a {type(config).__name__}, but a {kind.__name__} is needed here; name another run."
        )
    return run_dir, config


def record_config(run_dir: "epath.Path", config: TrainingConfig) -> None:
    """Write the config of a run, atomically."""
    unfinished = run_dir / f"{CONFIG_FILE}.tmp"
    unfinished.write_text(to_json(replace(config, {"existing_run": "resume"})))
    unfinished.replace(run_dir / CONFIG_FILE)


def check_overwritable(run_dir: "epath.Path") -> None:
    """Check that what `--existing_run overwrite` would delete is a run.

    Raises:
      UserError: The directory holds other files, but no run.
    """
    foreign = sorted(child.name for child in children(run_dir) if child.name not in OF_A_RUN)
    try:
        if foreign:
            open_run(os.fspath(run_dir), TrainingConfig)
    except UserError as error:
        raise UserError(
            f"{run_dir} holds {foreign[0]}, but no run that could be overwritten; give another --run_dir."
        ) from error


def delete_run(run_dir: "epath.Path") -> None:
    """Delete everything that a run has written into its directory, except the lock."""
    for name in OF_A_RUN[:-1]:
        path = run_dir / name
        if path.is_dir():
            path.rmtree()
        elif path.exists():
            path.unlink()


def record_data(run_dir: "epath.Path", dataset: "Dataset", tokenizer: "Tokenizer") -> None:
    """Record the contents of each corpus and the tokenizer, for `check_tokenizer` and `check_data`."""
    corpora = [dataclasses.asdict(source) for source in dataset.statistics]
    record = {"tokenizer": tokenizer.fingerprint, "corpora": corpora}
    (run_dir / DATA_FILE).write_text(json.dumps(record, indent=2) + "\n")


def check_tokenizer(run_dir: "epath.Path", tokenizer: "Tokenizer") -> None:
    """Check that a tokenizer is the one that a run uses: its parameters are useless with other token ids.

    Raises:
      UserError: It is a different tokenizer.
    """
    if _recorded(run_dir, "tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"the tokenizer is not the one that the run in {run_dir} began with; pass that one as "
            f"tokenizer.path, or restore {run_dir / TOKENIZER_FILE}."
        )


def _recorded(run_dir: "epath.Path", name: str, otherwise: Any) -> Any:
    """Returns an entry of a run's data record, or `otherwise` if the run has no record yet."""
    path = run_dir / DATA_FILE
    if not path.exists():
        return otherwise
    record = read_json(path, LARGE_FILE)
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"{path} is damaged (it has no {name}); delete it to go on without the check.")
    return record[name]


def check_data(run_dir: "epath.Path", dataset: "Dataset") -> None:
    """Check that each row of the data is still the one that the run has trained on.

    This compares the contents, names and order of the files, not parent folders and times, so a copy of the
    corpus is accepted.

    Raises:
      UserError: A corpus has changed since the run began.
    """
    before = _recorded(run_dir, "corpora", None)
    if before is None:
        return
    try:
        for then, now in zip(before, dataset.statistics, strict=True):
            if change := now.change_since(then):
                raise UserError(
                    f"{now.name} has changed since {run_dir} began ({change}), so its rows are others; "
                    "restore that corpus, or begin a new run."
                )
    except (ValueError, TypeError, KeyError) as error:
        path = run_dir / DATA_FILE
        raise UserError(f"{path} is damaged ({error}); delete it to go on without the check.") from error


def as_existing(config: Config) -> Config:
    """Returns `config` adapted to the run that is in its directory, if any, and with its fork resolved.

    Raises:
      UserError: The existing run computes something else, the directory to overwrite holds no run, or the
        run to fork does not fit the config.
    """
    from gemma_jax.checkpoint.folders import saved_steps

    run_dir = user_path(config.run_dir)
    check_writable_path(run_dir)
    resuming = config.existing_run == "resume" and (run_dir / CONFIG_FILE).exists()
    if resuming:
        before = open_run(os.fspath(run_dir), type(config))[1]
        # The record names the folder of one step; the command may name the whole run, or not set fork_from.
        named = os.path.expanduser(config.fork_from).rstrip("/")
        if not named or before.fork_from.startswith(f"{named}/"):
            config = replace(config, {"fork_from": before.fork_from})
        check_same(before, config, os.fspath(run_dir))
    if config.fork_from and not (resuming and saved_steps(run_dir)):
        config = resolve_fork(config, run_dir)
    if config.existing_run == "overwrite":
        check_overwritable(run_dir)
    return config


def check_same(before: TrainingConfig, config: TrainingConfig, run: str) -> None:
    """Check that a config computes the same as the run that it resumes.

    Args:
      before: The config of the run so far.
      config: The config to resume with.
      run: The name of the run in messages.

    Raises:
      UserError: A setting that must not change differs; the message names it.
    """
    for name, then, now in differences(before, config):
        if not within(name, MAY_CHANGE):
            raise UserError(
                f"the run in {run} has {name} {then!r}, not {now!r}; "
                "give another --run_dir, or --existing_run overwrite to delete that run."
            )


def resolve_fork(config: Config, run_dir: "epath.Path") -> Config:
    """Returns `config` with `fork_from` set to the folder of one step, after all checks that need no arrays.

    Raises:
      UserError: There is no checkpoint at `fork_from`; it is inside this run's own directory; it has already
        done all steps of the config; or its run differs in a setting that a fork must keep.
    """
    from gemma_jax.checkpoint.record import run_record
    from gemma_jax.checkpoint.restore import step_folder

    folder, source = step_folder(config.fork_from)
    # Refused at any depth, because overwriting the directory would delete the source.
    if f"{os.path.realpath(source)}/".startswith(f"{os.path.realpath(run_dir)}/"):
        raise UserError(
            f"fork_from, {config.fork_from}, is inside run_dir, {run_dir}; give another --run_dir."
        )
    step = run_record(folder).step
    if step >= config.steps:
        raise UserError(f"{folder} has done {step} of {config.steps} steps; raise --steps to go on from it.")
    for name, then, now in differences(open_run(os.fspath(source), type(config))[1], config):
        if within(name, KEPT) and not within(name, FREE):
            raise UserError(
                f"{source} has {name} {then!r}, not {now!r}, and a fork keeps it; set --{name} as it was, "
                "or begin a new run."
            )
    return replace(config, {"fork_from": os.fspath(folder)})


def forked_after(config: TrainingConfig) -> int:
    """Returns how many steps were done by the run that this one was forked from; 0 if it was not forked."""
    name = config.fork_from.rpartition("/")[2]
    return int(name) if name.isdecimal() else 0
