"""The safetensors file format: 8 bytes with the length of a JSON header, the header, and raw array data.

Reading maps the file into memory and returns views of it, so that reading a slice of a tensor costs only that
slice; writing holds one tensor at a time. The safetensors package does neither from Python: it copies what it
reads, and needs everything that it writes in memory. Nothing in a file is trusted before it is checked.

Format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
import mmap
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.paths import open_regular, parse_json

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
CHECKSUMS = "crc32"  # key in the metadata of files that we write: the CRC-32 of each tensor, as JSON
# In bytes: enough for 100,000 tensors, while a Gemma has at most 254. It limits the cost of a hostile header;
# the reference implementation accepts up to 100,000,000 bytes.
LONGEST_HEADER = 2**24
MOST_AXES = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """The shape, dtype and position of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int  # offset in the file, in bytes


class SafetensorsFile:
    """The tensors of one file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; the tensors are not read.

        Raises:
          UserError: The file does not exist, is truncated, or is not what its header describes.
        """
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise self._broken(f"it has {size} bytes")
            self._bytes = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._bytes[:8], "little")
        if length > min(LONGEST_HEADER, size - 8):
            raise self._broken(f"its header claims {length:,} bytes, and {size - 8:,} follow")
        header = self._header(self._bytes[8 : 8 + length])
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._broken(f"{METADATA} in its header is not an object of strings")
        self.metadata: dict[str, str] = metadata
        self.tensors = {
            name: self._stored(name, value, 8 + length, size - 8 - length) for name, value in header.items()
        }
        self._check_layout(8 + length, size)
        self._checksums = self._read_checksums()

    def _broken(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not a whole safetensors file: {reason}; copy or download it again.")

    def _header(self, raw: bytes) -> dict[str, Any]:
        # A tensor name that is not UTF-8 is refused later, because no Gemma has such a tensor.
        header = parse_json(raw.decode(errors="replace"), f"the header of {self.path}")
        if not isinstance(header, dict):
            raise self._broken("its header is not a JSON object")
        return header

    def _stored(self, name: str, value: Any, begin: int, size: int) -> Stored:
        shown = repr(name[:100])
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._broken(f"the header of {shown} is not a dtype, a shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UserError(
                f"{self.path} holds {shown} of dtype {str(dtype)[:20]}; give weights of {', '.join(DTYPES)}."
            )
        if not _naturals(shape) or len(shape) > MOST_AXES:
            raise self._broken(f"the shape of {shown} is not a short list of sizes")
        if not _naturals(offsets) or len(offsets) != 2:
            raise self._broken(f"the data_offsets of {shown} are not two places in the file")
        start, end = offsets
        need = math.prod(shape) * DTYPES[dtype].itemsize
        if end - start != need:
            raise self._broken(
                f"{shown} of shape {shape} and dtype {dtype} needs {need} bytes, not {end - start}"
            )
        if end > size:
            raise self._broken(f"{shown} ends at byte {end:,} of {size:,}")
        return Stored(tuple(shape), DTYPES[dtype], begin + start)

    def _check_layout(self, begin: int, size: int) -> None:
        """Check that the tensors cover the file without gaps: the format does not allow hidden bytes."""
        place = begin
        for name, stored in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].shape)):
            if stored.start != place:
                raise self._broken(f"{name[:100]!r} begins at byte {stored.start:,} where {place:,} is next")
            place += math.prod(stored.shape) * stored.dtype.itemsize
        if place != size:
            raise self._broken(f"{size - place:,} bytes after its last tensor belong to nothing")

    def _read_checksums(self) -> dict[str, int]:
        try:
            checksums = json.loads(self.metadata.get(CHECKSUMS, "{}"))
        except (ValueError, RecursionError) as error:
            raise self._broken("its checksums are not JSON") from error
        if not isinstance(checksums, dict) or not _naturals(list(checksums.values())):
            raise self._broken("its checksums are not numbers")
        return checksums

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a read-only view of a tensor. Data is read from disk when it is accessed."""
        stored = self.tensors[name]
        flat = np.frombuffer(self._bytes, stored.dtype, math.prod(stored.shape), stored.start)
        return flat.reshape(stored.shape)

    def check(self, name: str) -> None:
        """Compare a tensor's data with its checksum in the file, if there is one.

        Raises:
          UserError: The data has changed.
        """
        expected = self._checksums.get(name)
        if expected is not None and zlib.crc32(_raw_bytes(self[name])) != expected:
            raise self._broken(f"the numbers of {name!r} have changed since they were written")


def _naturals(value: Any) -> bool:
    """Whether a value from JSON is a list of integers that can be sizes or offsets."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order; a view if the array is already in that order."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], np.ndarray]
) -> dict[str, str]:
    """Write a file with a checksum of each tensor, holding only one tensor in memory at a time.

    Args:
      path: The file to write.
      shapes: The shapes of its tensors by name, in the order of the file.
      tensor: Returns the tensor of a given name, in any of `DTYPES`.

    Returns:
      The dtype of each tensor, by name.

    Raises:
      OSError: The disk is full or cannot be written.
    """

    def encoded(dtypes: dict[str, np.dtype[Any]], checksums: dict[str, int]) -> bytes:
        header: dict[str, Any] = {}
        place = 0
        for name, shape in shapes.items():
            end = place + math.prod(shape) * dtypes[name].itemsize
            header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [place, end]}
            place = end
        # transformers refuses a file without a `format`, which names the framework that it was written for.
        metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums)}
        return json.dumps({METADATA: metadata, **header}, separators=(",", ":")).encode()

    # Reserve room for the longest possible header (BF16 is a letter longer than F32), rounded up to align the
    # tensors. The header is padded with spaces, which JSON allows at its end.
    widest = encoded(dict.fromkeys(shapes, np.dtype(np.float32)), dict.fromkeys(shapes, 2**32 - 1))
    length = -(-(len(widest) + len(shapes)) // 8) * 8
    dtypes: dict[str, np.dtype[Any]] = {}
    checksums: dict[str, int] = {}
    with open(path, "wb") as file:
        file.seek(8 + length)
        for name, shape in shapes.items():
            array = np.asarray(tensor(name), order="C")
            assert array.shape == shape, (name, array.shape)
            file.write(_raw_bytes(array))
            dtypes[name], checksums[name] = array.dtype, zlib.crc32(_raw_bytes(array))
        file.seek(0)
        file.write(length.to_bytes(8, "little") + encoded(dtypes, checksums).ljust(length))
        file.flush()
        os.fsync(file.fileno())
    return {name: str(dtype) for name, dtype in dtypes.items()}
