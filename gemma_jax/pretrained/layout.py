"""Identifies parameters by name and layer: the interface shared by readers and writers of published forms."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from gemma_jax.config import TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.weights import EMBEDDING, FINAL_NORM, Kind, parameter_table

DTYPES = ("float32", "bfloat16", "float16")


class Weights(Protocol):
    """The weights of a model wherever they are stored, one array at a time."""

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """Returns an array of the shape in `parameter_shapes`; often a view, with any strides.

        Args:
          parameter: The name of the parameter, as in `gemma_jax.sharding.named_arrays`.
          layer: The index of the layer; None for the embedding and the final norm.
        """
        ...

    def where(self, parameter: str, layer: int | None) -> str:
        """Describes an array by its name and location in the source, for messages."""
        ...


@runtime_checkable
class PackedWeights(Weights, Protocol):
    """Weights that are stored quantised."""

    @property
    def kind(self) -> Kind:
        """The kind of weight in which `packed` returns arrays."""
        ...

    def packed(self, parameter: str, layer: int | None) -> dict[str, np.ndarray]:
        """Returns the arrays of one weight of this kind; empty for a parameter that is stored as it is."""
        ...


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Returns each parameter's shape: for `blocks` in one layer, for the embedding without padding rows."""
    shapes = {name: parameter.shape for name, parameter in parameter_table(config).items()}
    return shapes | {EMBEDDING: (config.vocab_size, config.embed_dim)}


def in_order(config: TransformerConfig) -> Iterator[tuple[str, int | None]]:
    """Yields every array once: the embedding, which is the largest, then each layer, then the final norm."""
    in_blocks = [name for name, parameter in parameter_table(config).items() if parameter.layers]
    yield EMBEDDING, None
    yield from ((name, layer) for layer in range(config.num_layers) for name in in_blocks)
    yield FINAL_NORM, None


def widest(dtypes: Iterable[str]) -> str:
    """Returns the dtype that holds the numbers of all of these: float32 for bfloat16 and float16 together."""
    return str(jnp.result_type(*dtypes))


def check_tensors(
    found: Mapping[str, tuple[tuple[int, ...], str]],
    wanted: Iterable[tuple[str, tuple[int, ...]]],
    place: str,
    described_by: str,
) -> None:
    """Compare the tensors in published files with those of the model that a config describes.

    Args:
      found: The shape and dtype of each tensor, by name.
      wanted: The expected names and shapes. It is read only up to the first missing tensor, because a config
        can ask for any number of them.
      place: The location of the files, for messages.
      described_by: The source of the config, for messages.

    Raises:
      UserError: A tensor is missing, has the wrong shape, is not part of the model, or has a dtype that is
        not in `DTYPES`.
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
