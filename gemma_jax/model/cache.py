"""The key/value cache: the attention keys and values of earlier tokens.

Shape legend: B rows, S slots, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_jax.config import TransformerConfig
from gemma_jax.model.ops import IntArray
from gemma_jax.sharding import partition_spec

KEYS_AXES = ("kv_heads", "layers", "batch", "length", "head_dim")


class Vectors(NamedTuple):
    """The keys or the values of all layers, as numbers or as int8 with one scale for each vector.

    One int16 holds the int8 of the first and of the second half of a vector: to write a row of int8, the TPU
    compiler would copy the whole cache into another layout and back.
    """

    numbers: jax.Array  # [K, layers, B, S, H], or [K, layers, B, S, H / 2] int16
    scales: jax.Array | None = None  # [K, layers, B, S] float32: a vector is its int8 times its scale

    def written(self, place: tuple[Any, ...], new: jax.Array) -> "Vectors":
        """Returns the vectors with `new` at `place`, an index of the first four axes, if in range."""
        if self.scales is None:
            return Vectors(self.numbers.at[place].set(new, mode="drop"))
        scales = jnp.max(jnp.abs(new.astype(jnp.float32)), axis=-1) / 127
        codes = jnp.round(new / jnp.where(scales > 0, scales, 1)[..., None]).astype(jnp.int16)
        low, high = jnp.split(codes, 2, axis=-1)
        codes = (low & 255) | (high << 8)
        return Vectors(
            self.numbers.at[place].set(codes, mode="drop"), self.scales.at[place].set(scales, mode="drop")
        )

    def of_layer(self, layer: jax.Array | int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns [B, S, K, H], those of one layer."""
        numbers = self.numbers[:, layer].transpose(1, 2, 0, 3)
        if self.scales is None:
            return numbers
        low, high = (numbers << 8) >> 8, numbers >> 8
        numbers = jnp.concatenate([low, high], axis=-1).astype(dtype)
        return (numbers * self.scales[:, layer].transpose(1, 2, 0)[..., None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, with the position and segment of every slot.

    Each row has its own length, so rows can start, end and be replaced independently. Slots at or beyond a
    row's length hold segment 0, to which no token attends. The heads come first for the kernel of `paged.py`.
    """

    keys: Vectors
    values: Vectors
    positions: jax.Array  # [B, S] int32
    segments: jax.Array  # [B, S] int32
    lengths: jax.Array  # [B] int32: slots in use

    @classmethod
    def abstract(
        cls, config: TransformerConfig, rows: int, slots: int, dtype: jax.typing.DTypeLike, mesh: Mesh
    ) -> list[Vectors]:
        """Returns the shapes and shardings of the keys and values; a dtype of int8 has scales."""
        shape = (config.num_kv_heads, config.num_layers, rows, slots, config.head_dim)
        spec = partition_spec(KEYS_AXES, shape, mesh, "cache")

        def array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *axes: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        if dtype == jnp.int8:
            codes = array((*shape[:-1], shape[-1] // 2), jnp.int16, *spec)
            return [Vectors(codes, array(shape[:-1], jnp.float32, *spec[:-1]))] * 2
        return [Vectors(array(shape, dtype, *spec))] * 2

    @classmethod
    def empty(
        cls, config: TransformerConfig, rows: int, slots: int, dtype: jax.typing.DTypeLike, mesh: Mesh
    ) -> "KVCache":
        """Returns an empty cache, split over the mesh by rows and key/value heads."""
        zeros = jnp.zeros((rows, slots), jnp.int32)
        abstract = cls.abstract(config, rows, slots, dtype, mesh)
        keys, values = jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(jnp.zeros(x.shape, x.dtype), x.sharding), abstract
        )
        return cls(keys, values, zeros, zeros, jnp.zeros(rows, jnp.int32))

    def slots(self, new: int) -> jax.Array:
        """Returns the slots [B, new] of each row's next `new` tokens. Out-of-range writes are dropped."""
        return self.lengths[:, None] + jnp.arange(new, dtype=jnp.int32)

    def extended(self, positions: IntArray, segments: IntArray) -> "KVCache":
        """Returns the cache with the positions and segments of new tokens; the caller adds keys and values.

        Args:
          positions: [B, L], those of the new tokens.
          segments: [B, L]; 0 marks padding at the end of a row, and its slots are reused.
        """
        rows = jnp.arange(positions.shape[0])[:, None]
        slots = self.slots(positions.shape[1])
        return dataclasses.replace(
            self,
            positions=self.positions.at[rows, slots].set(positions.astype(jnp.int32), mode="drop"),
            segments=self.segments.at[rows, slots].set(segments.astype(jnp.int32), mode="drop"),
            lengths=self.lengths + jnp.sum(jnp.asarray(segments) != 0, axis=1, dtype=jnp.int32),
        )

    def with_rows(self, new: "KVCache", rows: jax.Array) -> "KVCache":
        """Returns the cache with the rows `rows` [R] replaced by those of `new`, which may have fewer slots.

        If a row index is out of range, its new row is dropped.
        """
        free = self.positions.shape[1] - new.positions.shape[1]
        used = slice(0, new.positions.shape[1])
        positions, segments = (jnp.pad(x, ((0, 0), (0, free))) for x in (new.positions, new.segments))
        keys, values = jax.tree.map(
            lambda old, new: old.at[:, :, rows, used].set(new, mode="drop"),
            (self.keys, self.values),
            (new.keys, new.values),
        )
        return KVCache(
            keys,
            values,
            positions=self.positions.at[rows].set(positions, mode="drop"),
            segments=self.segments.at[rows].set(segments, mode="drop"),
            lengths=self.lengths.at[rows].set(new.lengths, mode="drop"),
        )

    def grown(self, slots: int) -> "KVCache":
        """Returns the cache with `slots` slots for each row, at least as many as now."""
        more = slots - self.positions.shape[1]
        keys, values = jax.tree.map(
            lambda x: jnp.pad(x, [(0, more if axis == 3 else 0) for axis in range(x.ndim)]),
            (self.keys, self.values),
        )
        positions, segments = (jnp.pad(x, [(0, 0), (0, more)]) for x in (self.positions, self.segments))
        return KVCache(keys, values, positions, segments, self.lengths)

    def shortened(self, lengths: jax.Array) -> "KVCache":
        """Returns the cache with only the first `lengths` [B] slots of each row in use."""
        used = jnp.arange(self.positions.shape[1]) < lengths[:, None]
        return dataclasses.replace(self, segments=jnp.where(used, self.segments, 0), lengths=lengths)

    def beginnings(self, rows: jax.Array, lengths: jax.Array) -> "KVCache":
        """Returns copies of the rows `rows` [R] that have only their first `lengths` [R] slots in use."""
        keys, values = jax.tree.map(lambda x: x[:, :, rows], (self.keys, self.values))
        whole = KVCache(
            keys,
            values,
            positions=self.positions[rows],
            segments=self.segments[rows],
            lengths=self.lengths[rows],
        )
        return whole.shortened(lengths)
