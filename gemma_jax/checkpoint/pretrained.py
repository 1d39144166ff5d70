"""What CHECKPOINT means, wherever a command or `Gemma.from_pretrained` takes one.

A run directory, one of its steps, a Hugging Face directory, or `random:PRESET`.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.checkpoint.end_tokens import end_tokens
from gemma_jax.checkpoint.huggingface import HuggingFaceDirectory
from gemma_jax.checkpoint.placement import place
from gemma_jax.checkpoint.published_config import CONFIG_FILE
from gemma_jax.config import (
    ComputeConfig,
    PretrainConfig,
    TransformerConfig,
    from_record,
    preset,
    validate_model,
)
from gemma_jax.errors import UserError
from gemma_jax.model import abstract_transformer, init_params
from gemma_jax.sharding import shardings
from gemma_jax.tokenizer import Tokenizer

RANDOM = "random:"
TOKENIZER_FILE = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and checked, with its numbers still on disk."""

    name: str  # as the user gave it
    folder: str  # where it is, which may have more files beside the weights; empty: nowhere
    config: TransformerConfig
    dtype: str  # of the numbers on disk
    tokenizer_path: str  # empty where there is none
    params: Callable[[ComputeConfig, Mesh], nnx.State]
    """Reads the parameters to their place on a mesh; UserError where they are damaged or do not fit it."""

    def tokenizer(self) -> Tokenizer | None:
        """Raises:
        UserError: there is one, but it is none of Gemma's kind.
        """
        return Tokenizer.load(self.tokenizer_path) if self.tokenizer_path else None

    def end_tokens(self, instruction_tuned: bool | None = None) -> tuple[int, ...]:
        """The ids that end an answer; see `checkpoint.end_tokens`."""
        return end_tokens(self.name, self.folder, instruction_tuned=instruction_tuned)


def open_checkpoint(name: str | os.PathLike[str]) -> Checkpoint:
    """Find a checkpoint and check what can be checked without reading its numbers.

    Args:
      name: a run directory (its newest step is meant), one of its steps, a Hugging Face directory, or
        `random:PRESET` for random weights of a preset.

    Raises:
      UserError: nothing there, or not a whole checkpoint of a Gemma that is supported.
    """
    name = os.fspath(name)
    if name.startswith(RANDOM):
        return _random(name)
    folder = Path(os.path.expanduser(name))
    if is_published(folder):
        return _huggingface(name, folder)
    return _run(name)


def _random(name: str) -> Checkpoint:
    config = preset(name.removeprefix(RANDOM))
    return Checkpoint(
        name, "", config, "float32", "", lambda compute, mesh: init_params(config, compute, mesh, seed=0)
    )


def is_published(folder: str | os.PathLike[str]) -> bool:
    """Whether a directory is one of Hugging Face's, whole or not, rather than a run's."""
    if not os.path.isdir(folder):
        return False
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in os.listdir(folder)):
        return True
    config = Path(folder) / CONFIG_FILE
    # A run has a config.json too, of another kind. What is no text at all is for others to tell.
    return config.is_file() and '"model_type"' in config.read_text(errors="replace")


def _tokenizer_path(folder: Path) -> str:
    path = folder / TOKENIZER_FILE
    return str(path) if path.exists() else ""


def _huggingface(name: str, folder: Path) -> Checkpoint:
    weights = HuggingFaceDirectory(folder)
    config = weights.config
    return Checkpoint(
        name,
        str(folder),
        config,
        weights.dtype,
        _tokenizer_path(folder),
        lambda compute, mesh: place(weights, config, compute, mesh),
    )


def _run(name: str) -> Checkpoint:
    from gemma_jax.checkpoint import store  # late: orbax costs a second

    folder, run_dir = store.step_folder(name)
    record = store.run_record(folder)
    experiment = from_record(record.config, str(folder))
    if not isinstance(experiment, PretrainConfig):
        raise UserError(f"{folder} is no training checkpoint: its config is a {type(experiment).__name__}.")
    config = experiment.model
    validate_model(config)

    def params(compute: ComputeConfig, mesh: Mesh) -> nnx.State:
        _, abstract = abstract_transformer(config, compute, mesh)
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings(abstract, mesh),
        )
        return store.load_arrays(folder, {"params": placed}, record)["params"]

    tokenizer = run_dir / TOKENIZER_FILE
    return Checkpoint(
        name,
        str(run_dir),
        config,
        record.arrays["params"]["embedding"].dtype,
        str(tokenizer) if tokenizer.exists() else "",
        params,
    )
