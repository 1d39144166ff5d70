"""What a run's directory holds besides its checkpoints and numbers: config.json, data.json."""

import dataclasses
import json
from typing import TYPE_CHECKING

from gemma_jax.config import PretrainConfig, from_json, load
from gemma_jax.errors import UserError
from gemma_jax.paths import user_path

if TYPE_CHECKING:
    from etils import epath

    from gemma_jax.data.loader import Dataset

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"


def load_config(name: str) -> tuple[PretrainConfig, str]:
    """What `gemma_jax.config.load` gives, also for a run in a bucket.

    Raises:
      UserError: as `load` does.
    """
    if "://" not in name:
        return load(name, PretrainConfig)
    run_dir, config = open_run(name.removesuffix(f"/{CONFIG_FILE}"))
    return config, run_dir.name


def open_run(name: str) -> "tuple[epath.Path, PretrainConfig]":
    """The directory and the config of a run.

    Args:
      name: its directory, local or in a bucket.

    Raises:
      UserError: there is no run.
    """
    run_dir = user_path(name)
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{name} is not the directory of a run: it holds no {CONFIG_FILE}.")
    config = from_json(path.read_text(), str(path))
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{path} holds a {type(config).__name__}, but only training has steps to show.")
    return run_dir, config


def record_data(run_dir: "epath.Path", dataset: "Dataset") -> None:
    """Write down how much each corpus held, for `check_data`."""
    statistics = [dataclasses.asdict(source) for source in dataset.statistics]
    (run_dir / DATA_FILE).write_text(json.dumps(statistics, indent=2) + "\n")


def check_data(run_dir: "epath.Path", dataset: "Dataset") -> None:
    """Make sure that row i of the data is still the row that the run has seen.

    By the documents, tokens and bytes of each corpus, not by the times of its files: a copy will do.

    Raises:
      UserError: a corpus has changed since the run began.
    """
    path = run_dir / DATA_FILE
    if not path.exists():  # nothing was trained yet
        return
    try:
        before = json.loads(path.read_text())
        for then, now in zip(before, dataset.statistics, strict=True):
            if then != dataclasses.asdict(now):
                raise UserError(
                    f"{now.name} has changed since {run_dir} began (training data then: "
                    f"{then['train']['documents']:,} documents, {then['train']['tokens']:,} tokens; now: "
                    f"{now.train.documents:,} and {now.train.tokens:,}), so its rows are others; restore "
                    "that corpus, or begin a new run."
                )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to go on without the check.") from error
