"""Our parameters by name and layer: what the readers and writers of published forms speak of."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from gemma_jax.config import TransformerConfig
from gemma_jax.weights import EMBEDDING, FINAL_NORM, parameter_table


class Weights(Protocol):
    """The weights of a model wherever they lie, one array at a time."""

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
