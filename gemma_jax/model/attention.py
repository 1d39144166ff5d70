"""Causal attention within segments. Training, prefill and decode use the same mask.

Shape legend: B batch, L queries, S keys, N query heads, K key/value heads, G query heads for each
key/value head, H head dim.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gemma_jax.model.cache import KVCache, Vectors
from gemma_jax.model.ops import IntArray
from gemma_jax.model.paged import fits_paged, paged_attend
from gemma_jax.model.splash import fits_splash, splash_attend
from gemma_jax.model.triton import fits_triton, triton_attend
from gemma_jax.sharding import platform
from gemma_jax.weights.matmul import precision

PREFILL_CHUNK = 512  # tokens of each prompt per chunk, where no attention kernel for whole rows is available
QUERY_BLOCK = 64  # new tokens whose scores against the whole cache are in memory at once
ATTENDED = "attended"  # the name of self_attend's output in the policies of jax.checkpoint


def attention_mask(
    query_positions: IntArray, query_segments: IntArray, key_positions: IntArray, key_segments: IntArray
) -> jax.Array:
    """Returns the mask: True where a query may attend to a key, in the same segment and not after the query.

    Segment 0 is padding: no token of a document attends to it, and it attends only to itself.

    Args:
      query_positions, query_segments: [B, L] integers.
      key_positions, key_segments: [B, S] integers.

    Returns:
      [B, L, S] booleans.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    not_later = key_positions[:, None, :] <= query_positions[:, :, None]
    return jnp.asarray(same & not_later)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes attention with the softmax in float32. This is the reference for every kernel.

    Args:
      q: [B, L, N, H], already scaled.
      k, v: [B, S, K, H] with K a divisor of N.
      mask: [B, L, S] booleans. A query whose mask is all False returns the mean of all values.

    Returns:
      [B, L, N, H] in q's dtype.
    """
    B, L, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    # The queries that share a key head form one matrix: on CPU the matmuls and their gradients then run
    # 1.2 times as fast as einsums over all axes (benchmarks/LOG.md).
    q = q.reshape(B, L, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * L, H)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    wide_dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(
        "BKQH,BKSH->BKQS", q, k, precision=precision(q.dtype), preferred_element_type=wide_dtype
    )
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, L, S), jnp.finfo(wide_dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(B, K, G * L, S)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v, precision=precision(q.dtype))
    return out.reshape(B, K, G, L, H).transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)


def self_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: IntArray, segments: IntArray, mesh: Mesh
) -> jax.Array:
    """Computes causal attention within whole rows, with the kernel for the mesh's devices.

    Args:
      q: [B, L, N, H], already scaled.
      k, v: [B, L, K, H].
      positions, segments: [B, L]; within a segment, positions increase from slot to slot.
      mesh: The mesh that the arrays are placed on.

    Returns:
      [B, L, N, H] in q's dtype.
    """
    if platform(mesh) == "tpu" and fits_splash(q):
        return splash_attend(q, k, v, segments, mesh, residuals=ATTENDED)
    if platform(mesh) == "gpu" and fits_triton(q, mesh):
        return triton_attend(q, k, v, segments, mesh, residuals=ATTENDED)
    return checkpoint_name(causal_attend(q, k, v, positions, segments), ATTENDED)


def causal_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: IntArray, segments: IntArray
) -> jax.Array:
    """Computes `self_attend` on any platform, and skips most of the scores that the mask would discard.

    Queries are split into blocks, and each block attends only to the keys up to its own end. On a long row
    this is half of the work of `attend`. The scores of only one block are in memory at once, also in the
    backward pass, which recomputes them.
    """
    L = q.shape[1]
    # Each block adds code to the compiled program, so there are at most 16 blocks, of at least 128 queries.
    block = max(128, -(-L // 16))
    outputs = []
    for start in range(0, L, block):
        queries, keys = slice(start, start + block), slice(0, start + block)
        mask = attention_mask(
            positions[:, queries], segments[:, queries], positions[:, keys], segments[:, keys]
        )
        outputs.append(jax.checkpoint(attend)(q[:, queries], k[:, keys], v[:, keys], mask))
    return jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def prefill_chunk(length: int, head_dim: int, dtype: jax.typing.DTypeLike, mesh: Mesh) -> int:
    """Returns how many tokens of each prompt prefill processes at once.

    This is the whole prompt where a kernel for whole rows is available: its memory is linear in the prompt's
    length, and each chunk would have to gather the weights again that fsdp splits.
    """
    q = jax.ShapeDtypeStruct((1, length, 1, head_dim), jnp.dtype(dtype))
    if platform(mesh) == "tpu" and fits_splash(q) or platform(mesh) == "gpu" and fits_triton(q, mesh):
        return length
    return min(length, PREFILL_CHUNK)


def cache_attend(
    q: jax.Array,
    written: tuple[Vectors, Vectors],
    layer: jax.Array | int,
    positions: IntArray,
    segments: IntArray,
    cache: KVCache,
    mesh: Mesh,
) -> jax.Array:
    """Computes attention of new tokens to the cache, with the kernel for the mesh's devices.

    Args:
      q: [B, L, N, H], already scaled.
      written: Keys and values of the cache, which already contain the new tokens.
      layer: Integer scalar.
      positions, segments: [B, L], those of the new tokens.
      cache: The cache, which holds the position and segment of each slot.
      mesh: The mesh that the arrays are placed on.

    Returns:
      [B, L, N, H] in q's dtype.
    """
    if platform(mesh) == "tpu" and fits_paged(q, written[0].numbers, mesh):
        keys, values = written
        return paged_attend(q, keys.numbers, values.numbers, layer, cache.lengths, mesh)
    k, v = (x.of_layer(layer, q.dtype) for x in written)

    def of_block(block: tuple[jax.Array, IntArray, IntArray]) -> jax.Array:
        q, positions, segments = block
        return attend(q, k, v, attention_mask(positions, segments, cache.positions, cache.segments))

    B, L = q.shape[:2]
    if L <= QUERY_BLOCK or L % QUERY_BLOCK:
        return of_block((q, positions, segments))
    blocks = jax.tree.map(
        lambda x: x.reshape(B, -1, QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1), (q, positions, segments)
    )
    return jax.lax.map(of_block, blocks).swapaxes(0, 1).reshape(q.shape)
