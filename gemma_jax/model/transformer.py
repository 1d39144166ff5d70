"""The Gemma decoder.

Shape legend: B batch, L length, S cache slots, D embed, V stored vocabulary rows.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from gemma_jax.config import ComputeConfig, TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.model.attention import cache_attend, self_attend
from gemma_jax.model.cache import KVCache, Vectors
from gemma_jax.model.layers import RESIDUAL, Block
from gemma_jax.model.ops import IntArray, rms_norm
from gemma_jax.model.remat import rematerialized
from gemma_jax.model.triton import is_ampere
from gemma_jax.sharding import constrain, platform
from gemma_jax.weights import EMBEDDING, FINAL_NORM, NO_CONTEXT, Context, Kind, Weight, parameter_table


def compute_dtype(compute: ComputeConfig, mesh: Mesh) -> jnp.dtype:
    """Returns the dtype of activations on this mesh.

    Raises:
      UserError: the config asks for float64, but x64 is off, so jax would silently compute in float32; or for
        a dtype that the mesh's devices lack.
    """
    if "float64" in (compute.dtype, compute.param_dtype) and jnp.result_type(float) != jnp.float64:
        raise UserError("compute.dtype float64 needs the environment variable JAX_ENABLE_X64=1; set it.")
    kind = platform(mesh)
    lacks = "float16" if kind == "tpu" else ""
    if kind == "gpu" and not is_ampere(mesh):
        lacks = "bfloat16"
    if compute.dtype == lacks:
        has = "float32 or " + ("float16" if lacks == "bfloat16" else "bfloat16")
        device = mesh.devices.flat[0].device_kind
        raise UserError(f"compute.dtype is {lacks}, which {device} cannot compute in; take {has}.")
    if compute.dtype != "auto":
        return jnp.dtype(compute.dtype)
    if kind == "cpu":
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.float16 if lacks == "bfloat16" else jnp.bfloat16)


def cache_dtype(compute: ComputeConfig, mesh: Mesh) -> jnp.dtype:
    """Returns the dtype of cached keys and values on this mesh."""
    return jnp.dtype(jnp.int8) if compute.cache == "int8" else compute_dtype(compute, mesh)


class Transformer(nnx.Module):
    """A decoder-only transformer with tied embeddings. It scans over one module that stacks all blocks."""

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
        self.blocks = Block(config, mesh, weight, scale, self.dtype)
        self.final_norm = scale(FINAL_NORM)
        self.config = config
        self.compute = compute
        self.mesh = mesh

    def __call__(
        self, tokens: IntArray, positions: IntArray, segments: IntArray, context: Context = NO_CONTEXT
    ) -> jax.Array:
        """Returns the hidden states of whole sequences; a token attends to the earlier ones of its segment.

        Args:
          tokens: [B, L].
          positions: [B, L], each token's position in its segment.
          segments: [B, L]; 0 is padding.
          context: The context that every matmul receives; each layer gets its own random key.

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
        context: Context = NO_CONTEXT,
        *,
        empty: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Returns the hidden states of the next tokens of each row, which also attend to the cache.

        Args:
          cache: The cache of the earlier tokens.
          tokens, positions, segments: [B, L] as in `__call__`; padding is at the end of a row.
          context: The context that every matmul receives; a random key is the same in all layers.
          empty: Whether the cache is still empty, so that the tokens attend only to each other.

        Returns:
          [B, L, D] after the final norm, and the cache with the new tokens in it.
        """
        rows, slots = jnp.arange(tokens.shape[0])[:, None, None], cache.slots(tokens.shape[1])[..., None]
        heads = jnp.arange(self.config.num_kv_heads)
        cache = cache.extended(positions, segments)
        graphdef, stacked = nnx.split(self.blocks)
        Carry = tuple[jax.Array, Vectors, Vectors]

        # The cache is carried, not scanned over, so that each layer writes its new slots in place.
        def body(carry: Carry, scanned: tuple[jax.Array, nnx.State | None]) -> tuple[Carry, None]:
            x, keys, values = carry
            layer, state = scanned
            if state is None:
                block, inside = self.blocks, dataclasses.replace(context, layer=layer)
            else:
                block, inside = nnx.merge(graphdef, state), context

            def remember_and_attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal keys, values
                keys, values = (
                    x.written((heads, layer, rows, slots), n) for x, n in ((keys, k), (values, v))
                )
                if empty:
                    return self_attend(q, k, v, positions, segments, self.mesh)
                return cache_attend(q, (keys, values), layer, positions, segments, cache, self.mesh)

            x = block(x, positions, remember_and_attend, inside)
            return (x, keys, values), None

        # On CPU a scan would copy each layer's weights out of the stack, which takes longer than to multiply
        # by them. So matmuls take the stack and the number of the layer.
        whole = context.sampling and self.mesh.size == 1 and platform(self.mesh) == "cpu"
        carry = (self.embed(tokens, context), cache.keys, cache.values)
        scanned = (jnp.arange(self.config.num_layers), None if whole else stacked)
        (x, keys, values), _ = lax.scan(body, carry, scanned, unroll=self.compute.scan_unroll)
        return self._normed(x), dataclasses.replace(cache, keys=keys, values=values)

    def largest(self, tokens: IntArray, positions: IntArray, segments: IntArray) -> jax.Array:
        """Returns [layers], the largest magnitude in the residual stream after each block; NaN after NaN."""
        graphdef, stacked = nnx.split(self.blocks)
        attend = partial(self_attend, positions=positions, segments=segments, mesh=self.mesh)

        def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, jax.Array]:
            x = nnx.merge(graphdef, state)(x, positions, attend)
            return x, jnp.max(jnp.abs(x))

        return lax.scan(body, self.embed(tokens), stacked)[1]

    def logits(self, hidden: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
        """Returns float32 logits [..., V] of hidden states [..., D]; those of padding rows are -inf."""
        wide_dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = self.embedding.unembed(hidden, wide_dtype, context)
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -jnp.inf)

    def embed(self, tokens: IntArray, context: Context = NO_CONTEXT) -> jax.Array:
        """Returns [B, L, D]: table rows of tokens [B, L] times sqrt(D), which is rounded to their dtype.

        With float16 they are float32, as is the whole residual stream.
        """
        rows = self.embedding.embedding_lookup(tokens, self.dtype, context)
        if self.dtype == jnp.float16:
            rows = rows.astype(jnp.float32)  # the residual stream exceeds the range of float16
        return constrain(rows * jnp.asarray(self.config.embed_dim**0.5, rows.dtype), RESIDUAL, self.mesh)

    def _normed(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.final_norm[...], self.config.norm_epsilon).astype(self.dtype)
