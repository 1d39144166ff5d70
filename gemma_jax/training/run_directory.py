"""What a run directory holds besides checkpoints and numbers: its config, and how much data it has."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, TypeVar

from gemma_jax.config import TrainingConfig, from_json, load, replace, to_json
from gemma_jax.errors import UserError
from gemma_jax.paths import user_path

if TYPE_CHECKING:
    from etils import epath

    from gemma_jax.data.loader import Dataset

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
    config = from_json(path.read_text(), str(path))
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
    from gemma_jax.checkpoint.folders import children

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


def record_data(run_dir: "epath.Path", dataset: "Dataset") -> None:
    """Write down how much each corpus held, for `check_data`."""
    statistics = [dataclasses.asdict(source) for source in dataset.statistics]
    (run_dir / DATA_FILE).write_text(json.dumps(statistics, indent=2) + "\n")


def check_data(run_dir: "epath.Path", dataset: "Dataset") -> None:
    """Make sure that row i of the data is still the row that the run has seen.

    By the contents of each corpus in their order, not by the names and times of its files: a copy will do.

    Raises:
      UserError: a corpus has changed since the run began.
    """
    path = run_dir / DATA_FILE
    if not path.exists():  # nothing was trained yet
        return
    try:
        before = json.loads(path.read_text())
        for then, now in zip(before, dataset.statistics, strict=True):
            if change := now.change_since(then):
                raise UserError(
                    f"{now.name} has changed since {run_dir} began ({change}), so its rows are others; "
                    "restore that corpus, or begin a new run."
                )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to go on without the check.") from error
