"""Next-token cross entropy over a large vocabulary, in blocks.

There are two methods. Blocks of positions against the whole vocabulary: each logit is computed once, because
the forward pass also computes the gradients, which the backward pass only scales; but the whole embedding and
its whole gradient are in memory. This is for CPUs and small vocabularies. All positions against blocks of the
vocabulary (`model.scoring`): each logit is computed twice, first for the log-partition and then for the
gradients, but only one block of the embedding and of its gradient is needed at once, and their communication
overlaps with the matmuls. This is for TPUs, and where rows of the embedding are trained.

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
from gemma_jax.model.scoring import Logits, Table, gradient_of_rows, scores_of
from gemma_jax.sharding import RULES, partition_spec
from gemma_jax.weights import NO_CONTEXT, Context, Weight, matmul
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
    context: Context = NO_CONTEXT,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the cross entropy of each target, in nats.

    Args:
      hidden: [B, L, D] hidden states after the final norm.
      embedding: The tied embedding table. It must be frozen if its kind of weight is not differentiable.
      targets: [B, L] integers below vocab_size.
      weights: [B, L] weights; 0 masks a position.
      settings: The vocabulary size, block sizes and z-loss.
      context: The context of the model's call.

    Returns:
      Two sums. The first is minimised: cross entropy plus z_loss times the square of the log-partition
      (PaLM, 2022), which keeps logits from drifting. The second is the cross entropy alone, for reporting; no
      gradient flows through it.
    """
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    if settings.vocab_block or embedding.table is not embedding:
        vocabulary, block = settings.vocab_size, settings.vocab_block
        scores = scores_of(hidden, embedding, targets, vocabulary, context, block)
        total, reported = _sums(scores.log_partition, scores.of_targets, weights, settings.z_loss)
        return total, lax.stop_gradient(reported)
    structure, arrays = embedding.parts()
    return _loss(hidden, arrays, targets, weights, (structure, settings))


Static = tuple[Structure, LossSettings]
Sums = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(
    hidden: jax.Array, arrays: list[jax.Array], targets: jax.Array, weights: jax.Array, static: Static
) -> Sums:
    structure, settings = static
    scores = scores_of(hidden, structure.weight(arrays), targets, settings.vocab_size)
    return _sums(scores.log_partition, scores.of_targets, weights, settings.z_loss)


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
        logits = Logits.of(h, whole, first, table)
        largest = jnp.max(logits.logits, axis=-1)
        summed = jnp.sum(jnp.exp(logits.logits - largest[:, None]), axis=-1)
        log_partition = _log_partition(largest, summed)
        sums = _sums(log_partition, lax.psum(logits.of_targets(t), "tensor"), w, z_loss)
        d_logits = _d_logits(logits, log_partition, t, w, z_loss).astype(h.dtype)
        d_h = lax.psum(matmul(d_logits, whole), "tensor")
        if d_table is not None:
            d_table += gradient_of_rows(d_logits, h)
        return (total + sums[0], reported + sums[1], d_table), d_h

    zero = jnp.zeros((), wide_dtype)
    blocks = _Positions(*(_blocks(x[None], block)[:, 0] for x in positions))
    d_table = jnp.zeros(whole.shape, wide_dtype) if trained else None
    (total, reported, d_table), d_h = lax.scan(body, (zero, zero, d_table), blocks)
    if d_table is not None:
        # A sum over all tokens, which the loss scale does not reach, can exceed float16.
        d_table = table.scattered(d_table if dtype == jnp.float16 else d_table.astype(dtype), 1)
    return (total, reported), (_whole(d_h[:, None], len(positions.h))[0], d_table)


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
