"""Further destinations for a run's metrics besides its own file: TensorBoard and Weights & Biases."""

import importlib
import uuid
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import jax
from etils import epath

from gemma_jax.config import LoggingConfig, TrainingConfig, to_dict
from gemma_jax.errors import UserError

Entry = dict[str, Any]

WANDB_ID_FILE = "wandb-id.txt"


class Sink(Protocol):
    """A destination for metrics besides the run's own file."""

    def write(self, entry: Entry) -> None:
        """Write the numbers of a step. The entry includes `step`."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts of a step, by title."""

    def close(self) -> None:
        """Write out what is held back."""


class TensorBoard:
    """Writes event files under RUN/tensorboard."""

    def __init__(self, run_dir: epath.Path, start: int) -> None:
        """Args:
        run_dir: The directory of the run.
        start: The step to resume from. Existing entries of later steps are purged, as they are repeated.
        """
        # tensorboardX writes to gs:// and s3:// itself, with those services' own packages.
        writer = _module("tensorboardX", "logging.tensorboard").SummaryWriter
        self._writer = writer(
            str(run_dir / "tensorboard"),
            purge_step=start + 1 if start else None,
            filename_suffix=f".{start}",  # otherwise files of the same second overwrite each other
        )

    def write(self, entry: Entry) -> None:
        """Write one scalar for each number."""
        for name, value in _numbers(entry).items():
            self._writer.add_scalar(name, value, entry["step"], entry["time"])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write each text under its title."""
        for title, text in texts.items():
            self._writer.add_text(title, text, step)

    def close(self) -> None:
        """Write out what is held back."""
        self._writer.close()


class WeightsAndBiases:
    """Writes to a run of a Weights & Biases project. A resumed run continues the same run there."""

    def __init__(self, run_dir: epath.Path, config: TrainingConfig) -> None:
        wandb = _module("wandb", "logging.wandb_project")
        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.logging.wandb_project,
            id=id_file.read_text().strip(),
            name=run_dir.name,
            config=to_dict(config),
            resume="allow",
        )

    def write(self, entry: Entry) -> None:
        """Write all numbers of a step at once."""
        self._run.log(_numbers(entry), step=entry["step"])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write each text under its title."""
        self._run.log(dict(texts), step=step)

    def close(self) -> None:
        """Send buffered entries and finish."""
        self._run.finish()


def check_sinks(config: LoggingConfig) -> None:
    """Check that the packages of the requested sinks are installed.

    Raises:
      UserError: A package that the config needs is not installed.
    """
    if config.tensorboard == "on":
        _module("tensorboardX", "logging.tensorboard")
    if config.wandb_project:
        _module("wandb", "logging.wandb_project")


def open_sinks(config: TrainingConfig, run_dir: epath.Path, start: int) -> list[Sink]:
    """Opens the sinks that a config asks for. Returns none except in the first process of a job.

    Raises:
      UserError: A package that the config needs is not installed.
    """
    sinks: list[Sink] = []
    if jax.process_index() == 0:
        if config.logging.tensorboard == "on":
            sinks.append(TensorBoard(run_dir, start))
        if config.logging.wandb_project:
            sinks.append(WeightsAndBiases(run_dir, config))
    return sinks


def _numbers(entry: Entry) -> Entry:
    return {name: value for name, value in entry.items() if name not in ("step", "time")}


def _module(name: str, setting: str) -> ModuleType:
    """Imports an optional package. It is imported by name because it may be missing and has no types."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{setting} needs the package {name}, which cannot be imported ({error}); "
            f"install it with `pip install {name}`, or leave {setting} out."
        ) from error
