"""Our parameters by name and layer: what the readers and writers of published forms speak of.

Shape legend: D embed, F hidden, N query heads, K key/value heads, H head dim, V vocabulary.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from gemma_jax.config import TransformerConfig

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"


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
    D, F, H = config.embed_dim, config.hidden_dim, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    return {
        EMBEDDING: (config.vocab_size, D),
        "blocks.attention_norm": (D,),
        "blocks.attention.q": (D, N, H),
        "blocks.attention.k": (D, K, H),
        "blocks.attention.v": (D, K, H),
        "blocks.attention.o": (N, H, D),
        "blocks.feed_forward_norm": (D,),
        "blocks.feed_forward.gate": (D, F),
        "blocks.feed_forward.up": (D, F),
        "blocks.feed_forward.down": (F, D),
        FINAL_NORM: (D,),
    }


def in_order(config: TransformerConfig) -> Iterator[tuple[str, int | None]]:
    """Every array once: the embedding, which is the largest, the layers one after the other, the norm."""
    in_blocks = [name for name in parameter_shapes(config) if name.startswith("blocks.")]
    yield EMBEDDING, None
    yield from ((name, layer) for layer in range(config.num_layers) for name in in_blocks)
    yield FINAL_NORM, None
