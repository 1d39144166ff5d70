"""The base of the quantised kinds of weight, and integers with scales.

The arrays are stored as integers of 8 or 4 bits (two to a byte), and devices exchange them as such. A matrix
is stored with its contracted axes as one and its output axes as one, because the TPU compiler fuses the
conversion of blocks into the matmul only in this form (benchmarks/LOG.md). Layers are quantised separately. A
quantised weight is frozen.

Shape legend: C contracted axes, O output axes, G blocks of an output channel, K elements of a block, V stored
vocabulary rows, D embed.
"""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from gemma_jax.errors import UserError
from gemma_jax.sharding import RULES, Axes, partition_spec
from gemma_jax.weights import native
from gemma_jax.weights.matmul import matmul, precision
from gemma_jax.weights.table import Parameter
from gemma_jax.weights.weight import Weight, initial_values, row_block

FEW_ROWS = 256  # of activations, up to which a weight in blocks is not made dense before the matmul


class Quantized(Weight):
    """The base of the quantised kinds. A kind defines `unscaled`, `scales`, `pack` and `array_axes`."""

    def __init__(
        self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype, block: int
    ) -> None:
        """Args:
        parameter, mesh, rngs, dtype: As `Kind`.
        block: Elements of a block; 0 is all that one output channel contracts, or a row of a table.

        Raises:
          UserError: The contracted elements are not a multiple of the block.
        """
        super().__init__(parameter, mesh)
        contracted = math.prod(parameter.shape[: parameter.inputs])
        self.block = block or contracted
        self.blocks, rest = divmod(contracted, self.block)
        if rest:
            raise UserError(
                f"{parameter.name} contracts {contracted} elements, which are not a multiple of the block of "
                f"{block}; choose int8, or another block, such as int4:{math.gcd(contracted, block)}."
            )

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

    def _split(self, array: jax.Array) -> jax.Array:
        """Returns a dense matrix as [G, K, O] in float32, the order in which blocks are counted."""
        outputs = math.prod(array.shape[self.parameter.inputs :])
        return array.reshape(-1, self.block, outputs).astype(jnp.float32)

    def _axes(self) -> tuple[Any, Any, Any]:
        """Returns the logical axes of G, K and O; None for a dimension that the mesh does not split.

        The mesh splits C between the blocks, or within each where it does not divide their number.
        """
        about = self.parameter
        spec = partition_spec(about.axes, about.shape, self.mesh, about.name)
        inward, outward = (about.axes[axis] if spec[axis] else None for axis in (0, about.inputs))
        if inward is None:
            return None, None, outward
        parts = math.prod(self.mesh.shape[axis] for axis in RULES[inward])
        if self.blocks % parts == 0:
            return inward, None, outward
        return None, inward if self.block % parts == 0 else None, outward

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
        leading = x.shape[: x.ndim - self.parameter.inputs]
        rows = x.reshape(math.prod(leading), blocks, size)
        dtype = x.dtype if in_blocks else jnp.promote_types(x.dtype, jnp.float32)
        contracted: Any = ((2, 1), (0, 1))
        if in_blocks and len(rows) > FEW_ROWS:
            # Many rows are brought into the order of the codes, and the weight of a layer is made dense. The
            # TPU compiler would otherwise keep the codes of all layers a second time, in the rows' order. It
            # may do so unless both are matrices, which they cannot be if the mesh splits the blocks. Without
            # the first barrier it would store the scale of each number.
            rows, codes = rows.swapaxes(1, 2), (self.unscaled(jnp.float32) * scales).astype(x.dtype)
            contracted = ((1, 2), (0, 1))
            if self.mesh.shape["tensor"] == 1:
                rows = rows.reshape(len(rows), -1)
                codes = lax.optimization_barrier(codes).reshape(blocks * size, -1)
                contracted = ((1,), (0,))
            rows, codes = lax.optimization_barrier((rows, codes))
        elif in_blocks:
            codes = codes * scales.astype(x.dtype)
        out = lax.dot_general(rows, codes, (contracted, ((), ())), precision(x.dtype), dtype)
        if not in_blocks:
            out = (out * scales).astype(x.dtype)
        elif self.parameter.inputs + 1 < len(self.parameter.shape):
            # Otherwise the TPU compiler would split O of the weight too, and so dequantise it separately.
            out = lax.optimization_barrier(out)
        return out.reshape(*leading, -1, *self.parameter.shape[self.parameter.inputs + 1 :])

    def _unembed(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """See `Weight._unembed`. The logits are scaled rather than the table."""
        out = matmul(x, self.unscaled(x.dtype).T, dtype=dtype)
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
        self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype, block: int, bits: int
    ) -> None:
        """See `Quantized`; `bits` is 8 or 4."""
        self.bits = bits
        super().__init__(parameter, mesh, rngs, dtype, block)

    def array_axes(self) -> dict[str, Axes]:
        """See `Quantized.array_axes`."""
        if not self.parameter.inputs:
            return {"codes": self.parameter.axes, "scale": (self.parameter.axes[0], None)}
        blocks, size, outputs = self._axes()
        stored = (None, size) if self.blocks == 1 else (size, blocks)
        return {"codes": (*stored, outputs), "scale": (blocks, outputs)}

    def unscaled(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """See `Quantized.unscaled`."""
        return self.codes[...].astype(dtype)

    def scales(self) -> jax.Array:
        """See `Quantized.scales`."""
        return self.scale[...]

    def native_matmul(self, x: jax.Array, layer: jax.Array) -> jax.Array | None:
        """See `Weight.native_matmul`. Activations are rounded, see `native.integer_matmul`."""
        return native.integer_matmul(x, self.codes[...], self.scale[...], layer)

    def native_unembed(self, x: jax.Array) -> jax.Array | None:
        """See `Weight.native_unembed`."""
        return native.integer_unembed(x, self.codes[...], self.scale[...])

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        """See `Weight.pack`."""
        if self.parameter.inputs:
            packed = self._quantised(self._split(array), 1)
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
            codes = jnp.round(x * (lax.optimization_barrier(over(1.0, absmax)) * 127))
        else:
            # The number itself, with its sign: the larger of the two extremes.
            peak = jnp.where(jnp.max(x, axis, keepdims=True) == absmax, absmax, -absmax)
            codes = jnp.clip(jnp.round(x * over(-8.0, peak)), -8, 7)
            scale = jnp.sum(x * codes, axis, keepdims=True) * over(
                1.0, jnp.sum(codes**2, axis, keepdims=True)
            )
        scale = jnp.where(absmax == 0, 1, scale)
        return {"codes": codes.astype(jnp.int8 if self.bits == 8 else jnp.int4), "scale": scale}


def over(number: float, x: jax.Array) -> jax.Array:
    """Returns number / x, and 0 where x is 0."""
    return jnp.where(x == 0, 0, number / jnp.where(x == 0, 1, x))


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
