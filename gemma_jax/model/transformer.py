"""The Gemma decoder.

Shape legend: B batch, L length, S cache slots, D embed, V stored vocabulary rows.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_jax.config import ComputeConfig, TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.model.attention import cache_attend, self_attend
from gemma_jax.model.cache import KVCache
from gemma_jax.model.layers import RESIDUAL, Block
from gemma_jax.model.ops import IntArray, rms_norm
from gemma_jax.model.remat import rematerialized
from gemma_jax.sharding import constrain, platform
from gemma_jax.weights import EMBEDDING, FINAL_NORM, NO_CONTEXT, Context, Kind, Weight, parameter_table


def compute_dtype(compute: ComputeConfig, mesh: Mesh) -> jnp.dtype:
    """Dtype of activations on this mesh.

    Raises:
      UserError: float64, where jax would silently compute in float32.
    """
    if "float64" in (compute.dtype, compute.param_dtype) and jnp.result_type(float) != jnp.float64:
        raise UserError("compute.dtype float64 needs the environment variable JAX_ENABLE_X64=1; set it.")
    if compute.dtype != "auto":
        return jnp.dtype(compute.dtype)
    return jnp.dtype(jnp.float32 if platform(mesh) == "cpu" else jnp.bfloat16)


class Transformer(nnx.Module):
    """Decoder-only transformer with tied embeddings; the blocks are one stacked module, scanned."""

    def __init__(
        self, config: TransformerConfig, compute: ComputeConfig, mesh: Mesh, rngs: nnx.Rngs, kind: Kind
    ) -> None:
        self.dtype = compute_dtype(compute, mesh)
        dtype = jnp.dtype(compute.param_dtype)
        table = parameter_table(config)

        def weight(name: str) -> Weight:
            return kind(table[name], mesh, rngs, dtype)

        def scale(name: str) -> nnx.Param[jax.Array]:
            return nnx.Param(jnp.zeros(table[name].stacked_shape, dtype), axes=table[name].stacked_axes)

        self.embedding = weight(EMBEDDING)
        self.blocks = Block(config, mesh, weight, scale)
        self.final_norm = scale(FINAL_NORM)
        self.config = config
        self.compute = compute
        self.mesh = mesh

    def __call__(
        self, tokens: IntArray, positions: IntArray, segments: IntArray, context: Context = NO_CONTEXT
    ) -> jax.Array:
        """Hidden states of whole sequences, each token seeing the earlier ones of its segment.

        Args:
          tokens: [B, L].
          positions: [B, L], each token's place in its segment.
          segments: [B, L]; 0 is padding.
          context: what every multiplication receives; each layer has a random key of its own.

        Returns:
          [B, L, D] after the final norm.
        """
        graphdef, stacked = nnx.split(self.blocks)
        numbers = None if context.key is None else jnp.arange(self.config.num_layers)

        def body(x: jax.Array, scanned: tuple[jax.Array | None, nnx.State]) -> tuple[jax.Array, None]:
            layer, state = scanned
            block = nnx.merge(graphdef, state)
            attend = partial(self_attend, positions=positions, segments=segments, mesh=self.mesh)
            return block(x, positions, attend, context.of_layer(layer)), None

        body = rematerialized(
            body, self.compute.remat, looped=self.compute.scan_unroll < self.config.num_layers
        )
        x = self.embed(tokens, context)
        x, _ = lax.scan(body, x, (numbers, stacked), unroll=self.compute.scan_unroll)
        return self._normed(x)

    def extend(
        self,
        cache: KVCache,
        tokens: IntArray,
        positions: IntArray,
        segments: IntArray,
        layers: Sequence[nnx.State] | None = None,
        context: Context = NO_CONTEXT,
        *,
        empty: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states of the next tokens of each row, which see what is in the cache too.

        Args:
          cache: what came before.
          tokens, positions, segments: [B, L] as in `__call__`; padding stands at the end of a row.
          layers: the blocks' parameters layer by layer (see `layer_views`), to be used instead of the stacked
            ones, in a program that has each layer separately.
          context: what every multiplication receives; a random key is the same in all layers.
          empty: the cache holds nothing yet, so the tokens see only each other.

        Returns:
          [B, L, D] after the final norm, and the cache with the new tokens in it.
        """
        rows, slots = jnp.arange(tokens.shape[0])[:, None], cache.slots(tokens.shape[1])
        cache = cache.extended(positions, segments)
        graphdef, stacked = nnx.split(self.blocks)
        Carry = tuple[jax.Array, jax.Array, jax.Array]

        # The cache is carried, not scanned over, so that each layer writes its new slots in place.
        def body(carry: Carry, scanned: tuple[jax.Array | int, nnx.State]) -> tuple[Carry, None]:
            x, keys, values = carry
            layer, state = scanned

            def remember_and_attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal keys, values
                keys = keys.at[layer, rows, slots].set(k, mode="drop")
                values = values.at[layer, rows, slots].set(v, mode="drop")
                if empty:
                    return self_attend(q, k, v, positions, segments, self.mesh)
                return cache_attend(q, keys[layer], values[layer], positions, segments, cache)

            x = nnx.merge(graphdef, state)(x, positions, remember_and_attend, context)
            return (x, keys, values), None

        carry = (self.embed(tokens, context), cache.keys, cache.values)
        if layers is None:
            numbers = jnp.arange(self.config.num_layers)
            carry, _ = lax.scan(body, carry, (numbers, stacked), unroll=self.compute.scan_unroll)
        else:
            for scanned in enumerate(layers):
                carry, _ = body(carry, scanned)
        x, keys, values = carry
        return self._normed(x), dataclasses.replace(cache, keys=keys, values=values)

    def logits(self, hidden: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
        """[..., D] -> [..., V] float32; rows that only pad the vocabulary are -inf."""
        wide_dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = self.embedding.unembed(hidden, wide_dtype, context)
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -jnp.inf)

    def embed(self, tokens: IntArray, context: Context = NO_CONTEXT) -> jax.Array:
        """[B, L] -> [B, L, D]: rows of the table times sqrt(D), which is rounded to their dtype."""
        rows = self.embedding.embedding_lookup(tokens, self.dtype, context)
        return constrain(rows * jnp.asarray(self.config.embed_dim**0.5, self.dtype), RESIDUAL, self.mesh)

    def _normed(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.final_norm[...], self.config.norm_epsilon)


def layer_views(params: nnx.State, mesh: Mesh) -> list[nnx.State] | None:
    """The blocks' parameters layer by layer, in the memory of the stacked ones.

    On one CPU device, where a scan copies the weights of each layer out of the stack before it multiplies:
    most of the time of a decoding step. None elsewhere: there the copy is part of the product.

    Args:
      params: of a Transformer; must outlive what is returned, and must not be donated.
      mesh: that they are placed on.
    """
    if platform(mesh) != "cpu" or mesh.size > 1:
        return None
    replicated = NamedSharding(mesh, PartitionSpec())
    # A device's array as numpy's, a slice of that, and back: no step copies.
    stacked = jax.tree.map(np.asarray, params["blocks"])
    layers = len(jax.tree.leaves(stacked)[0])
    return [
        jax.tree.map(lambda stack, i=layer: jax.device_put(stack[i], replicated, may_alias=True), stacked)
        for layer in range(layers)
    ]
