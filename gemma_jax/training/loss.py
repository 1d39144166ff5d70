"""Next-token cross entropy over a large vocabulary, in blocks.

The forward pass also computes the gradients; the backward pass only scales them. There are two methods.
Blocks of positions against the whole vocabulary: each logit is computed once, but the whole embedding and its
whole gradient are in memory. This is for CPUs and small vocabularies. All positions against blocks of the
vocabulary: each logit is computed twice, first for the log-partition and then for the gradients, but only one
block of the embedding and of its gradient is needed at once, and their communication overlaps with the
matmuls. This is for TPUs.

Each device works on its own rows of the batch (`shard_map`), so devices communicate only where this file says
so: each part of the embedding is gathered once per pass, and each part of its gradient is summed once.

Shape legend: B batch, L length, n positions in a block, D embed, V stored vocabulary rows, v vocabulary rows
in a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from gemma_jax.model.ops import IntArray
from gemma_jax.model.scoring import Logits, Table, log_partition_and_targets, partition_and_targets
from gemma_jax.sharding import RULES, partition_spec
from gemma_jax.weights import Weight, matmul
from gemma_jax.weights.matmul import precision
from gemma_jax.weights.structure import Structure


class LossSettings(NamedTuple):
    """The settings of the loss; static under jit."""

    vocab_size: int
    block: int  # positions per row whose logits exist at once
    vocab_block: int  # vocabulary rows per block, for all positions; 0 selects blocks of positions
    z_loss: float


def _blocks(x: jax.Array | np.ndarray, block: int) -> jax.Array:
    """[B, L, ...] -> [blocks, B, block, ...], with the last block padded with zeros."""
    B, L = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -L % block)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)


def _whole(blocks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_blocks`."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])[:, :length]


def next_token_loss(
    hidden: jax.Array,
    embedding: Weight,
    targets: IntArray,
    weights: jax.Array | np.ndarray,
    settings: LossSettings,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the cross entropy of each target, in nats.

    Args:
      hidden: [B, L, D] hidden states after the final norm.
      embedding: The tied embedding table. It must be frozen if its kind of weight is not differentiable.
      targets: [B, L] integers below vocab_size.
      weights: [B, L] weights; 0 masks a position.
      settings: The vocabulary size, block sizes and z-loss.

    Returns:
      Two sums. The first is minimised: cross entropy plus z_loss times the square of the log-partition
      (PaLM, 2022), which keeps logits from drifting. The second is the cross entropy alone, for reporting; no
      gradient flows through it.
    """
    structure, arrays = embedding.parts()
    return _loss(hidden, arrays, jnp.asarray(targets), jnp.asarray(weights), (structure, settings))


Static = tuple[Structure, LossSettings]
Sums = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(
    hidden: jax.Array, arrays: list[jax.Array], targets: jax.Array, weights: jax.Array, static: Static
) -> Sums:
    structure, settings = static
    found = log_partition_and_targets(hidden, structure.weight(arrays), targets, settings.vocab_size)
    return _sums(*found, weights, settings.z_loss)


