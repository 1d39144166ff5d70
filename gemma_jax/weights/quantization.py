"""The kind of a quantised model, by the name that users give it."""

import dataclasses
import re

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.errors import UserError
from gemma_jax.weights.nf4 import NF4, NF4_BLOCK
from gemma_jax.weights.quantized import Integer
from gemma_jax.weights.table import Parameter
from gemma_jax.weights.weight import Dense, Kind, Weight

WHOLE = "channel"  # one block for each output channel
# Elements with one scale; 0 is a whole output channel. int4 has that of llama.cpp's q4_0: with 64 its error
# is 10% larger.
DEFAULT_BLOCKS = {"int8": 0, "int4": 32, "nf4": NF4_BLOCK}


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
        if parameter.inputs and self.linear == "nf4":
            return NF4(parameter, mesh, rngs, dtype, NF4_BLOCK)
        if parameter.inputs:
            return Integer(parameter, mesh, rngs, dtype, self.block, 4 if self.linear == "int4" else 8)
        if self.embedding == "dense":
            return Dense(parameter, mesh, rngs, dtype)
        return Integer(parameter, mesh, rngs, dtype, 0, 8)
