"""The layers of the Gemma decoder as Flax NNX modules.

A module here holds the parameters of all layers, stacked on a leading axis, or those of one layer
once the scan in transformer.py has cut it out. Shape legend: B batch, L length, D embed, F hidden,
N query heads, K key/value heads, H head dim.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gemma_jax.config import TransformerConfig
from gemma_jax.model.ops import Integers, gated_gelu, rms_norm, rope, unfused
from gemma_jax.sharding import constrain, platform
from gemma_jax.weights import weight_product

# attention(q, k, v) -> output; the caller knows the mask, the cache and the kernel
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

RESIDUAL = ("batch", "length", "residual")

# Up to this width the TPU compiler loses nothing by computing a norm or the gelu within the product after it.
# At 3072 such products take a third longer; kept apart, the 2B would lose up to a hundredth (docs/log.md).
FUSED_WIDTH = 2048


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, dtype: jax.typing.DTypeLike
) -> nnx.Param[jax.Array]:
    """A parameter of variance 1 / fan_in, a normal cut at two standard deviations."""
    # 0.8796 is the standard deviation of a standard normal cut at +-2.
    scale = 1 / (0.87962566 * math.sqrt(fan_in))
    value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, dtype)
    return nnx.Param(value * jnp.asarray(scale, dtype), axes=axes)


def zeros(shape: tuple[int, ...], axes: tuple[str, ...], dtype: jax.typing.DTypeLike) -> nnx.Param[jax.Array]:
    """A parameter that starts at zero: the scale of a norm."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


class Attention(nnx.Module):
    """Multi-head, grouped or multi-query attention with rotary positions."""

    def __init__(
        self, config: TransformerConfig, mesh: Mesh, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
    ) -> None:
        layers, D, H = config.num_layers, config.embed_dim, config.head_dim
        N, K = config.num_heads, config.num_kv_heads
        inward = ("layers", "embed", "heads", "head_dim")
        inward_kv = ("layers", "embed", "kv_heads", "head_dim")
        self.q = weight(rngs, (layers, D, N, H), inward, D, dtype)
        self.k = weight(rngs, (layers, D, K, H), inward_kv, D, dtype)
        self.v = weight(rngs, (layers, D, K, H), inward_kv, D, dtype)
        self.o = weight(rngs, (layers, N, H, D), ("layers", "heads", "head_dim", "embed"), N * H, dtype)
        self.config = config
        self.mesh = mesh

    def __call__(self, x: jax.Array, positions: Integers, attend: Attend) -> jax.Array:
        """[B, L, D], [B, L] -> [B, L, D]."""
        config = self.config
        q = rope(weight_product(x, self.q, self.mesh), positions, config.rope_base) * config.head_dim**-0.5
        k = rope(weight_product(x, self.k, self.mesh), positions, config.rope_base)
        v = weight_product(x, self.v, self.mesh)
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        return weight_product(attend(q, k, v), self.o, self.mesh, contract=2)


class FeedForward(nnx.Module):
    """GeGLU: gelu(x gate) * (x up), then down (Shazeer, 2020)."""

    def __init__(
        self, config: TransformerConfig, mesh: Mesh, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
    ) -> None:
        layers, D, F = config.num_layers, config.embed_dim, config.hidden_dim
        self.gate = weight(rngs, (layers, D, F), ("layers", "embed", "mlp"), D, dtype)
        self.up = weight(rngs, (layers, D, F), ("layers", "embed", "mlp"), D, dtype)
        self.down = weight(rngs, (layers, F, D), ("layers", "mlp", "embed"), F, dtype)
        self.mesh = mesh

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        apart = x.shape[-1] > FUSED_WIDTH and platform(self.mesh) == "tpu"
        x = unfused(x) if apart else x
        gate = checkpoint_name(weight_product(x, self.gate, self.mesh), "gate")
        up = checkpoint_name(weight_product(x, self.up, self.mesh), "up")
        hidden = gated_gelu(gate, up)
        return weight_product(unfused(hidden) if apart else hidden, self.down, self.mesh)


class Block(nnx.Module):
    """Attention and feed-forward, each on a normed copy of the residual stream."""

    def __init__(
        self, config: TransformerConfig, mesh: Mesh, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike
    ) -> None:
        norm = ((config.num_layers, config.embed_dim), ("layers", "embed"))
        self.attention_norm = zeros(*norm, dtype)
        self.attention = Attention(config, mesh, rngs, dtype)
        self.feed_forward_norm = zeros(*norm, dtype)
        self.feed_forward = FeedForward(config, mesh, rngs, dtype)
        self.epsilon = config.norm_epsilon
        self.mesh = mesh

    def __call__(self, x: jax.Array, positions: Integers, attend: Attend) -> jax.Array:
        """[B, L, D], [B, L] -> [B, L, D]."""
        x = constrain(x, RESIDUAL, self.mesh)
        x += self.attention(rms_norm(x, self.attention_norm[...], self.epsilon), positions, attend)
        x = checkpoint_name(constrain(x, RESIDUAL, self.mesh), "middle")
        x += self.feed_forward(rms_norm(x, self.feed_forward_norm[...], self.epsilon))
        return constrain(x, RESIDUAL, self.mesh)
