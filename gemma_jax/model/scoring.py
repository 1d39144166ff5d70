"""Log-probabilities of given tokens, computed one block of the vocabulary at a time.

A float32 [B, L, V] tensor of logits is 8.4 GB for one row of 8192 tokens, so only the logits of one block of
the vocabulary are in memory at once. Each device computes them for its own rows of the batch (`shard_map`).

Shape legend: B batch, L length, n positions of a device, D embed, V stored vocabulary rows, v vocabulary
rows of a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gemma_jax.model.ops import IntArray
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import partition_spec
from gemma_jax.weights import NO_CONTEXT, Context, Weight, fsdp, matmul
from gemma_jax.weights.matmul import precision
from gemma_jax.weights.structure import Structure

# Before exp, logits are shifted down by the largest logit of a few rows plus this margin, in nats. In float32
# exp overflows at 88 and underflows to 0 at -88, where a term is negligible beside that of the largest logit,
# at -SHIFT.
SHIFT = 20.0
SHIFT_ROWS = 1024  # rows of the vocabulary that are searched for that largest logit
LARGEST_EXPONENT = 80.0
BLOCK_LOGITS = 2**25  # logits in a device's memory at once when tokens are scored: 128 MiB in float32


class Logits(NamedTuple):
    """Logits of some positions for a contiguous block of vocabulary rows on this device."""

    logits: jax.Array  # [n, v], -inf in rows that only pad the vocabulary or are left out
    rows: jax.Array  # [v]: indices of these rows in the whole vocabulary

    @classmethod
    def of(cls, h: jax.Array, rows: jax.Array, first: jax.Array | int, table: "Table") -> "Logits":
        """Computes logits from hidden states [n, D] and embedding rows [v, D], the first at index `first`."""
        wide_dtype = jnp.promote_types(h.dtype, jnp.float32)
        numbers = first + jnp.arange(rows.shape[0])
        counts = numbers < table.vocab_size
        for token in table.without:
            counts &= numbers != token
        return cls(jnp.where(counts, matmul(h, rows.T, dtype=wide_dtype), -jnp.inf), numbers)

    def of_targets(self, targets: jax.Array) -> jax.Array:
        """Returns [n], the logit of each target, or 0 where the target is not in this block."""
        return jnp.sum(jnp.where(self.rows == targets[:, None], self.logits, 0), axis=-1)


class Table(NamedTuple):
    """This device's part of an embedding, for use inside a `shard_map`."""

    structure: Structure
    specs: list[P]  # partition specs of the whole arrays
    parts: list[jax.Array]  # each [vocabulary rows on this device, ...]
    vocab_size: int
    without: tuple[int, ...] = ()  # tokens that are left out

    @property
    def first(self) -> jax.Array:
        """The index of this device's first row in the whole vocabulary."""
        return lax.axis_index("tensor") * len(self.parts[0])

    def rows(self, parts: list[jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
        """Gathers some rows [v, ...] of `parts` and returns them as a dense array [v, D]."""
        if self.structure.differentiable:  # the gather sends them in the activations' dtype
            parts = [part.astype(dtype) for part in parts]
        with jax.named_scope(self.structure.parameter.name):
            return self.structure.weight(self.structure.gather(parts, self.specs)).dense(dtype)

    def scattered(self, gradient: jax.Array, dimension: int) -> jax.Array:
        """Sums a gradient over the devices of a batch; returns this device's part along `dimension`."""
        with jax.named_scope(self.structure.parameter.name):
            return fsdp.scatter_sum(gradient, dimension, fsdp.stages(self.structure.mesh))

    def blocks(self, most: int) -> tuple[list[jax.Array], jax.Array]:
        """Returns `parts` as blocks [blocks, v, ...] of at most `most` rows, and each block's first row."""
        count = len(self.parts[0])
        block = next(size for size in range(min(most, count), 0, -1) if count % size == 0)
        blocks = [part.reshape(-1, block, *part.shape[1:]) for part in self.parts]
        return blocks, self.first + jnp.arange(len(blocks[0])) * block


class Scores(NamedTuple):
    """What the vocabulary's logits amount to at each position, in at least float32."""

    log_partition: jax.Array
    of_targets: jax.Array  # logits
    largest: jax.Array  # logits

    @property
    def log_probs(self) -> jax.Array:
        """Log-probabilities of the targets, in nats."""
        return self.of_targets - self.log_partition


def _partition_and_targets(
    h: jax.Array, table: Table, blocks: tuple[list[jax.Array], jax.Array], targets: jax.Array
) -> Scores:
    """Returns the scores of each position of this device (in a `shard_map`).

    Args:
      h: [n, D] hidden states.
      table: This device's part of the embedding.
      blocks: The blocks that `table.blocks` returns.
      targets: [n].

    Returns:
      Arrays [n], which cover the vocabulary rows of all devices.
    """
    wide_dtype = jnp.promote_types(h.dtype, jnp.float32)
    mesh = table.structure.mesh
    Partition = tuple[jax.Array, jax.Array, jax.Array]

    def logits_of(block: tuple[list[jax.Array], jax.Array]) -> Logits:
        return Logits.of(h, table.rows(block[0], h.dtype), block[1], table)

    def partition(shift: jax.Array) -> Partition:
        """Returns the largest logit, the sum of exp(logit - shift), and the target's logit."""

        def body(carry: Partition, block: tuple[list[jax.Array], jax.Array]) -> tuple[Partition, None]:
            largest, summed, of_targets = carry
            logits = logits_of(block)
            largest = jnp.maximum(largest, jnp.max(logits.logits, axis=-1))
            summed += jnp.sum(jnp.exp(logits.logits - shift[:, None]), axis=-1)
            return (largest, summed, of_targets + logits.of_targets(targets)), None

        zeros = jnp.zeros(len(h), wide_dtype)
        (largest, summed, of_targets), _ = lax.scan(body, (zeros - jnp.inf, zeros, zeros), blocks)
        return lax.pmax(largest, "tensor"), *lax.psum((summed, of_targets), "tensor")

    # With a shift that is known before the matmul, the compiler fuses the sum into the matmul, and these
    # logits are never written to memory: this saves a tenth of the loss's time on TPU. The largest logit of a
    # few rows is normally close enough. Where it is not, the first round finds the true largest logit, and a
    # second round uses it. All devices must run the same number of rounds, because they gather together.
    State = tuple[jax.Array, jax.Array, Scores]

    def attempt(state: State) -> State:
        _, shift, _ = state
        largest, summed, of_targets = partition(shift)
        overflows = lax.pmax(jnp.max(largest - shift), mesh.axis_names) > LARGEST_EXPONENT
        scores = Scores(shift + jnp.log(summed), of_targets, largest)
        return overflows, jnp.where(overflows, largest, shift), scores

    some = logits_of(([block[0, :SHIFT_ROWS] for block in blocks[0]], blocks[1][0])).logits
    shift = lax.pmax(jnp.max(some, axis=-1), "tensor") + SHIFT
    start = (jnp.asarray(True), shift, Scores(shift, shift, shift))
    return lax.while_loop(lambda state: state[0], attempt, start)[2]


def scores_of(
    hidden: jax.Array,
    embedding: Weight,
    targets: IntArray,
    vocab_size: int,
    context: Context = NO_CONTEXT,
    block: int = 0,
) -> Scores:
    """Returns the scores of each position. The log-partition and the target's logit are differentiable.

    The backward pass computes the logits of each block again. A table whose kind of weight is not
    differentiable must be frozen.

    Args:
      hidden: [B, L, D] after the final norm. B is divisible by the number of parts that a batch is split
        into; without a gradient it may also be 1.
      embedding: The tied embedding.
      targets: [B, L] integers below vocab_size.
      vocab_size: The number of tokens, without the rows that pad the table.
      context: The context of the model's call.
      block: The most vocabulary rows in a block; 0 takes a number that limits memory.

    Returns:
      Arrays [B, L].
    """
    wide_dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    replaced = embedding.replaced_logits(hidden, wide_dtype, context)
    structure, arrays = embedding.table.parts()
    static = _Static(structure, vocab_size, replaced[0] if replaced else (), block)
    targets = jnp.asarray(targets)
    scores = Scores(*_scores(hidden, arrays, targets, static))
    if replaced is None:
        return scores
    ids, logits = replaced
    same = targets[..., None] == jnp.asarray(ids)
    of_targets = jnp.sum(jnp.where(same, logits, 0), axis=-1)
    return Scores(
        jnp.logaddexp(scores.log_partition, jax.nn.logsumexp(logits, axis=-1)),
        jnp.where(jnp.any(same, axis=-1), of_targets, scores.of_targets),
        jnp.maximum(scores.largest, jnp.max(logits, axis=-1)),
    )


class _Static(NamedTuple):
    """What of `scores_of` is static under jit."""

    structure: Structure
    vocab_size: int
    without: tuple[int, ...]
    block: int

    def specs(self, hidden: Any, arrays: list[Any]) -> tuple[P, list[P], P]:
        """Returns how hidden states, the arrays of the embedding, and targets are split over the mesh."""
        mesh = self.structure.mesh
        spec = partition_spec(("batch", "length", "residual"), hidden.shape, mesh, "hidden states")
        rows = partition_spec(("batch", "length"), hidden.shape[:2], mesh, "targets")
        return spec, self.structure.specs(arrays), rows

    def blocks(self, table: Table, positions: int) -> tuple[list[jax.Array], jax.Array]:
        """Returns the blocks of a device's table."""
        return table.blocks(self.block or max(SHIFT_ROWS, BLOCK_LOGITS // positions))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(hidden: jax.Array, arrays: list[jax.Array], targets: jax.Array, static: _Static) -> Scores:
    spec, specs, rows = static.specs(hidden, arrays)

    def of_device(h: jax.Array, parts: list[jax.Array], targets: jax.Array) -> Scores:
        table = Table(static.structure, specs, parts, static.vocab_size, static.without)
        h = h.reshape(-1, h.shape[-1])
        scores = _partition_and_targets(h, table, static.blocks(table, len(h)), targets.reshape(-1))
        return Scores(*(x.reshape(targets.shape) for x in scores))

    mapped: Callable[..., Scores] = jax.shard_map(
        of_device,
        mesh=static.structure.mesh,
        in_specs=(spec, specs, rows),
        out_specs=rows,
        check_vma=False,  # otherwise sums over mesh axes of size 1 need annotations
    )
    return mapped(hidden, arrays, targets)


Saved = tuple[jax.Array, list[jax.Array], jax.Array, jax.Array, tuple[()] | None]


def _forward(hidden: Any, arrays: list[Any], targets: Any, static: _Static) -> tuple[Scores, Saved]:
    # `perturbed` says whether anything is differentiated with respect to an argument (jax.custom_vjp.defvjp).
    trained = any(array.perturbed for array in arrays)
    if trained and not static.structure.differentiable:
        raise ValueError(
            f"{static.structure.parameter.name} is of a kind without a gradient; it must be frozen"
        )
    values = [x.value for x in arrays]
    scores = _scores(hidden.value, values, targets.value, static)
    return scores, (hidden.value, values, targets.value, scores.log_partition, () if trained else None)


def _backward(
    static: _Static, saved: Saved, cotangents: Scores
) -> tuple[jax.Array, list[jax.Array] | None, None]:
    hidden, arrays, targets, log_partition, trained = saved
    spec, specs, rows = static.specs(hidden, arrays)
    wide_dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def of_device(
        h: jax.Array, parts: list[jax.Array], *of_rows: jax.Array
    ) -> tuple[jax.Array, list[jax.Array] | None]:
        table = Table(static.structure, specs, parts, static.vocab_size, static.without)
        flat = h.reshape(-1, h.shape[-1])
        targets, log_partition, d_partition, d_targets = (x.reshape(-1, 1) for x in of_rows)

        def gradients(
            d_h: jax.Array, block: tuple[list[jax.Array], jax.Array]
        ) -> tuple[jax.Array, jax.Array | None]:
            dense = table.rows(block[0], h.dtype)
            logits = Logits.of(flat, dense, block[1], table)
            d_logits = d_partition * jnp.exp(logits.logits - log_partition)
            d_logits = (d_logits + d_targets * (logits.rows == targets)).astype(h.dtype)
            d_h += matmul(d_logits, dense, dtype=wide_dtype)
            if trained is None:
                return d_h, None
            return d_h, table.scattered(gradient_of_rows(d_logits, flat).T.astype(h.dtype), 0)

        d_h, d_blocks = lax.scan(
            gradients, jnp.zeros(flat.shape, wide_dtype), static.blocks(table, len(flat))
        )
        d_h = lax.psum(d_h, "tensor").astype(h.dtype).reshape(h.shape)
        if d_blocks is None:
            return d_h, None
        return d_h, [d_blocks.transpose(0, 2, 1).reshape(parts[0].shape).astype(parts[0].dtype)]

    def given(cotangent: Any) -> jax.Array:
        zero = isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
        return jnp.zeros(targets.shape, wide_dtype) if zero else cotangent

    of_rows = (targets, log_partition, given(cotangents.log_partition), given(cotangents.of_targets))
    d_hidden, d_arrays = jax.shard_map(
        of_device,
        mesh=static.structure.mesh,
        in_specs=(spec, specs, *[rows] * 4),
        out_specs=(spec, None if trained is None else specs),
        check_vma=False,
    )(hidden, arrays, *of_rows)
    return d_hidden, d_arrays, None


_scores.defvjp(_forward, _backward, symbolic_zeros=True)


def gradient_of_rows(d_logits: jax.Array, h: jax.Array) -> jax.Array:
    """Returns the gradient of embedding rows, [v, D], as one 2D matmul (`weights.matmul` explains why)."""
    wide_dtype = jnp.promote_types(h.dtype, jnp.float32)
    return lax.dot(d_logits.T, h, precision=precision(h.dtype), preferred_element_type=wide_dtype)


def token_log_probs(
    model: Transformer, hidden: jax.Array, targets: IntArray, context: Context = NO_CONTEXT
) -> jax.Array:
    """Returns the log-probability of each target, [B, L], in nats; see `scores_of`."""
    return scores_of(hidden, model.embedding, targets, model.config.vocab_size, context).log_probs
