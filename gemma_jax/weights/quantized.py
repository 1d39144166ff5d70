"""Quantised kinds of weight: integers with scales, and NF4 with double quantisation.

The arrays are stored as integers of 8 or 4 bits (two to a byte), and devices exchange them as such. A matrix
is stored with its contracted axes as one and its output axes as one, because the TPU compiler fuses the
conversion of blocks into the matmul only in this form (benchmarks/LOG.md). Layers are quantised separately. A
quantised weight is frozen.

Shape legend: C contracted axes, O output axes, G blocks of an output channel, K elements of a block, V stored
vocabulary rows, D embed.
"""

import abc
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from gemma_jax.errors import UserError
from gemma_jax.sharding import RULES, Axes, partition_spec
from gemma_jax.weights.matmul import precision
from gemma_jax.weights.table import Parameter
from gemma_jax.weights.weight import Context, Dense, Kind, Weight, initial_values, row_block

NF4_BLOCK = 64
# Elements with one scale; 0 is a whole output channel. int4 has that of llama.cpp's q4_0: with 64 its error
# is 10% larger.
DEFAULT_BLOCKS = {"int8": 0, "int4": 32, "nf4": NF4_BLOCK}
NESTED_BLOCK = 256
WHOLE = "channel"  # one block for each output channel

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


