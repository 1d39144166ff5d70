"""Attention of whole rows on NVIDIA GPUs, with jax's attention kernel for Triton.

The kernel holds the scores of one block at a time, and skips the blocks that the causal mask leaves empty.
Shape legend: B batch, L length, N query heads, K key/value heads, G query heads for each key/value head,
H head dim.
"""

import functools
import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gemma_jax.model.ops import IntArray
from gemma_jax.sharding import partition_spec, platform

BLOCK = (
    64  # queries and keys per block of the forward pass; at H = 256, 128 exceed the shared memory of an H100
)
BACKWARD_BLOCK = 32  # in the backward pass, which holds twice as many blocks
SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # 100 KiB of it: too little for BLOCK at H = 256


def capability(mesh: Mesh) -> tuple[int, int]:
    """Returns the compute capability of the mesh's GPUs, such as (9, 0); (0, 0) if they are not NVIDIA's."""
    found = re.fullmatch(r"(\d+)\.(\d+)", mesh.devices.flat[0].compute_capability)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_ampere(mesh: Mesh) -> bool:
    """Whether the mesh's GPUs are of the generation Ampere or later, which bfloat16 and Triton need."""
    return capability(mesh) >= (8, 0)


def fits_triton(q: jax.Array | jax.ShapeDtypeStruct, mesh: Mesh) -> bool:
    """Returns whether the kernel supports queries [B, L, N, H] of this shape and dtype on the mesh's GPUs.

    Not float32, whose products the kernel computes in TensorFloat-32.
    """
    return q.dtype.itemsize == 2 and 16 <= q.shape[3] <= 256 and is_ampere(mesh)


@functools.cache
def _kernel() -> Any:
    """Returns the module of the kernel, which jax 0.12 still has but calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Imported here because importing Pallas takes half a second.
        from jax.experimental.pallas.ops.gpu import attention
    return attention


def triton_attend(
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
    (L, N), K = q.shape[1:3], k.shape[2]
    if K > 1 and K % mesh.shape["tensor"]:
        # The key heads cannot be split over the tensor axis, so each query head gets a key head of its own.
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    is_small = platform(mesh) == "gpu" and capability(mesh) in SMALL_MEMORY and q.shape[3] > 128
    settings = _Settings(BACKWARD_BLOCK if is_small else BLOCK, residuals, interpret)
    more = -L % BLOCK  # the kernel needs whole blocks; no query attends to what comes after it
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(jnp.asarray(segments, jnp.int32), ((0, 0), (0, more)))

    def of_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        B, L, N, H = q.shape
        K = k.shape[2]
        return _attend(q.reshape(B, L, K, N // K, H), k, v, segments, settings).reshape(q.shape)

    spec = partition_spec(("batch", "length", "heads", "head_dim"), q.shape, mesh, "queries")
    spec_kv = partition_spec(("batch", "length", "kv_heads", "head_dim"), k.shape, mesh, "keys")
    spec_segments = partition_spec(("batch", "length"), segments.shape, mesh, "segments")
    attend = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(spec, spec_kv, spec_kv, spec_segments),
        out_specs=spec,
        check_vma=False,  # the kernel's outputs do not declare over which mesh axes they vary
    )
    return attend(q, k, v, segments)[:, :L]


class _Settings(NamedTuple):
    block: int  # of the forward pass
    residuals: str
    interpret: bool

    def of_kernel(self, *, return_residuals: bool) -> tuple[Any, ...]:
        """Returns the arguments of the kernel after its arrays, in their order."""
        blocks = _kernel().BlockSizes(self.block, self.block, *[BACKWARD_BLOCK] * 4)
        scale, causal, warps, stages, grid, debug = 1.0, True, None, 2, None, False
        return scale, causal, blocks, "triton", warps, stages, grid, self.interpret, debug, return_residuals


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, settings: _Settings) -> jax.Array:
    """Returns the output [B, L, K, G, H] for queries of that shape and keys [B, L, K, H].

    The kernel wants as many key heads as query heads. Mapped over the query heads of each key head, it reads
    the same keys G times instead of G copies of them.
    """
    return _forward(q, k, v, segments, settings)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, settings: _Settings
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def of_heads(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _kernel().mha(q, k, v, segments, *settings.of_kernel(return_residuals=True))

    out, log_partitions = jax.vmap(of_heads, 3, (3, 0))(q)
    out, log_partitions = (checkpoint_name(x, settings.residuals) for x in (out, log_partitions))
    return out, (q, k, v, segments, out, log_partitions)


def _backward(settings: _Settings, saved: tuple[jax.Array, ...], d_out: jax.Array) -> Any:
    q, k, v, segments, out, log_partitions = saved

    def of_heads(q: jax.Array, out: jax.Array, log_partitions: jax.Array, d_out: jax.Array) -> Any:
        kept = (q, k, v, segments, out, log_partitions)
        return _kernel().mha.bwd(*settings.of_kernel(return_residuals=False), kept, d_out)[:3]

    dq, dk, dv = jax.vmap(of_heads, (3, 3, 0, 3), (3, 0, 0))(q, out, log_partitions, d_out)
    dk, dv = (jnp.sum(x, axis=0, dtype=jnp.float32).astype(x.dtype) for x in (dk, dv))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)
