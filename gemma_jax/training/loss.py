"""Next-token cross entropy over a large vocabulary, in blocks.

A float32 [B, L, V] tensor of logits is 8.4 GB for one row of 8192 tokens, so logits exist for one block at a
time. The forward pass of the loss forms its gradients too; the backward pass only scales them. There are two
ways to go. A block of positions against the whole vocabulary needs each logit once, and the gradient of the
whole embedding in one piece: for CPUs and small vocabularies. All positions against a block of the vocabulary
needs each logit twice, first for the log-partition and then for the gradients, but only a block of the
embedding and of its gradient, whose exchange between devices goes on beside the products: for TPUs.

Each device works on its own rows of the batch (`shard_map`), so that what goes between devices is what stands
here: each part of the embedding is gathered once a pass, each part of its gradient summed once.

Shape legend: B batch, L length, n positions of a block, D embed, V stored vocabulary rows, v rows of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.model import mask_padding_rows
from gemma_jax.model.ops import Integers
from gemma_jax.sharding import RULES, constrain, partition_spec
from gemma_jax.weights import fsdp
from gemma_jax.weights.product import precision, product

# Of logits, in nats. exp overflows float32 at 88 and gives 0 at -88, which is nothing beside the largest
# logit of a block, at -SHIFT.
SHIFT = 20.0
SHIFT_ROWS = 1024  # of the vocabulary: where that logit is looked for
LARGEST_EXPONENT = 80.0


class LossSettings(NamedTuple):
    """What the loss is computed with; static under jit."""

    vocab_size: int
    block: int  # positions of a row whose logits exist at one time
    vocab_block: int  # or vocabulary rows, for all positions; 0 goes by positions
    z_loss: float
    mesh: Mesh


def _blocks(x: jax.Array | np.ndarray, block: int) -> jax.Array:
    """[B, L, ...] -> [blocks, B, b, ...], zeros filling the last block."""
    B, L = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -L % block)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)


def _whole(blocks: jax.Array, length: int) -> jax.Array:
    """The inverse of `_blocks`."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])[:, :length]


def token_log_probs(
    hidden: jax.Array, embedding: jax.Array, targets: Integers, settings: LossSettings
) -> jax.Array:
    """Log-probability of each target, in nats.

    Args:
      hidden: [B, L, D] after the final norm.
      embedding: [V, D].
      targets: [B, L] integers below vocab_size.
      settings: block size and mesh.

    Returns:
      [B, L] in at least float32.
    """
    log_partition, target_logits = _partition_and_targets(hidden, embedding, targets, settings)
    return target_logits - log_partition


