"""The layers of the Gemma decoder as Flax NNX modules.

A module here holds the parameters of all layers, stacked on a leading axis, or those of one layer
after the scan in transformer.py has sliced it out of the stack. Shape legend: B batch, L length, D embed,
F hidden, N query heads, K key/value heads, H head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gemma_jax.config import TransformerConfig
from gemma_jax.model.ops import IntArray, gated_gelu, rms_norm, rope, unfused
from gemma_jax.sharding import constrain, platform
from gemma_jax.weights import NO_CONTEXT, Context, Weight

# attention(q, k, v) -> output; the caller supplies the mask, the cache and the kernel
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Each makes a parameter from its name. The scale of a norm is a plain array, not a `Weight`, because no
# matmul uses it.
MakeWeight = Callable[[str], Weight]
MakeScale = Callable[[str], nnx.Param[jax.Array]]

RESIDUAL = ("batch", "length", "residual")

# With float16, whose numbers end at 65,504, what a block adds to the residual stream is computed at this
# scale: the hidden layer of the feed-forward and the sums over it reach more than that.
SHRINK = 2.0**-6

# Up to this width the TPU compiler loses nothing when it fuses a norm or the gelu into the matmul after it.
# At 3072 a matmul with such a fusion takes a third longer. At the 2B's width, preventing the fusion would
# cost up to 1% (benchmarks/LOG.md).
FUSED_WIDTH = 2048


def shrunk(x: jax.Array) -> jax.Array:
    """Returns x * SHRINK if it is float16, otherwise x."""
    return x * jnp.asarray(SHRINK, x.dtype) if x.dtype == jnp.float16 else x


def _added(weight: Weight, x: jax.Array, context: Context) -> jax.Array:
    """Returns what a block adds to the residual stream, in its dtype, from shrunk activations."""
    out = weight.matmul(x, context)
    return out.astype(jnp.float32) / SHRINK if x.dtype == jnp.float16 else out


class Attention(nnx.Module):
    """Multi-head, grouped or multi-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, weight: MakeWeight) -> None:
        self.q = weight("blocks.attention.q")
        self.k = weight("blocks.attention.k")
        self.v = weight("blocks.attention.v")
        self.o = weight("blocks.attention.o")
        self.config = config

    def __call__(
        self, x: jax.Array, positions: IntArray, attend: Attend, context: Context = NO_CONTEXT
    ) -> jax.Array:
        """Returns [B, L, D] for activations [B, L, D] and positions [B, L]."""
        config = self.config
        q = rope(self.q.matmul(x, context), positions, config.rope_base) * config.head_dim**-0.5
        k = rope(self.k.matmul(x, context), positions, config.rope_base)
        v = self.v.matmul(x, context)
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        return _added(self.o, shrunk(attend(q, k, v)), context)


class FeedForward(nnx.Module):
    """GeGLU: gelu(x @ gate) * (x @ up), then a matmul with `down` (Shazeer, 2020)."""

    def __init__(self, weight: MakeWeight, mesh: Mesh) -> None:
        self.gate = weight("blocks.feed_forward.gate")
        self.up = weight("blocks.feed_forward.up")
        self.down = weight("blocks.feed_forward.down")
        self.mesh = mesh

    def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
        """Returns [B, L, D] for activations [B, L, D]."""
        apart = x.shape[-1] > FUSED_WIDTH and platform(self.mesh) == "tpu"
        x = unfused(x) if apart else x
        gate = checkpoint_name(self.gate.matmul(x, context), "gate")
        up = checkpoint_name(self.up.matmul(x, context), "up")
        hidden = gated_gelu(gate, shrunk(up))
        # A step of decoding has so few rows that the compiler would even compute `up` within the last matmul.
        apart |= x.shape[1] == 1 and platform(self.mesh) == "tpu"
        return _added(self.down, unfused(hidden) if apart else hidden, context)


class Block(nnx.Module):
    """Attention and feed-forward, each applied to a normed copy of the residual stream and added to it."""

    def __init__(
        self, config: TransformerConfig, mesh: Mesh, weight: MakeWeight, scale: MakeScale, dtype: jnp.dtype
    ) -> None:
        self.attention_norm = scale("blocks.attention_norm")
        self.attention = Attention(config, weight)
        self.feed_forward_norm = scale("blocks.feed_forward_norm")
        self.feed_forward = FeedForward(weight, mesh)
        self.epsilon = config.norm_epsilon
        self.mesh = mesh
        self.dtype = dtype  # of the activations in matmuls

    def __call__(
        self, x: jax.Array, positions: IntArray, attend: Attend, context: Context = NO_CONTEXT
    ) -> jax.Array:
        """Returns [B, L, D] for activations [B, L, D] and positions [B, L]."""
        x = constrain(x, RESIDUAL, self.mesh)
        x += self.attention(self._normed(x, self.attention_norm, context), positions, attend, context)
        x = checkpoint_name(constrain(x, RESIDUAL, self.mesh), "middle")
        x += self.feed_forward(self._normed(x, self.feed_forward_norm, context), context)
        return constrain(x, RESIDUAL, self.mesh)

    def _normed(self, x: jax.Array, scale: nnx.Param[jax.Array], context: Context) -> jax.Array:
        return rms_norm(x, context.pick(scale[...]), self.epsilon).astype(self.dtype)