def _sums(
    log_partition: jax.Array, target_logits: jax.Array, weights: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the two sums of `next_token_loss` over some positions."""
    cross_entropy = jnp.sum(weights * (log_partition - target_logits))
    if not z_loss:
        return cross_entropy, cross_entropy
    return cross_entropy + z_loss * jnp.sum(weights * jnp.square(log_partition)), cross_entropy


def _d_logits(
    logits: Logits, log_partition: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float
) -> jax.Array:
    """Returns the gradient of the loss with respect to the logits, [n, v]."""
    probabilities = jnp.exp(logits.logits - log_partition[:, None])
    scaled = (1 + 2 * z_loss * log_partition)[:, None] * probabilities
    return weights[:, None] * (scaled - (logits.rows == targets[:, None]))


def _log_partition(largest: jax.Array, summed: jax.Array) -> jax.Array:
    """Returns the log-partition over the vocabulary rows of all devices, [n].

    Args:
      largest: [n] largest logit among this device's vocabulary rows.
      summed: [n] sum of exp(logit - largest) over this device's vocabulary rows.
    """
    over_all = lax.pmax(largest, "tensor")
    return over_all + jnp.log(lax.psum(summed * jnp.exp(largest - over_all), "tensor"))


def _d_columns(d_logits: jax.Array, h: jax.Array, table: Table) -> jax.Array:
    """Returns this device's shard, [D / fsdp, v], of the gradient of embedding rows, summed over devices."""
    return table.scattered(_d_table(d_logits, h).T.astype(h.dtype), 0)


def _d_table(d_logits: jax.Array, h: jax.Array) -> jax.Array:
    """Returns the gradient of embedding rows, [v, D], as one 2D matmul (`weights.matmul` explains why)."""
    wide_dtype = jnp.promote_types(h.dtype, jnp.float32)
    return lax.dot(d_logits.T, h, precision=precision(h.dtype), preferred_element_type=wide_dtype)


# Gradients of the hidden states, [n, D], and of this device's part of the embedding (None if it is frozen).
Gradients = tuple[jax.Array, jax.Array | None]


class _Positions(NamedTuple):
    """This device's positions: [n, D] hidden states, [n] targets and [n] weights."""

    h: jax.Array
    targets: jax.Array
    weights: jax.Array


def _by_positions(
    positions: _Positions, table: Table, block: int, z_loss: float, trained: bool
) -> tuple[Sums, Gradients]:
    """Computes the loss and gradients of this device's positions, `block` positions at a time."""
    dtype = positions.h.dtype
    whole, first = table.rows(table.parts, dtype), table.first
    wide_dtype = jnp.promote_types(dtype, jnp.float32)
    Carry = tuple[jax.Array, jax.Array, jax.Array | None]

    def body(carry: Carry, positions: _Positions) -> tuple[Carry, jax.Array]:
        total, reported, d_table = carry
        h, t, w = positions
        logits = Logits.of(h, whole, first, table.vocab_size)
        largest = jnp.max(logits.logits, axis=-1)
        summed = jnp.sum(jnp.exp(logits.logits - largest[:, None]), axis=-1)
        log_partition = _log_partition(largest, summed)
        sums = _sums(log_partition, lax.psum(logits.of_targets(t), "tensor"), w, z_loss)
        d_logits = _d_logits(logits, log_partition, t, w, z_loss).astype(h.dtype)
        d_h = lax.psum(matmul(d_logits, whole), "tensor")
        if d_table is not None:
            d_table += _d_table(d_logits, h)
        return (total + sums[0], reported + sums[1], d_table), d_h

    zero = jnp.zeros((), wide_dtype)
    blocks = _Positions(*(_blocks(x[None], block)[:, 0] for x in positions))
    d_table = jnp.zeros(whole.shape, wide_dtype) if trained else None
    (total, reported, d_table), d_h = lax.scan(body, (zero, zero, d_table), blocks)
    if d_table is not None:
        d_table = table.scattered(d_table.astype(dtype), 1)
    return (total, reported), (_whole(d_h[:, None], len(positions.h))[0], d_table)


def _by_vocabulary(
    positions: _Positions, table: Table, block: int, z_loss: float, trained: bool
) -> tuple[Sums, Gradients]:
    """Computes the same as `_by_positions`: all positions, at most `block` vocabulary rows at a time."""
    h, targets, weights = positions
    wide_dtype = jnp.promote_types(h.dtype, jnp.float32)
    blocks = table.blocks(block)
    log_partition, of_targets = partition_and_targets(h, table, blocks, targets)
    sums = _sums(log_partition, of_targets, weights, z_loss)

    def gradients(
        d_h: jax.Array, block: tuple[list[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        rows = table.rows(block[0], h.dtype)
        logits = Logits.of(h, rows, block[1], table.vocab_size)
        d_logits = _d_logits(logits, log_partition, targets, weights, z_loss).astype(h.dtype)
        d_h += matmul(d_logits, rows, dtype=wide_dtype)
        return d_h, _d_columns(d_logits, h, table) if trained else None

    d_h, d_blocks = lax.scan(gradients, jnp.zeros(h.shape, wide_dtype), blocks)
    d_table = None if d_blocks is None else d_blocks.transpose(0, 2, 1).reshape(table.parts[0].shape)
    return sums, (lax.psum(d_h, "tensor").astype(h.dtype), d_table)


def _forward(
    hidden: Any, arrays: list[Any], targets: Any, weights: Any, static: Static
) -> tuple[Sums, tuple[jax.Array, list[jax.Array] | None]]:
    structure, settings = static
    # `perturbed` says whether the loss is differentiated with respect to an argument (jax.custom_vjp.defvjp).
    trained = any(array.perturbed for array in arrays)
    if trained and not structure.differentiable:
        raise ValueError(f"{structure.parameter.name} is of a kind without a gradient; it must be frozen")
    values = [x.value for x in arrays]
    mesh, specs = structure.mesh, structure.specs(values)
    hidden, targets, weights = hidden.value, targets.value, weights.value
    wide_dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def of_device(
        h: jax.Array, parts: list[jax.Array], t: jax.Array, w: jax.Array
    ) -> tuple[Sums, tuple[jax.Array, list[jax.Array] | None]]:
        rows, length, width = h.shape
        positions = _Positions(h.reshape(-1, width), t.reshape(-1), w.reshape(-1).astype(wide_dtype))
        table = Table(structure, specs, parts, settings.vocab_size)
        if settings.vocab_block:
            sums, (d_h, d_table) = _by_vocabulary(
                positions, table, settings.vocab_block, settings.z_loss, trained
            )
        else:
            block = rows * min(settings.block, length)
            sums, (d_h, d_table) = _by_positions(positions, table, block, settings.z_loss, trained)
        total, reported = lax.psum(sums, RULES["batch"])
        d_h = d_h.reshape(h.shape)
        d_arrays = None if d_table is None else [d_table.astype(parts[0].dtype)]
        return (total, reported), (d_h, d_arrays)

    spec = partition_spec(("batch", "length", "residual"), hidden.shape, mesh, "hidden states")
    spec_rows = partition_spec(("batch", "length"), targets.shape, mesh, "targets")
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(spec, specs, spec_rows, spec_rows),
        out_specs=((P(), P()), (spec, specs if trained else None)),
        check_vma=False,  # otherwise sums over mesh axes of size 1 would need annotations
    )(hidden, values, targets, weights)


def _backward(
    static: Static, gradients: tuple[jax.Array, list[jax.Array] | None], cotangents: tuple[Any, Any]
) -> tuple[jax.Array, list[jax.Array] | None, None, None]:
    d_hidden, d_arrays = gradients
    scale, _ = cotangents
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros_like(d_hidden), None, None, None
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    if d_arrays is not None:
        d_arrays = [(d * scale).astype(d.dtype) for d in d_arrays]
    return d_hidden, d_arrays, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)
