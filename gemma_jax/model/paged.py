"""Attention of decoding on TPU, with the paged attention kernel of jax.

The kernel reads the part of the cache that is in use, where a matmul would read every slot. Here each row of
the cache is a fixed sequence of pages, so the cache of all layers is passed on as it is, without a copy.

Shape legend: B rows, S slots, N query heads, K key/value heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.model.cache import KEYS_AXES
from gemma_jax.sharding import partition_spec

PAGE = 128  # slots of a page
BLOCK_PAGES = 4  # pages that the kernel reads at once, at most


def fits_paged(q: jax.Array, keys: jax.Array, mesh: Mesh) -> bool:
    """Returns whether the kernel supports queries [B, L, N, H] and a cache [K, layers, B, S, H].

    Each row has one new token, and every device has the key heads of its own query heads.
    """
    K, S, tensor = keys.shape[0], keys.shape[3], mesh.shape["tensor"]
    is_split = K == 1 or K % tensor == 0
    is_bfloat16 = q.dtype == keys.dtype == jnp.bfloat16
    return q.shape[1] == 1 and is_bfloat16 and q.shape[3] % 128 == 0 and S % PAGE == 0 and is_split


def paged_attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array | int, lengths: jax.Array, mesh: Mesh
) -> jax.Array:
    """Computes attention of one token of each row to the slots of its row that are in use.

    Args:
      q: [B, 1, N, H], already scaled.
      keys, values: [K, layers, B, S, H], which already contain the token.
      layer: Integer scalar.
      lengths: [B] int32, the slots in use. They must belong to one segment.
      mesh: The mesh that rows and heads are split over.

    Returns:
      [B, 1, N, H] in q's dtype.
    """
    # Imported here because importing Pallas takes half a second.
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    def of_device(
        q: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        K, layers, B, S, H = keys.shape
        count = S // PAGE
        first = (layer * B + jnp.arange(B, dtype=jnp.int32)) * count
        pages = [x.reshape(K, layers * B * count, PAGE, H) for x in (keys, values)]
        indices = first[:, None] + jnp.arange(count, dtype=jnp.int32)
        at_once = max(n for n in range(1, BLOCK_PAGES + 1) if count % n == 0)
        # A row without any token reads one slot, whose result nobody uses.
        used = jnp.maximum(lengths, 1)
        return paged_attention(q[:, 0], *pages, used, indices, pages_per_compute_block=at_once)[:, None]

    spec = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh, "queries")
    spec_kv = partition_spec(KEYS_AXES, keys.shape, mesh, "cache")
    attend = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(spec, spec_kv, spec_kv, P(), P(spec[0])),
        out_specs=spec,
        check_vma=False,  # the kernel's outputs do not declare over which mesh axes they vary
    )
    return attend(q, keys, values, jnp.asarray(layer, jnp.int32), lengths).astype(q.dtype)
