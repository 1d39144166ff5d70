"""The GGUF file format of llama.cpp: metadata, descriptions of tensors, and their data, often quantised.

The header is parsed here and not by the gguf package, which trusts what it reads: a hostile file could make
it allocate any amount of memory. The package supplies the arithmetic of the block formats.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.paths import open_regular
from gemma_jax.pretrained.published_config import shown

MAGIC = b"GGUF"
# In bytes: Gemma's header has 6 million, nearly all of it the tokenizer. It limits the cost of a hostile one.
LONGEST_HEADER = 2**25
MOST_KEYS, MOST_TENSORS, MOST_AXES, MOST_ALIGNMENT = 4096, 2**16, 4, 2**16
# The code in `struct` of each type of value with a fixed size, by its number in the format.
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
INT32, FLOAT32, STRING, ARRAY = 5, 6, 8, 9
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
ROWS = 2048  # rows of a matrix that are converted at once: intermediate results have several times their size


@dataclasses.dataclass(frozen=True)
class Stored:
    """The shape, type and position of a tensor in a file."""

    shape: tuple[int, ...]  # outermost axis first, the reverse of the order in the file
    type: str  # as ggml names it: F32, Q4_0, Q6_K ...
    row: tuple[int, int]  # bytes, and the numbers that they hold, of a block of the type
    start: int  # offset in the file, in bytes

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) // self.row[1] * self.row[0]


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of the metadata that has been measured but not read yet."""

    kind: int  # the type of its elements
    count: int
    start: int  # offset in the file, in bytes


class GGUFFile:
    """The metadata and tensors of one file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; neither arrays of the metadata nor tensors are read.

        Raises:
          UserError: The file does not exist, is truncated, or is not what its header describes.
        """
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise self._broken(f"it has {size} bytes")
            self._bytes = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        if self._bytes[:4] != MAGIC:
            raise self._broken(f"it begins with {self._bytes[:4]!r} instead of {MAGIC!r}")
        self._at, self._end = 4, min(size, LONGEST_HEADER)
        version = self._number("I")
        if version not in (2, 3):
            raise UserError(
                f"{path} is GGUF of version {version} (over 65,535: of a big-endian machine), but versions 2 "
                "and 3 of little-endian machines are read; convert the model again with a new llama.cpp."
            )
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise self._broken(f"its header claims {tensors:,} tensors and {keys:,} keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in self.metadata:
                raise self._broken(f"it has the key {shown(key)} twice")
            self.metadata[key] = self._value(key, self._number("I"))
        self.tensors: dict[str, Stored] = {}
        for _ in range(tensors):
            name = self._text()
            if name in self.tensors:
                raise self._broken(f"it has the tensor {shown(name)} twice")
            self.tensors[name] = self._stored(name)
        self._place(size)

    def _broken(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not a whole GGUF file: {reason}; copy or download it again.")

    def _take(self, count: int) -> int:
        """Moves past `count` bytes of the header and returns where they begin."""
        start = self._at
        if count > self._end - start:
            raise self._broken(f"its header does not end within {self._end:,} bytes")
        self._at += count
        return start

    def _number(self, code: str) -> Any:
        start = self._take(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self._bytes, start)[0]

    def _text(self) -> str:
        start = self._take(self._number("Q"))
        return self._bytes[start : self._at].decode(errors="replace")

    def _value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind in _CODES:
            return self._number(_CODES[kind])
        if kind != ARRAY:
            raise self._broken(f"the value of {shown(key)} has the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        array = Array(kind, count, self._at)
        if kind in _CODES:
            self._take(count * struct.calcsize(f"<{_CODES[kind]}"))
        elif kind == STRING:
            self._at = self._strings(array)[0]
        else:
            raise self._broken(f"{shown(key)} is an array of the type {kind}, which Gemma does not have")
        return array

    def _strings(self, array: Array, keep: bool = False) -> tuple[int, list[bytes]]:
        """Returns where an array of strings ends and, if asked, its strings."""
        at, data, kept, length_at = array.start, self._bytes, [], struct.Struct("<Q").unpack_from
        for _ in range(array.count):
            if at + 8 > self._end:
                raise self._broken("an array of its header is longer than the header")
            start = at + 8
            at = start + length_at(data, at)[0]
            if keep:
                kept.append(data[start:at])
        if at > self._end:
            raise self._broken("an array of its header is longer than the header")
        return at, kept

    def _stored(self, name: str) -> Stored:
        # Imported here, because the import takes 0.1 seconds.
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        axes = self._number("I")
        if axes > MOST_AXES:
            raise self._broken(f"the tensor {shown(name)} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        number, start = self._number("I"), self._number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._broken(f"the tensor {shown(name)} has the unknown type {number}") from None
        block, size = GGML_QUANT_SIZES[kind]
        if (shape[-1] if shape else 1) % block:
            raise self._broken(
                f"the rows of {shown(name)} have {shape[-1:]} numbers, no multiple of {block}, "
                f"which {kind.name} needs"
            )
        return Stored(shape, kind.name, (size, block), start)

    def _place(self, size: int) -> None:
        """Turn offsets in the data into offsets in the file, which must hold one tensor after the other."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self._broken(f"its general.alignment is {shown(alignment)}, which is no small power of two")
        begin = place = -(-self._at // alignment) * alignment
        order = sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].size))
        for name, stored in order:
            if begin + stored.start != place:
                raise self._broken(
                    f"{shown(name)} begins at byte {begin + stored.start:,} where {place:,} is next"
                )
            if place + stored.size > size:
                raise self._broken(f"{shown(name)} ends at byte {place + stored.size:,} of {size:,}")
            self.tensors[name] = dataclasses.replace(stored, start=place)
            place += -(-stored.size // alignment) * alignment
        if size > max(place, begin):
            raise self._broken(f"{size - place:,} bytes after its last tensor belong to nothing")

    def array(self, key: str, kind: int) -> Any:
        """Returns an array of the metadata, or None if there is none.

        Args:
          key: Its key.
          kind: The type that its elements must have. For 8 it returns a list of bytes, else a numpy array.

        Raises:
          UserError: The value has another type.
        """
        found = self.metadata.get(key)
        if found is None:
            return None
        if not isinstance(found, Array) or found.kind != kind:
            raise self._broken(f"its {key} is not an array of the type {kind}")
        if kind == STRING:
            return self._strings(found, keep=True)[1]
        return np.frombuffer(self._bytes, f"<{_CODES[kind]}", found.count, found.start)

    def raw(self, name: str) -> np.ndarray:
        """Returns a read-only view of a tensor's bytes."""
        stored = self.tensors[name]
        return np.frombuffer(self._bytes, np.uint8, stored.size, stored.start)

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor: a read-only view of floating-point numbers, or float32 from a quantised type."""
        from gguf.quants import dequantize

        stored = self.tensors[name]
        if stored.type in FLOATS:
            return self.raw(name).view(FLOATS[stored.type]).reshape(stored.shape)
        rows = self.raw(name).reshape(math.prod(stored.shape[:-1]), -1)
        out = np.empty((len(rows), stored.shape[-1]), np.float32)
        for start in range(0, len(rows), ROWS):
            out[start : start + ROWS] = dequantize(rows[start : start + ROWS], ggml_type(stored.type))
        return out.reshape(stored.shape)


def ggml_type(name: str) -> Any:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType[name]


def can_dequantize(stored: Stored) -> bool:
    """Whether the package dequantises this type. It raises NotImplementedError for those that it cannot."""
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, stored.row[0]), np.uint8), ggml_type(stored.type))
    except NotImplementedError:
        return False
    return True
