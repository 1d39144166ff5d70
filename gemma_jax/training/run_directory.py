"""What a run directory holds besides checkpoints and numbers: its config, and how much data it has.

And what a config has to do with a run that is there already: going on with it, or forking another.
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

# Of the files and folders below a run directory, what a run writes. The config goes last where a run is
# deleted: it is what makes a directory a run.
OF_A_RUN = (
    *("checkpoints", "metrics.jsonl", "metrics.jsonl.tmp", "loss.png", "profile", "tensorboard"),
    *("wandb-id.txt", DATA_FILE, TOKENIZER_FILE, f"{CONFIG_FILE}.tmp", CONFIG_FILE, "lock"),
)

# What may differ when a run is resumed: where and how fast it runs, not what it computes.
MAY_CHANGE = (
    *("run_dir", "steps", "existing_run", "profile", "compute", "mesh", "hosts", "stability", "checkpoint"),
    *("evaluation", "logging", "data.cache_dir"),
)

# What a fork keeps: the names and shapes of its arrays, what their numbers mean, and how many rows a step
# takes, because the position in the data continues.
KEPT = ("model", "tokenizer", "optimizer.name", "data.batch_size")
# Of these, what changes no array: the way to a longer context.
FREE = ("model.context_length", "model.rope_base")


def load_config(name: str, kind: type[Config]) -> tuple[Config, str]:
    """What `gemma_jax.config.load` returns, also for a run in a bucket.

    Raises:
      UserError: as `load` does.
    """
    if "://" not in name:
        return load(name, kind)
    run_dir, config = open_run(name.removesuffix(f"/{CONFIG_FILE}"), kind)
    return config, run_dir.name


def open_run(name: str, kind: type[Config]) -> "tuple[epath.Path, Config]":
    """The directory and the config of a run.

    Args:
      name: its directory, local or in a bucket.
      kind: of config.

    Raises:
      UserError: there is no run of that kind.
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
    """Write the config of a run, whole or not at all."""
    unfinished = run_dir / f"{CONFIG_FILE}.tmp"
    unfinished.write_text(to_json(replace(config, {"existing_run": "resume"})))
    unfinished.replace(run_dir / CONFIG_FILE)


def check_overwritable(run_dir: "epath.Path") -> None:
    """Make sure that what `--existing_run overwrite` would delete is a run.

    Raises:
      UserError: the directory holds something, but no run.
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
    """Delete what a run has written into its directory, except the lock."""
    for name in OF_A_RUN[:-1]:
        path = run_dir / name
        if path.is_dir():
            path.rmtree()
        elif path.exists():
            path.unlink()


def record_data(run_dir: "epath.Path", dataset: "Dataset", tokenizer: "Tokenizer") -> None:
    """Write down what each corpus holds and which tokenizer it was read with, for the two checks below."""
    corpora = [dataclasses.asdict(source) for source in dataset.statistics]
    record = {"tokenizer": tokenizer.fingerprint, "corpora": corpora}
    (run_dir / DATA_FILE).write_text(json.dumps(record, indent=2) + "\n")


def check_tokenizer(run_dir: "epath.Path", tokenizer: "Tokenizer") -> None:
    """Make sure that a tokenizer is the one of a run: with other ids its parameters mean nothing.

    Raises:
      UserError: it is another.
    """
    if _recorded(run_dir, "tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"the tokenizer is not the one that the run in {run_dir} began with; pass that one as "
            f"tokenizer.path, or restore {run_dir / TOKENIZER_FILE}."
        )


def _recorded(run_dir: "epath.Path", name: str, otherwise: Any) -> Any:
    """What a run has written down of its data; `otherwise` where nothing was trained yet."""
    path = run_dir / DATA_FILE
    if not path.exists():
        return otherwise
    record = read_json(path, LARGE_FILE)
    if not isinstance(record, dict) or name not in record:
        raise UserError(f"{path} is damaged (it has no {name}); delete it to go on without the check.")
    return record[name]


def check_data(run_dir: "epath.Path", dataset: "Dataset") -> None:
    """Make sure that row i of the data is still the row that the run has seen.

    By the contents and names of its files in their order, not by parent folders and times: a copy will do.

    Raises:
      UserError: a corpus has changed since the run began.
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
    """`config` for resuming the run that is there, if there is one, and with its fork resolved.

    Raises:
      UserError: the run that is there computes something else, what is to be overwritten is no run, or what
        is to be forked does not fit.
    """
    from gemma_jax.checkpoint.folders import saved_steps

    run_dir = user_path(config.run_dir)
    check_writable_path(run_dir)
    resuming = config.existing_run == "resume" and (run_dir / CONFIG_FILE).exists()
    if resuming:
        before = open_run(os.fspath(run_dir), type(config))[1]
        # What is recorded is one step; the command may name the whole run, or nothing any more.
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
    """Make sure that a config computes what a run has computed so far.

    Args:
      before: of the run.
      config: with which it is to go on.
      run: what it is called in messages.

    Raises:
      UserError: a setting that may not change differs; it is named.
    """
    for name, then, now in differences(before, config):
        if not within(name, MAY_CHANGE):
            raise UserError(
                f"the run in {run} has {name} {then!r}, not {now!r}; "
                "give another --run_dir, or --existing_run overwrite to delete that run."
            )


def resolve_fork(config: Config, run_dir: "epath.Path") -> Config:
    """`config` with `fork_from` as the folder of one step, when all was checked that needs no arrays.

    Raises:
      UserError: no checkpoint there, one of this very run, one whose steps are done, or one of a run that
        differs in what a fork keeps.
    """
    from gemma_jax.checkpoint.record import run_record
    from gemma_jax.checkpoint.restore import step_folder

    folder, source = step_folder(config.fork_from)
    # Also if it is deeper inside: overwriting the directory would delete it.
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
    """Steps that another run did before this one was forked from it; 0 for a run of its own."""
    name = config.fork_from.rpartition("/")[2]
    return int(name) if name.isdecimal() else 0
