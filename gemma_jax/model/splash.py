"""Attention of whole rows on TPU, with the splash attention kernel of jax.

The kernel holds the scores of one block at a time, and skips the blocks that the causal mask leaves empty.
Shape legend: B batch, L length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_jax.model.ops import IntArray
from gemma_jax.sharding import partition_spec

LANES = 128  # lanes of a TPU's vector unit; the kernel's block sizes are multiples of this
BLOCK = 512  # queries and keys per block; larger ones do not fit v5e's vector memory at head dim 256


def fits_splash(q: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Returns whether the kernel supports queries [B, L, N, H] of this shape and dtype.

    Only bfloat16 is supported, because the kernel computes float32 matmuls in bfloat16 passes.
    """
    return q.dtype == jnp.bfloat16 and q.shape[1] % LANES == 0 and q.shape[3] % LANES == 0


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: IntArray,
    mesh: Mesh,
    *,
    residuals: str,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention of each slot to the slots of its row up to itself that have the same segment.

    Args:
      q: [B, L, N, H], already scaled.
      k, v: [B, L, K, H].
      segments: [B, L].
      mesh: The mesh that rows and heads are split over.
      residuals: The name of the output and the log-partitions in a policy of jax.checkpoint.
      interpret: Whether to run the kernel in interpret mode, which works on any platform but is slow.

    Returns:
      [B, L, N, H] in q's dtype.
    """
    # Imported here because importing Pallas takes half a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    L, N, K = q.shape[1], q.shape[2], k.shape[2]
    tensor = mesh.shape["tensor"]
    if K > 1 and K % tensor:
        # The key heads cannot be split over the tensor axis. Repeated once per query head, they split as the
        # query heads do, so that each device has the key heads of its own query heads.
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    block = next(size for size in range(min(BLOCK, L), 0, -LANES) if L % size == 0)
    names = [field.name for field in dataclasses.fields(splash.BlockSizes)]
    blocks: Any = {name: block for name in names if name.startswith("block_")}

    def of_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        kernel = splash.make_splash_mha(
            mask=splash.MultiHeadMask([splash.CausalMask((L, L))] * q.shape[1]),
            block_sizes=splash.BlockSizes(**blocks),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=residuals,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    segments = jnp.asarray(segments, jnp.int32)
    spec = partition_spec(("batch", "heads", "length", "head_dim"), q.shape, mesh, "queries")
    spec_kv = partition_spec(("batch", "kv_heads", "length", "head_dim"), k.shape, mesh, "keys")
    spec_segments = partition_spec(("batch", "length"), segments.shape, mesh, "segments")
    attend = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(spec, spec_kv, spec_kv, spec_segments),
        out_specs=spec,
        check_vma=False,  # the kernel's outputs do not declare over which mesh axes they vary
    )
    return attend(q, k, v, segments).swapaxes(1, 2)
