"""The safetensors file format: 8 bytes that say how long a JSON header is, the header, and raw numbers.

Reading maps the file into memory and returns views of it, so that a slice of a tensor costs that slice;
writing takes one tensor at a time. The safetensors package does neither from Python: it copies what it reads,
and writes what is all in memory. Nothing of a file is believed before it was checked.

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
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
CHECKSUMS = "crc32"  # in the metadata of files that we wrote: JSON of CRC-32 by tensor
# Room for 100,000 tensors, where a Gemma has 254. It bounds what a hostile header can cost; the reference
# implementation takes up to 100,000,000 bytes.
LONGEST_HEADER = 2**24
MOST_AXES = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor is in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int  # byte in the file


class SafetensorsFile:
    """The tensors of one file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Check the header; no number is read.

        Raises:
          UserError: no such file, cut short, or a header that does not describe it.
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
        # A name that is not UTF-8 is none of a Gemma, and is refused as such.
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
        """The tensors must cover the file without holes, as the format says: hidden bytes are a fault."""
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
        """A read-only view of a tensor; what is taken of it is read from disk then."""
        stored = self.tensors[name]
        flat = np.frombuffer(self._bytes, stored.dtype, math.prod(stored.shape), stored.start)
        return flat.reshape(stored.shape)

    def check(self, name: str) -> None:
        """Compare a tensor's numbers with the checksum that was written with them, where there is one.

        Raises:
          UserError: they have changed.
        """
        expected = self._checksums.get(name)
        if expected is not None and zlib.crc32(_raw_bytes(self[name])) != expected:
            raise self._broken(f"the numbers of {name!r} have changed since they were written")


def _naturals(value: Any) -> bool:
    """Whether a value from JSON is a list of whole numbers that can be sizes or places."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order; a view where it is in that order."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
) -> dict[str, str]:
    """Write a file, one tensor in memory at a time, with a checksum of each.

    Args:
      path: of the file.
      shapes: of its tensors by name, in their order.
      tensor: returns the tensor of a name, of any of `DTYPES`.

    Returns:
      The dtype of each tensor.

    Raises:
      OSError: the disk is full, or cannot be written.
    """

    def encoded(dtypes: dict[str, np.dtype[Any]], checksums: dict[str, int]) -> bytes:
        header: dict[str, Any] = {}
        place = 0
        for name, shape in shapes.items():
            end = place + math.prod(shape) * dtypes[name].itemsize
            header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [place, end]}
            place = end
        # transformers refuses a file that does not say which framework's conventions it follows.
        metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums)}
        return json.dumps({METADATA: metadata, **header}, separators=(",", ":")).encode()

    # As long as it can become (BF16 is a letter longer than F32), rounded up so that the tensors are aligned.
    # JSON may end in spaces.
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