class Quantized(Weight):
    """The base of the quantised kinds. A kind defines `unscaled`, `scales`, `pack` and `array_axes`."""

    def _create(self, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        def pack(array: jax.Array) -> dict[str, jax.Array]:
            return {name: to_bytes(x) for name, x in self.pack(array).items()}

        packed = initial_values(self.parameter, rngs.params(), dtype, pack)
        if packed["codes"].dtype == jnp.uint8:
            packed["codes"] = from_bytes(packed["codes"])
        layers = ("layers",) if self.parameter.layers else ()
        for name, axes in self.array_axes().items():
            setattr(self, name, nnx.Param(packed[name], axes=(*layers, *axes)))

    @abc.abstractmethod
    def array_axes(self) -> dict[str, Axes]:
        """Returns the logical axes of each array of one layer."""

    @abc.abstractmethod
    def unscaled(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns what the codes stand for before they are scaled: [K, G, O], or [..., D] of an embedding.

        With one block for each output channel it is [1, C, O], so that no dimension of a TPU's tile is 1.
        """

    @abc.abstractmethod
    def scales(self) -> jax.Array:
        """Returns the scale of each block: [G, O], or [..., 1] of an embedding."""

    def _split(self, array: jax.Array, block: int) -> jax.Array:
        """Returns a dense matrix as [G, K, O] in float32, the order in which blocks are counted."""
        outputs = math.prod(array.shape[self.parameter.inputs :])
        return array.reshape(-1, block, outputs).astype(jnp.float32)

    def _axes(self, blocks: int, size: int) -> tuple[Any, Any, Any]:
        """Returns the logical axes of G, K and O; None for a dimension that the mesh does not split.

        The mesh splits C between the blocks, or within each where it does not divide their number.
        """
        about = self.parameter
        spec = partition_spec(about.axes, about.shape, self.mesh, about.name)
        inward, outward = (about.axes[axis] if spec[axis] else None for axis in (0, about.inputs))
        if inward is None:
            return None, None, outward
        parts = math.prod(self.mesh.shape[axis] for axis in RULES[inward])
        if blocks % parts == 0:
            return inward, None, outward
        return None, inward if size % parts == 0 else None, outward

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """See `Weight.dense`; float32 if no dtype is given."""
        dtype = dtype or jnp.float32
        codes, scales, shape = self.unscaled(jnp.float32), self.scales(), self.parameter.shape
        if not self.parameter.inputs:
            return (codes * scales).astype(dtype)
        size, blocks, outputs = codes.shape
        inner, outer = shape[1 : self.parameter.inputs], shape[self.parameter.inputs + 1 :]
        first = (blocks * size // math.prod(inner), *inner)
        return (
            (codes * scales).astype(dtype).swapaxes(0, 1).reshape(*first, outputs // math.prod(outer), *outer)
        )

    def multiply(self, x: jax.Array) -> jax.Array:
        """See `Weight.multiply`. With one scale for each channel the result is scaled, not the weight."""
        codes, scales = self.unscaled(x.dtype), self.scales()
        size, blocks, _ = codes.shape
        in_blocks = len(scales) == blocks
        if in_blocks:
            codes = codes * scales.astype(x.dtype)
        leading = x.shape[: x.ndim - self.parameter.inputs]
        rows = x.reshape(math.prod(leading), blocks, size)
        out = lax.dot_general(
            rows,
            codes,
            (((2, 1), (0, 1)), ((), ())),
            precision=precision(x.dtype),
            preferred_element_type=x.dtype if in_blocks else jnp.promote_types(x.dtype, jnp.float32),
        )
        if not in_blocks:
            out = (out * scales).astype(x.dtype)
        elif self.parameter.inputs + 1 < len(self.parameter.shape):
            # Otherwise the TPU compiler would split O of the weight too, and so dequantise it separately.
            out = lax.optimization_barrier(out)
        return out.reshape(*leading, -1, *self.parameter.shape[self.parameter.inputs + 1 :])

    def unembed(self, x: jax.Array, dtype: jax.typing.DTypeLike, context: Context) -> jax.Array:
        """See `Weight.unembed`. The logits are scaled rather than the table."""
        with jax.named_scope(self.parameter.name):
            codes = self.unscaled(x.dtype)
            out = lax.dot_general(
                x,
                codes,
                (((x.ndim - 1,), (1,)), ((), ())),
                precision=precision(x.dtype),
                preferred_element_type=dtype,
            )
            return out * self.scales()[:, 0].astype(dtype)


class Integer(Quantized):
    """Symmetric integers of 8 or 4 bits, scaled per output channel, per block of it, or per row of a table.

    With 8 bits the scale is absmax / 127, as in bitsandbytes' row-wise form without outliers. With 4 bits the
    number of the largest magnitude becomes -8, as in llama.cpp's q4_0; the scale is then fitted by least
    squares.
    """

    codes: nnx.Param[jax.Array]
    scale: nnx.Param[jax.Array]

    def __init__(
        self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype, *, bits: int, block: int
    ) -> None:
        """Args:
        parameter, mesh, rngs, dtype: As `Kind`.
        bits: 8 or 4.
        block: Elements of a block; 0 is all that one output channel contracts, or a row of a table.

        Raises:
          UserError: The contracted elements are not a multiple of the block.
        """
        super().__init__(parameter, mesh)
        self.bits = bits
        contracted = math.prod(parameter.shape[: parameter.inputs])
        if parameter.inputs and block and contracted % block:
            raise UserError(
                f"{parameter.name} contracts {contracted} elements, which are not a multiple of the block of "
                f"{block}; choose another block, such as int{bits}:{math.gcd(contracted, block)}, or int8."
            )
        self.block = block or contracted
        self.blocks = contracted // self.block if parameter.inputs else 1
        self._create(rngs, dtype)

    def array_axes(self) -> dict[str, Axes]:
        """See `Quantized.array_axes`."""
        if not self.parameter.inputs:
            return {"codes": self.parameter.axes, "scale": (self.parameter.axes[0], None)}
        blocks, size, outputs = self._axes(self.blocks, self.block)
        stored = (None, size) if self.blocks == 1 else (size, blocks)
        return {"codes": (*stored, outputs), "scale": (blocks, outputs)}

    def unscaled(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """See `Quantized.unscaled`."""
        return self.codes[...].astype(dtype)

    def scales(self) -> jax.Array:
        """See `Quantized.scales`."""
        return self.scale[...]

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        """See `Weight.pack`."""
        if self.parameter.inputs:
            packed = self._quantised(self._split(array, self.block), 1)
            # One scale for so few numbers costs memory; its rounding is small beside that of 4 bits.
            small = self.bits == 4 and self.blocks > 1
            scale = packed["scale"][:, 0].astype(jnp.bfloat16 if small else jnp.float32)
            codes = packed["codes"]
            return {"codes": codes if self.blocks == 1 else codes.swapaxes(0, 1), "scale": scale}
        if self.mesh.size > 1:  # each device has a part of the table
            return self._quantised(array.astype(jnp.float32), -1)
        rows = array.reshape(-1, row_block(len(array)), array.shape[1])
        packed = lax.map(lambda x: self._quantised(x.astype(jnp.float32), -1), rows)
        return jax.tree.map(lambda x: x.reshape(len(array), -1), packed)

    def _quantised(self, x: jax.Array, axis: int) -> dict[str, jax.Array]:
        """Returns codes of the shape of x, and scales with one element along the axis that a scale is for."""
        absmax = jnp.max(jnp.abs(x), axis, keepdims=True)
        if self.bits == 8:
            scale = absmax / 127
            # torch multiplies by the reciprocal, which decides ties; without the barrier XLA would divide.
            codes = jnp.round(x * (lax.optimization_barrier(_over(1.0, absmax)) * 127))
        else:
            # The number itself, with its sign: the larger of the two extremes.
            peak = jnp.where(jnp.max(x, axis, keepdims=True) == absmax, absmax, -absmax)
            codes = jnp.clip(jnp.round(x * _over(-8.0, peak)), -8, 7)
            scale = jnp.sum(x * codes, axis, keepdims=True) * _over(
                1.0, jnp.sum(codes**2, axis, keepdims=True)
            )
        scale = jnp.where(absmax == 0, 1, scale)
        return {"codes": codes.astype(jnp.int8 if self.bits == 8 else jnp.int4), "scale": scale}


def _over(number: float, x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 0, number / jnp.where(x == 0, 1, x))


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

    def __init__(self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        """Args:
        parameter, mesh, rngs, dtype: As `Kind`.

        Raises:
          UserError: The contracted elements are not a multiple of 64.
        """
        super().__init__(parameter, mesh)
        contracted = math.prod(parameter.shape[: parameter.inputs])
        if contracted % NF4_BLOCK:
            raise UserError(
                f"{parameter.name} contracts {contracted} elements, which are not a multiple of the block of "
                f"{NF4_BLOCK} of nf4; choose int8."
            )
        self.blocks = contracted // NF4_BLOCK
        self._create(rngs, dtype)

    def array_axes(self) -> dict[str, Axes]:
        """See `Quantized.array_axes`."""
        blocks, size, outputs = self._axes(self.blocks, NF4_BLOCK)
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
        return nf4_arrays(self._split(array, NF4_BLOCK))


def nf4_arrays(x: jax.Array) -> dict[str, jax.Array]:
    """Quantises a matrix [G, 64, O] of float32; returns the arrays of `NF4`, the codes as [64, G, O]."""
    absmax = jnp.max(jnp.abs(x), 1)
    codes = _nearest(x * _over(1.0, absmax)[:, None], np.asarray(NF4_VALUES, np.float32))
    return {"codes": (codes - 8).astype(jnp.int4).swapaxes(0, 1), **nested_scales(absmax)}


def nested_scales(absmax: jax.Array) -> dict[str, jax.Array]:
    """Quantises the scales [G, O] of blocks; returns the arrays of `NF4` except the codes."""
    offset = jnp.mean(absmax)
    order = (absmax - offset).T.reshape(-1)
    groups = jnp.pad(order, (0, -len(order) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = jnp.max(jnp.abs(groups), 1)
    # bitsandbytes' CPU backend rounds to a grid of 65,536 values first. The barrier prevents a fused
    # multiply and add, which would round once rather than twice.
    grid = lax.optimization_barrier((groups * _over(1.0, nested)[:, None] + 1) * 32767.5)
    rounded = jnp.floor(grid + 0.5) / 32767.5 - 1
    scales = _nearest(rounded, dynamic_map()).reshape(-1)[: len(order)]
    return {
        "absmax": scales.reshape(absmax.shape[::-1]).T.astype(jnp.uint8),
        "nested": nested,
        "offset": offset,
        "rows": jnp.arange(absmax.shape[1], dtype=jnp.int32),
        "columns": jnp.arange(absmax.shape[0], dtype=jnp.int32),
    }


def to_bytes(x: jax.Array) -> jax.Array:
    """Returns int4 [..., n] as uint8 [..., n / 2], in the order of `from_bytes`; all else as it is.

    XLA writes int4 slowly on CPU, one number after the other, and rewrites a whole stack for each layer. So
    stacks are filled as bytes.
    """
    if x.dtype != jnp.int4 or x.shape[-1] % 2:
        return x
    pairs = lax.bitcast_convert_type(x.astype(jnp.int8), jnp.uint8).reshape(*x.shape[:-1], -1, 2) & 15
    return pairs[..., 0] | (pairs[..., 1] << 4)


def from_bytes(x: jax.Array) -> jax.Array:
    """Returns uint8 [..., n / 2] as int4 [..., n]."""
    return lax.bitcast_convert_type(x, jnp.int4).reshape(*x.shape[:-1], -1)


def kind_of(quantization: str) -> Kind:
    """Returns the kind that `Quantization.parse` reads; the dense one for an empty text."""
    return Quantization.parse(quantization) if quantization else Dense


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The kind of a quantised model: a `Kind` for its linear weights and its embedding."""

    linear: str  # int8, int4 or nf4
    block: int = 0  # elements with one scale; 0: all of an output channel
    embedding: str = "int8"  # or dense

    @classmethod
    def parse(cls, text: str) -> "Quantization":
        """Reads `int8` (per channel), `int4` (blocks of 32), `nf4`, `int8:32`, `int4:64` or `int4:channel`.

        `,embedding=dense` may follow, which leaves the embedding as it is; otherwise it becomes int8.

        Raises:
          UserError: It is none of these.
        """
        match = re.fullmatch(r"(nf4|(?:int8|int4)(?::([1-9]\d{0,5}|channel))?)(,embedding=dense)?", text)
        if match is None:
            raise UserError(
                f"quantization is {text!r}, but must be int8, int4, nf4, int8:BLOCK, int4:BLOCK or "
                "int4:channel, with ',embedding=dense' after it if the embedding is not to become int8."
            )
        linear, _, block = match[1].partition(":")
        size = 0 if block == WHOLE else int(block or DEFAULT_BLOCKS[linear])
        return cls(linear, size, "dense" if match[3] else "int8")

    def __str__(self) -> str:
        """Returns the text that `parse` reads."""
        block = ""
        if self.linear != "nf4" and self.block != DEFAULT_BLOCKS[self.linear]:
            block = f":{self.block or WHOLE}"
        return f"{self.linear}{block}" + ("" if self.embedding == "int8" else ",embedding=dense")

    def __call__(self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype) -> Weight:
        """Makes a weight; see `Kind`."""
        if not parameter.inputs and self.embedding == "dense":
            return Dense(parameter, mesh, rngs, dtype)
        if parameter.inputs and self.linear == "nf4":
            return NF4(parameter, mesh, rngs, dtype)
        bits = 4 if parameter.inputs and self.linear == "int4" else 8
        return Integer(parameter, mesh, rngs, dtype, bits=bits, block=self.block if parameter.inputs else 0)
