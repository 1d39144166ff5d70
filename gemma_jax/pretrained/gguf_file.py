"""The GGUF file format of llama.cpp: metadata, descriptions of tensors, and their data, often quantised.

The header is parsed here and not by the gguf package, which trusts what it reads: a hostile file could make
it allocate any amount of memory. The package supplies the arithmetic of the block formats.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.pretrained.published_config import shown
from gemma_jax.pretrained.tensor_file import FLOATS, Stored, TensorFile

MAGIC = b"GGUF"
# In bytes: Gemma's header has 6 million, nearly all of it the tokenizer. It limits the cost of a hostile one.
LONGEST_HEADER = 2**25
MOST_KEYS, MOST_TENSORS, MOST_AXES, MOST_ALIGNMENT = 4096, 2**16, 4, 2**16
# The code in `struct` of each type of value with a fixed size, by its number in the format.
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
ROWS = 2048  # rows of a matrix that are converted at once: intermediate results have several times their size


class GGUFFile(TensorFile):
    """The metadata and tensors of one file, mapped into memory.

    An array in the metadata is a list of bytes for strings, else a memoryview whose `format` is the type.
    """

    form = "GGUF"

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; the tensors are not read.

        Raises:
          UserError: The file does not exist, is truncated, or is not what its header describes.
        """
        super().__init__(path, 24)
        if self.bytes[:4] != MAGIC:
            raise self.broken(f"it begins with {self.bytes[:4]!r} instead of {MAGIC!r}")
        self._at, self._end = 4, min(self.size, LONGEST_HEADER)
        version = self._number("I")
        if version not in (2, 3):
            raise UserError(
                f"{path} is GGUF of version {version} (over 65,535: of a big-endian machine), but versions 2 "
                "and 3 of little-endian machines are read; convert the model again with a new llama.cpp."
            )
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise self.broken(f"its header claims {tensors:,} tensors and {keys:,} keys")
        self.metadata = self._table(keys, "key", lambda key: self._value(key, self._number("I")))
        described = self._table(tensors, "tensor", self._stored)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self.broken(f"its general.alignment is {shown(alignment)}, which is no small power of two")
        begin = -(-self._at // alignment) * alignment
        self.tensors = {
            name: dataclasses.replace(stored, start=begin + stored.start)
            for name, stored in described.items()
        }
        self.check_layout(begin, alignment)

    def _table(self, count: int, what: str, read: Callable[[str], Any]) -> dict[str, Any]:
        """Reads names, each followed by what `read` reads of it."""
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self._text()
            if name in found:
                raise self.broken(f"it has the {what} {shown(name)} twice")
            found[name] = read(name)
        return found

    def _take(self, count: int) -> int:
        """Moves past `count` bytes of the header and returns where they begin."""
        start = self._at
        if count > self._end - start:
            raise self.broken(f"its header does not end within {self._end:,} bytes")
        self._at += count
        return start

    def _number(self, code: str) -> Any:
        start = self._take(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self.bytes, start)[0]

    def _text(self) -> str:
        start = self._take(self._number("Q"))
        return self.bytes[start : self._at].decode(errors="replace")

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _CODES:
            return self._number(_CODES[kind])
        if kind != _ARRAY:
            raise self.broken(f"the value of {shown(key)} has the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _CODES:
            raise self.broken(f"{shown(key)} is an array of the type {kind}, which Gemma does not have")
        code: Any = _CODES[kind]
        start = self._take(count * struct.calcsize(f"<{code}"))
        return memoryview(self.bytes)[start : self._at].cast(code)

    def _strings(self, count: int) -> list[bytes]:
        """Reads strings without the methods for one, which would take ten times as long for a vocabulary."""
        found, at, length_at = [], self._at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at = at + 8
            if start <= self._end:
                at += length_at(self.bytes, start - 8)[0]
            if at > self._end:
                raise self.broken("an array of its header is longer than the header")
            found.append(self.bytes[start:at])
        self._at = at
        return found

    def _stored(self, name: str) -> Stored:
        """Reads the description of a tensor, whose `start` is the offset in the data until all are read."""
        # Imported here, because the import takes 0.1 seconds.
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        axes = self._number("I")
        if axes > MOST_AXES:
            raise self.broken(f"the tensor {shown(name)} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]  # the outermost axis is last in the file
        number, start = self._number("I"), self._number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self.broken(f"the tensor {shown(name)} has the unknown type {number}") from None
        block, size = GGML_QUANT_SIZES[kind]
        if (shape[-1] if shape else 1) % block:
            raise self.broken(
                f"the rows of {shown(name)} have {shape[-1:]} numbers, no multiple of {block}, "
                f"which {kind.name} needs"
            )
        return Stored(shape, kind.name, start, math.prod(shape) // block * size)

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor: a read-only view of floating-point numbers, or float32 from a quantised type."""
        from gguf.quants import dequantize

        stored = self.tensors[name]
        if stored.type in FLOATS:
            return super().__getitem__(name)
        rows = self.raw(name).reshape(math.prod(stored.shape[:-1]), -1)
        out = np.empty((len(rows), stored.shape[-1]), np.float32)
        for start in range(0, len(rows), ROWS):
            out[start : start + ROWS] = dequantize(rows[start : start + ROWS], ggml_type(stored.type))
        return out.reshape(stored.shape)


def ggml_type(name: str) -> Any:
    """Returns the gguf package's constant for a type."""
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType[name]


def can_dequantize(kind: str) -> bool:
    """Whether the package dequantises a type. It raises NotImplementedError for those that it cannot."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type(kind)][1]), np.uint8), ggml_type(kind))
    except NotImplementedError:
        return False
    return True
