"""Adapters (LoRA) of a model, wherever they were read: their arrays for a model in memory, or merged weights.

Shape legend: D embed, N query heads, H head dim, R rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_jax.config import TransformerConfig
from gemma_jax.pretrained.layout import Weights
from gemma_jax.weights import EMBEDDING, parameter_table


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is added to one matrix of one layer: `scale` times the product of `a` and `b`."""

    a: np.ndarray  # [*inputs, R] float32, with the axes of the parameter: for q [D, R], for o [N, H, R]
    b: np.ndarray  # [R, *outputs] float32
    scale: float

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return int(self.a.shape[-1])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """All that an adapter adds to a model, or replaces in it."""

    name: str  # where it comes from, for messages
    pairs: dict[tuple[str, int], Pair]  # by parameter, such as "blocks.attention.q", and layer
    rows: dict[int, np.ndarray]  # by token id, what replaces its row of the embedding: [D] float32
    base: str = ""  # the checkpoint that it was trained on, as its author called it
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What identifies the weights of that checkpoint (`adapted.base_identity`), if its files say so."""


def stacked(
    adapters: Sequence[Adapter], config: TransformerConfig
) -> tuple[int, tuple[str, ...], tuple[int, ...], dict[str, np.ndarray]]:
    """Returns the adapters as arrays of one model, whose adapters all have the largest of their ranks.

    Returns:
      The largest rank R; the projections, such as "q", that any of them adapts; the sorted ids of the tokens
      whose rows any of them replaces; and the float32 arrays by name, as in `gemma_jax.weights.Adapters`:
      "blocks.attention.q.a" [layers, adapters, *inputs, R] and "blocks.attention.q.b"
      [layers, adapters, R, *outputs]. Each pair's scale is multiplied into b. What an adapter lacks is zero.
    """
    rank = max((pair.rank for adapter in adapters for pair in adapter.pairs.values()), default=1)
    arrays: dict[str, np.ndarray] = {}
    used = {parameter for adapter in adapters for parameter, _ in adapter.pairs}
    for name, about in parameter_table(config).items():
        if name not in used:
            continue
        inward, outward = about.shape[: about.inputs], about.shape[about.inputs :]
        a = np.zeros((about.layers, len(adapters), *inward, rank), np.float32)
        b = np.zeros((about.layers, len(adapters), rank, *outward), np.float32)
        for i, adapter in enumerate(adapters):
            for layer in range(about.layers):
                if pair := adapter.pairs.get((name, layer)):
                    a[layer, i, ..., : pair.rank] = pair.a
                    b[layer, i, : pair.rank] = pair.scale * pair.b
        arrays |= {f"{name}.a": a, f"{name}.b": b}
    projections = tuple(name.removesuffix(".a").rpartition(".")[2] for name in arrays if name.endswith(".a"))
    rows = tuple(sorted({row for adapter in adapters for row in adapter.rows}))
    return rank, projections, rows, arrays


class MergedWeights:
    """Weights with an adapter merged into them, in float32."""

    def __init__(self, weights: Weights, adapter: Adapter) -> None:
        """Take the weights and an adapter of a model of the same shapes."""
        self._weights, self._adapter = weights, adapter

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        """See `gemma_jax.pretrained.layout.Weights`."""
        array = np.array(self._weights.get(parameter, layer), np.float32)
        if layer is not None and (pair := self._adapter.pairs.get((parameter, layer))):
            array += pair.scale * np.tensordot(pair.a, pair.b, 1)
        if parameter == EMBEDDING:
            for token, row in self._adapter.rows.items():
                array[token] = row
        return array

    def where(self, parameter: str, layer: int | None) -> str:
        """See `gemma_jax.pretrained.layout.Weights`."""
        return f"{self._weights.where(parameter, layer)} with {self._adapter.name}"
