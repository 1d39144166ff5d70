"""NF4: 4-bit codes of normal quantiles with double quantisation, as bitsandbytes has them.

Shape legend: O output axes, G blocks of an output channel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from gemma_jax.sharding import Axes, platform
from gemma_jax.weights.quantized import Quantized, over

NF4_BLOCK = 64
NESTED_BLOCK = 256

# The quantiles of a normal distribution that bitsandbytes uses (Dettmers et al., 2023, appendix E).
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def dynamic_map() -> np.ndarray:
    """Returns the 256 float32 values, ascending, that bitsandbytes' 8-bit codes of scales stand for.

    They have a sign, an exponent of ten and a linear fraction (Dettmers et al., 2022, section 2.2). The last
    bits follow torch.linspace, which steps from both ends and rounds once.
    """
    values = [0.0, 1.0]
    low = np.float32(0.1)
    for exponent in range(7):
        count = 2**exponent
        step, index = np.float64((np.float32(1) - low) / np.float32(count)), np.arange(count + 1)
        upward, downward = np.float64(low) + step * index, 1 - step * (count - index)
        boundaries = np.where(index < (count + 1) // 2, upward, downward).astype(np.float32)
        means = (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.asarray(values, np.float32))


def _nearest(x: jax.Array, values: np.ndarray) -> jax.Array:
    """Returns the index of the nearest of the ascending values, the lower one in a tie."""
    bounds = (values[:-1] + values[1:]) / np.float32(2)
    return jnp.searchsorted(bounds, x, side="left", method="compare_all" if len(bounds) < 16 else "scan")


class NF4(Quantized):
    """4-bit codes of normal quantiles in blocks of 64, whose scales are 8-bit codes in groups of 256.

    It equals bitsandbytes' NF4 with nested (double) quantisation, which counts the blocks along the rows of
    torch's [outputs, inputs] matrix, so that a group of scales may cross rows. `rows` and `columns` are the
    indices of each block, so that any shard of the weight finds its groups. Source: bitsandbytes 0.50,
    functional.quantize_4bit; Dettmers et al., 2023 (QLoRA).
    """

    codes: nnx.Param[jax.Array]  # int4: the index of the quantile, minus 8
    absmax: nnx.Param[jax.Array]  # uint8: the index in `dynamic_map`
    nested: nnx.Param[jax.Array]  # float32: the scale of each group
    offset: nnx.Param[jax.Array]  # float32: the mean of the blocks' scales
    rows: nnx.Param[jax.Array]  # int32: of each output channel
    columns: nnx.Param[jax.Array]  # int32: of each block of a channel

    def array_axes(self) -> dict[str, Axes]:
        """See `Quantized.array_axes`."""
        blocks, size, outputs = self._axes()
        return {
            "codes": (size, blocks, outputs),
            "absmax": (blocks, outputs),
            "nested": (None,),
            "offset": (),
            "rows": (outputs,),
            "columns": (blocks,),
        }

    def unscaled(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """See `Quantized.unscaled`."""
        index = self.codes[...].astype(jnp.int32) + 8
        if platform(self.mesh) == "gpu":
            # XLA would make an array of each of the values below, and keep all of them.
            return jnp.asarray(NF4_VALUES, dtype)[index]
        # A tree of selects: a TPU has no fast lookup in a table.
        found: list[Any] = [jnp.asarray(value, dtype) for value in NF4_VALUES]
        for bit in range(4):
            is_set = (index >> bit) & 1 == 1
            found = [jnp.where(is_set, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    def scales(self) -> jax.Array:
        """See `Quantized.scales`."""
        block = self.rows[...] * self.blocks + self.columns[...][:, None]
        codes = jnp.asarray(dynamic_map())[self.absmax[...].astype(jnp.int32)]
        return codes * self.nested[...][block // NESTED_BLOCK] + self.offset[...]

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        """See `Weight.pack`."""
        return nf4_arrays(self._split(array))


def nf4_arrays(x: jax.Array) -> dict[str, jax.Array]:
    """Quantises a matrix [G, 64, O] of float32; returns the arrays of `NF4`, the codes as [64, G, O]."""
    absmax = jnp.max(jnp.abs(x), 1)
    codes = _nearest(x * over(1.0, absmax)[:, None], np.asarray(NF4_VALUES, np.float32))
    return {"codes": (codes - 8).astype(jnp.int4).swapaxes(0, 1), **nested_scales(absmax)}


def nested_scales(absmax: jax.Array) -> dict[str, jax.Array]:
    """Quantises the scales [G, O] of blocks; returns the arrays of `NF4` except the codes."""
    offset = jnp.mean(absmax)
    order = (absmax - offset).T.reshape(-1)
    groups = jnp.pad(order, (0, -len(order) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(groups), 1)
    # bitsandbytes' CPU backend rounds to a grid of 65,536 values first. The barrier prevents a fused
    # multiply and add, which would round once rather than twice.
    grid = lax.optimization_barrier((groups * over(1.0, nested)[:, None] + 1) * 32767.5)
    rounded = jnp.floor(grid + 0.5) / 32767.5 - 1
    scales = _nearest(rounded, dynamic_map()).reshape(-1)[: len(order)]
    return {
        "absmax": scales.reshape(absmax.shape[::-1]).T.astype(jnp.uint8),
        "nested": nested,
        "offset": offset,
        "rows": jnp.arange(absmax.shape[1], dtype=jnp.int32),
        "columns": jnp.arange(absmax.shape[0], dtype=jnp.int32),
    }
