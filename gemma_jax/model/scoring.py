"""Log-probabilities of given tokens, computed one block of the vocabulary at a time.

A float32 [B, L, V] tensor of logits is 8.4 GB for one row of 8192 tokens, so only the logits of one block of
the vocabulary are in memory at once. Each device computes them for its own rows of the batch (`shard_map`).

Shape legend: B batch, L length, n positions of a device, D embed, V stored vocabulary rows, v vocabulary
rows of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gemma_jax.model.ops import IntArray
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import partition_spec
from gemma_jax.weights import Weight, fsdp, matmul
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

    logits: jax.Array  # [n, v], -inf in rows that only pad the vocabulary
    rows: jax.Array  # [v]: indices of these rows in the whole vocabulary

    @classmethod
    def of(cls, h: jax.Array, table: jax.Array, first: jax.Array | int, vocab_size: int) -> "Logits":
        """Computes logits from hidden states [n, D] and embedding rows [v, D], the first at index `first`."""
        wide_dtype = jnp.promote_types(h.dtype, jnp.float32)
        rows = first + jnp.arange(table.shape[0])
        return cls(jnp.where(rows < vocab_size, matmul(h, table.T, dtype=wide_dtype), -jnp.inf), rows)

    def of_targets(self, targets: jax.Array) -> jax.Array:
        """Returns [n], the logit of each target, or 0 where the target is not in this block."""
        return jnp.sum(jnp.where(self.rows == targets[:, None], self.logits, 0), axis=-1)


class Table(NamedTuple):
    """This device's part of an embedding, for use inside a `shard_map`."""

    structure: Structure
    specs: list[P]  # partition specs of the whole arrays
    parts: list[jax.Array]  # each [vocabulary rows on this device, ...]
    vocab_size: int

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


def partition_and_targets(
    h: jax.Array, table: Table, blocks: tuple[list[jax.Array], jax.Array], targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-partition and the target's logit of each position of this device (in a `shard_map`).

    Args:
      h: [n, D] hidden states.
      table: This device's part of the embedding.
      blocks: The blocks that `table.blocks` returns.
      targets: [n].

    Returns:
      Two arrays [n] in at least float32, which cover the vocabulary rows of all devices.
    """
    wide_dtype = jnp.promote_types(h.dtype, jnp.float32)
    mesh = table.structure.mesh
    Partition = tuple[jax.Array, jax.Array, jax.Array]

    def logits_of(block: tuple[list[jax.Array], jax.Array]) -> Logits:
        return Logits.of(h, table.rows(block[0], h.dtype), block[1], table.vocab_size)

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
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def attempt(state: State) -> State:
        _, shift, *_ = state
        largest, summed, of_targets = partition(shift)
        overflows = lax.pmax(jnp.max(largest - shift), mesh.axis_names) > LARGEST_EXPONENT
        return overflows, jnp.where(overflows, largest, shift), shift + jnp.log(summed), of_targets

    some = logits_of(([block[0, :SHIFT_ROWS] for block in blocks[0]], blocks[1][0])).logits
    shift = lax.pmax(jnp.max(some, axis=-1), "tensor") + SHIFT
    start = (jnp.asarray(True), shift, shift, shift)
    _, _, log_partition, of_targets = lax.while_loop(lambda state: state[0], attempt, start)
    return log_partition, of_targets


def log_partition_and_targets(
    hidden: jax.Array, embedding: Weight, targets: IntArray, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-partition of each position, and the logit of its target.

    Args:
      hidden: [B, L, D] after the final norm. B is 1 or divisible by the number of parts that a batch is split
        into.
      embedding: The tied embedding table.
      targets: [B, L] integers below vocab_size.
      vocab_size: The number of tokens, without the rows that pad the table.

    Returns:
      Two arrays [B, L], in at least float32.
    """
    structure, arrays = embedding.parts()
    mesh, specs = structure.mesh, structure.specs(arrays)

    def of_device(h: jax.Array, parts: list[jax.Array], t: jax.Array) -> tuple[jax.Array, jax.Array]:
        table = Table(structure, specs, parts, vocab_size)
        flat, targets = h.reshape(-1, h.shape[-1]), t.reshape(-1)
        blocks = table.blocks(max(SHIFT_ROWS, BLOCK_LOGITS // len(flat)))
        log_partition, of_targets = partition_and_targets(flat, table, blocks, targets)
        return log_partition.reshape(t.shape), of_targets.reshape(t.shape)

    spec = partition_spec(("batch", "length", "residual"), hidden.shape, mesh, "hidden states")
    spec_rows = partition_spec(("batch", "length"), targets.shape, mesh, "targets")
    mapped: Callable[..., tuple[jax.Array, jax.Array]] = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(spec, specs, spec_rows),
        out_specs=(P(*spec_rows), P(*spec_rows)),
        check_vma=False,  # otherwise sums over mesh axes of size 1 need annotations
    )
    return mapped(hidden, arrays, jnp.asarray(targets))


def token_log_probs(model: Transformer, hidden: jax.Array, targets: IntArray) -> jax.Array:
    """Returns the log-probability of each target, in nats.

    Args:
      model: The model; its embedding computes the logits.
      hidden: [B, L, D] after the final norm. B is 1 or divisible by the number of parts that a batch is split
        into.
      targets: [B, L] integers below vocab_size.

    Returns:
      [B, L] in at least float32.
    """
    log_partition, of_targets = log_partition_and_targets(
        hidden, model.embedding, targets, model.config.vocab_size
    )
    return of_targets - log_partition
