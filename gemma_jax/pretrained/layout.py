"""Our parameters by name and layer: what the readers and writers of published forms speak of."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from gemma_jax.config import TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.weights import EMBEDDING, FINAL_NORM, parameter_table

DTYPES = ("float32", "bfloat16", "float16")


class Weights(Protocol):
    """The weights of a model wherever they are stored, one array at a time."""

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """An array of the shape that `parameter_shapes` says; often a view, of any strides.

        Args:
          parameter: as `gemma_jax.sharding.named_arrays` names it.
          layer: of the blocks; None for the embedding and the final norm.
        """
        ...

    def where(self, parameter: str, layer: int | None) -> str:
        """The array in the words of the place that it comes from, for messages."""
        ...


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter: those under `blocks` in one layer, the embedding without padding rows."""
    shapes = {name: parameter.shape for name, parameter in parameter_table(config).items()}
    return shapes | {EMBEDDING: (config.vocab_size, config.embed_dim)}


def in_order(config: TransformerConfig) -> Iterator[tuple[str, int | None]]:
    """Every array once: the embedding, which is the largest, the layers one after the other, the norm."""
    in_blocks = [name for name, parameter in parameter_table(config).items() if parameter.layers]
    yield EMBEDDING, None
    yield from ((name, layer) for layer in range(config.num_layers) for name in in_blocks)
    yield FINAL_NORM, None


def widest(dtypes: Iterable[str]) -> str:
    """The dtype of these that holds the numbers of all: float32 where bfloat16 and float16 meet."""
    return str(jnp.result_type(*dtypes))


def check_tensors(
    found: Mapping[str, tuple[tuple[int, ...], str]],
    wanted: Iterable[tuple[str, tuple[int, ...]]],
    place: str,
    described_by: str,
) -> None:
    """Compare the tensors in published files with those of the model that a config describes.

    Args:
      found: shape and dtype of each tensor by its name.
      wanted: names and shapes, read up to the first that is missing: a config can ask for any number.
      place: the files, for messages.
      described_by: where the config comes from, for messages.

    Raises:
      UserError: a tensor is missing, has another shape, is no part of the model, or is not of `DTYPES`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in wanted:
        if name not in found:
            raise UserError(
                f"{name} of shape {shape}, which {described_by} asks for, is missing from {place}; "
                "copy it again, or give the config of these weights."
            )
        shapes[name] = shape
    for name, (shape, dtype) in found.items():
        if shape != shapes.get(name):
            asked = f"of shape {shapes[name]}" if name in shapes else "not there"
            raise UserError(
                f"{place} holds {name[:100]!r} of shape {shape}, but it is {asked} by {described_by}; "
                "they belong to different models."
            )
        if dtype not in DTYPES:
            raise UserError(f"{name} in {place} is {dtype}; give weights of {', '.join(DTYPES)}.")