def _partition_and_targets(
    hidden: jax.Array, embedding: jax.Array, targets: Integers, settings: LossSettings
) -> tuple[jax.Array, jax.Array]:
    """The log-partition of each position, and the logit of its target: [B, L] each."""
    table = embedding.astype(hidden.dtype)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def body(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        h, t = block
        logits = product(h, table.T, dtype=wide)
        logits = constrain(logits, ("batch", "length", "vocab"), settings.mesh)
        logits = mask_padding_rows(logits, settings.vocab_size)
        of_targets = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        return None, (jax.nn.logsumexp(logits, axis=-1), of_targets)

    block = min(settings.block, hidden.shape[1])
    _, blocks = lax.scan(body, None, (_blocks(hidden, block), _blocks(targets, block)))
    log_partition, target_logits = (_whole(x, hidden.shape[1]) for x in blocks)
    return log_partition, target_logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def next_token_loss(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: Integers,
    weights: jax.Array | np.ndarray,
    settings: LossSettings,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the cross entropy of each target, in nats.

    Args:
      hidden: [B, L, D] after the final norm.
      embedding: [V, D].
      targets: [B, L] integers below vocab_size.
      weights: [B, L]; 0 leaves a position out.
      settings: vocabulary size, block sizes, z-loss and mesh.

    Returns:
      The sum to be minimised: cross entropy plus z_loss times the square of the log-partition
      (PaLM, 2022), which keeps logits from drifting; and the cross entropy alone, for reporting,
      through which no gradient flows.
    """
    log_partition, target_logits = _partition_and_targets(hidden, embedding, targets, settings)
    return _sums(log_partition, target_logits, jnp.asarray(weights), settings.z_loss)


def _sums(
    log_partition: jax.Array, target_logits: jax.Array, weights: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """What `next_token_loss` gives, of some positions."""
    cross_entropy = jnp.sum(weights * (log_partition - target_logits))
    return cross_entropy + z_loss * jnp.sum(weights * jnp.square(log_partition)), cross_entropy


class _Block(NamedTuple):
    """Logits of some positions, and of vocabulary rows that lie together on this device."""

    logits: jax.Array  # [n, v], -inf in rows that only pad the vocabulary
    rows: jax.Array  # [v]: their numbers in the whole vocabulary

    @classmethod
    def of(cls, h: jax.Array, table: jax.Array, first: jax.Array | int, vocab_size: int) -> "_Block":
        """Of hidden states [n, D] and the embedding's rows [v, D] from number `first` on."""
        wide = jnp.promote_types(h.dtype, jnp.float32)
        rows = first + jnp.arange(table.shape[0])
        return cls(jnp.where(rows < vocab_size, product(h, table.T, dtype=wide), -jnp.inf), rows)

    def of_targets(self, targets: jax.Array) -> jax.Array:
        """[n]: the logit of each target, 0 where it is not in this block."""
        return jnp.sum(jnp.where(self.rows == targets[:, None], self.logits, 0), axis=-1)

    def gradient(
        self, log_partition: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float
    ) -> jax.Array:
        """[n, v]: of the loss with respect to the logits."""
        probabilities = jnp.exp(self.logits - log_partition[:, None])
        scaled = (1 + 2 * z_loss * log_partition)[:, None] * probabilities
        return weights[:, None] * (scaled - (self.rows == targets[:, None]))


def _log_partition(largest: jax.Array, summed: jax.Array) -> jax.Array:
    """[n]: over all devices' rows, of the largest logit of this one's and its sum of exp(logit - largest)."""
    over_all = lax.pmax(largest, "tensor")
    return over_all + jnp.log(lax.psum(summed * jnp.exp(largest - over_all), "tensor"))


def _gathered(shard: jax.Array, dtype: jax.typing.DTypeLike, mesh: Mesh) -> jax.Array:
    """[v, D] of this device's part [v, D / fsdp]; what travels has the dtype of the activations."""
    return fsdp.gather(shard.astype(dtype), 1, fsdp.stages(mesh))


def _d_columns(d_logits: jax.Array, h: jax.Array, mesh: Mesh) -> jax.Array:
    """[D / fsdp, v]: this device's part of the sum over devices of the gradient of rows of the embedding."""
    return fsdp.scatter_sum(_d_table(d_logits, h).T.astype(h.dtype), 0, fsdp.stages(mesh))


def _d_table(d_logits: jax.Array, h: jax.Array) -> jax.Array:
    """[v, D], as one product of two matrices, for the reason that weights.product gives."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    return lax.dot(d_logits.T, h, precision=precision(h.dtype), preferred_element_type=wide)


Sums = tuple[jax.Array, jax.Array]
Gradients = tuple[
    jax.Array, jax.Array
]  # of the hidden states [n, D] and of this device's part of the embedding


def _by_positions(
    h: jax.Array, shard: jax.Array, targets: jax.Array, weights: jax.Array, block: int, settings: LossSettings
) -> tuple[Sums, Gradients]:
    """Loss and gradients of this device's positions, `block` of them at a time."""
    table = _gathered(shard, h.dtype, settings.mesh)
    first = lax.axis_index("tensor") * table.shape[0]
    wide = jnp.promote_types(h.dtype, jnp.float32)
    Carry = tuple[jax.Array, jax.Array, jax.Array]

    def body(carry: Carry, positions: tuple[jax.Array, ...]) -> tuple[Carry, jax.Array]:
        total, reported, d_table = carry
        h, t, w = positions
        logits = _Block.of(h, table, first, settings.vocab_size)
        largest = jnp.max(logits.logits, axis=-1)
        summed = jnp.sum(jnp.exp(logits.logits - largest[:, None]), axis=-1)
        log_partition = _log_partition(largest, summed)
        sums = _sums(log_partition, lax.psum(logits.of_targets(t), "tensor"), w, settings.z_loss)
        d_logits = logits.gradient(log_partition, t, w, settings.z_loss).astype(h.dtype)
        d_h = lax.psum(product(d_logits, table), "tensor")
        return (total + sums[0], reported + sums[1], d_table + _d_table(d_logits, h)), d_h

    zero = jnp.zeros((), wide)
    blocks = tuple(_blocks(x[None], block)[:, 0] for x in (h, targets, weights))
    (total, reported, d_table), d_h = lax.scan(body, (zero, zero, jnp.zeros(table.shape, wide)), blocks)
    return (total, reported), (
        _whole(d_h[:, None], len(h))[0],
        fsdp.scatter_sum(d_table.astype(h.dtype), 1, fsdp.stages(settings.mesh)),
    )


def _by_vocabulary(
    h: jax.Array, shard: jax.Array, targets: jax.Array, weights: jax.Array, block: int, settings: LossSettings
) -> tuple[Sums, Gradients]:
    """The same, all positions against `block` rows of the vocabulary at a time."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    blocks = shard.reshape(-1, block, shard.shape[1])
    firsts = lax.axis_index("tensor") * shard.shape[0] + jnp.arange(len(blocks)) * block
    Partition = tuple[jax.Array, jax.Array, jax.Array]

    def logits_of(rows: tuple[jax.Array, jax.Array]) -> _Block:
        return _Block.of(h, _gathered(rows[0], h.dtype, settings.mesh), rows[1], settings.vocab_size)

    def partition(shift: jax.Array) -> Partition:
        """Largest logit, sum of exp(logit - shift), and the target's logit."""

        def body(carry: Partition, rows: tuple[jax.Array, jax.Array]) -> tuple[Partition, None]:
            largest, summed, of_targets = carry
            logits = logits_of(rows)
            largest = jnp.maximum(largest, jnp.max(logits.logits, axis=-1))
            summed += jnp.sum(jnp.exp(logits.logits - shift[:, None]), axis=-1)
            return (largest, summed, of_targets + logits.of_targets(targets)), None

        zeros = jnp.zeros(len(h), wide)
        (largest, summed, of_targets), _ = lax.scan(body, (zeros - jnp.inf, zeros, zeros), (blocks, firsts))
        return lax.pmax(largest, "tensor"), *lax.psum((summed, of_targets), "tensor")

    # With a shift that is known before the product, the compiler takes the sum within the product, and these
    # logits never reach memory: a tenth of the loss's time on TPU. The largest logit of some rows is near
    # enough; where it is not, the true largest is known after one round, and a second one takes it. All
    # devices must turn alike, since they gather together.
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def attempt(state: State) -> State:
        _, shift, *_ = state
        largest, summed, of_targets = partition(shift)
        overflows = lax.pmax(jnp.max(largest - shift), settings.mesh.axis_names) > LARGEST_EXPONENT
        return overflows, jnp.where(overflows, largest, shift), shift + jnp.log(summed), of_targets

    some = logits_of((blocks[0, :SHIFT_ROWS], firsts[0])).logits
    shift = lax.pmax(jnp.max(some, axis=-1), "tensor") + SHIFT
    start = (jnp.asarray(True), shift, shift, shift)
    _, _, log_partition, of_targets = lax.while_loop(lambda state: state[0], attempt, start)
    sums = _sums(log_partition, of_targets, weights, settings.z_loss)

    def gradients(d_h: jax.Array, rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        table = _gathered(rows[0], h.dtype, settings.mesh)
        logits = _Block.of(h, table, rows[1], settings.vocab_size)
        d_logits = logits.gradient(log_partition, targets, weights, settings.z_loss).astype(h.dtype)
        return d_h + product(d_logits, table, dtype=wide), _d_columns(d_logits, h, settings.mesh)

    d_h, d_blocks = lax.scan(gradients, jnp.zeros(h.shape, wide), (blocks, firsts))
    d_shard = d_blocks.transpose(0, 2, 1).reshape(shard.shape)
    return sums, (lax.psum(d_h, "tensor").astype(h.dtype), d_shard)


def _forward(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: Integers,
    weights: jax.Array | np.ndarray,
    settings: LossSettings,
) -> tuple[Sums, Gradients]:
    mesh = settings.mesh
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def of_device(h: jax.Array, shard: jax.Array, t: jax.Array, w: jax.Array) -> tuple[Sums, Gradients]:
        rows, length, width = h.shape
        flat = h.reshape(-1, width), shard, t.reshape(-1), w.reshape(-1).astype(wide)
        if settings.vocab_block:
            limit = min(settings.vocab_block, len(shard))
            block = next(size for size in range(limit, 0, -1) if len(shard) % size == 0)
            sums, (d_h, d_shard) = _by_vocabulary(*flat, block, settings)
        else:
            sums, (d_h, d_shard) = _by_positions(*flat, rows * min(settings.block, length), settings)
        total, reported = lax.psum(sums, RULES["batch"])
        return (total, reported), (d_h.reshape(h.shape), d_shard.astype(embedding.dtype))

    spec = partition_spec(("batch", "length", "residual"), hidden.shape, mesh, "hidden states")
    spec_rows = partition_spec(("batch", "length"), targets.shape, mesh, "targets")
    spec_table = partition_spec(("vocab", "embed"), embedding.shape, mesh, "embedding")
    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(spec, spec_table, spec_rows, spec_rows),
        out_specs=((P(), P()), (spec, spec_table)),
        check_vma=False,  # sums over axes of one device would have to be told
    )(hidden, embedding, jnp.asarray(targets), jnp.asarray(weights))


def _backward(
    settings: LossSettings, gradients: Gradients, cotangents: Sums
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_embedding = gradients
    scale, _ = cotangents
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_embedding * scale).astype(d_embedding.dtype),
        None,
        None,
    )


next_token_loss.defvjp(_forward, _backward)
