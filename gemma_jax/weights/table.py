"""The one table of a Gemma's parameters: layers, layouts on disk and published forms all follow from it.

Shape legend: D embed, F hidden, N query heads, K key/value heads, H head dim, V stored vocabulary rows.
"""

import dataclasses

from gemma_jax.config import TransformerConfig

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter, whatever kind of weight holds its numbers."""

    name: str  # dotted, as the model's attributes are called
    axes: tuple[str, ...]  # logical axes of one layer's array
    shape: tuple[int, ...]  # of one layer's array
    fan_in: int  # of its initial normal distribution, whose variance is 1 / fan_in; 0 starts from zeros
    inputs: int  # leading axes that a matmul contracts; 0 where it is no matrix of a layer
    layers: int  # arrays that are stacked on a leading axis `layers`; 0 where there is only one

    @property
    def stacked_axes(self) -> tuple[str, ...]:
        """Logical axes of the array of all layers."""
        return ("layers", *self.axes) if self.layers else self.axes

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of the array of all layers."""
        return (self.layers, *self.shape) if self.layers else self.shape


def parameter_table(config: TransformerConfig) -> dict[str, Parameter]:
    """Every parameter by its name, in the order of the model."""
    D, F, H = config.embed_dim, config.hidden_dim, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    to_heads, to_kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    layers = config.num_layers
    return {
        parameter.name: parameter
        for parameter in (
            # Variance 1 / D makes both the scaled embedding and the logits of a normed stream unit variance.
            Parameter(EMBEDDING, ("vocab", "embed"), (config.vocab_rows, D), D, 0, 0),
            Parameter("blocks.attention_norm", ("embed",), (D,), 0, 0, layers),
            Parameter("blocks.attention.q", to_heads, (D, N, H), D, 1, layers),
            Parameter("blocks.attention.k", to_kv_heads, (D, K, H), D, 1, layers),
            Parameter("blocks.attention.v", to_kv_heads, (D, K, H), D, 1, layers),
            Parameter("blocks.attention.o", ("heads", "head_dim", "embed"), (N, H, D), N * H, 2, layers),
            Parameter("blocks.feed_forward_norm", ("embed",), (D,), 0, 0, layers),
            Parameter("blocks.feed_forward.gate", ("embed", "mlp"), (D, F), D, 1, layers),
            Parameter("blocks.feed_forward.up", ("embed", "mlp"), (D, F), D, 1, layers),
            Parameter("blocks.feed_forward.down", ("mlp", "embed"), (F, D), F, 1, layers),
            Parameter(FINAL_NORM, ("embed",), (D,), 0, 0, 0),
        )
    }
