"""The safetensors file format: 8 bytes with the length of a JSON header, the header, and raw array data.

Reading maps the file into memory and returns views of it, so that reading a slice of a tensor costs only that
slice; writing holds one tensor at a time. The safetensors package does neither from Python: it copies what it
reads, and needs everything that it writes in memory. Nothing in a file is trusted before it is checked.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.paths import parse_json
from gemma_jax.pretrained.published_config import shown
from gemma_jax.pretrained.tensor_file import DTYPES, Stored, TensorFile

NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
CHECKSUMS = "crc32"  # key in the metadata of files that we write: the CRC-32 of each tensor, as JSON
# In bytes: enough for 100,000 tensors, while a Gemma has at most 254. It limits the cost of a hostile header;
# the reference implementation accepts up to 100,000,000 bytes.
LONGEST_HEADER = 2**24
MOST_AXES = 8


class SafetensorsFile(TensorFile):
    """The tensors of one file, mapped into memory."""

    form = "safetensors"

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; the tensors are not read.

        Raises:
          UserError: The file does not exist, is truncated, or is not what its header describes.
        """
        super().__init__(path, 8)
        length, most = int.from_bytes(self.bytes[:8], "little"), self.size - 8
        if length > min(LONGEST_HEADER, most):
            raise self.broken(f"its header claims {length:,} bytes, and {most:,} follow")
        # A tensor name that is not UTF-8 is refused later, because no Gemma has such a tensor.
        text = self.bytes[8 : 8 + length].decode(errors="replace")
        header = parse_json(text, f"the header of {path}")
        if not isinstance(header, dict):
            raise self.broken("its header is not a JSON object")
        self.metadata = metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self.broken(f"{METADATA} in its header is not an object of strings")
        checksums = parse_json(metadata.get(CHECKSUMS, "{}"), f"the {CHECKSUMS} of {path}")
        if not isinstance(checksums, dict) or not _naturals([*checksums.values()]):
            raise self.broken(f"its {CHECKSUMS} are not numbers")
        self._checksums: dict[str, int] = checksums
        self.tensors = {name: self._stored(name, value, 8 + length) for name, value in header.items()}
        self.check_layout(8 + length)

    def _stored(self, name: str, value: Any, begin: int) -> Stored:
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.broken(f"the header of {shown(name)} is not a dtype, a shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UserError(
                f"{self.path} holds {shown(name)} of dtype {shown(dtype)}; "
                f"give weights of {', '.join(DTYPES)}."
            )
        if not _naturals(shape) or len(shape) > MOST_AXES:
            raise self.broken(f"the shape of {shown(name)} is not a short list of sizes")
        if not _naturals(offsets) or len(offsets) != 2:
            raise self.broken(f"the data_offsets of {shown(name)} are not two places in the file")
        size, held = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
        if held != size:
            raise self.broken(
                f"{shown(name)} of shape {shape} and dtype {dtype} needs {size} bytes, not {held}"
            )
        return Stored(tuple(shape), dtype, begin + offsets[0], size)

    def check(self, name: str) -> None:
        """Compare a tensor's data with its checksum in the file, if there is one.

        Raises:
          UserError: The data has changed.
        """
        expected = self._checksums.get(name)
        if expected is not None and zlib.crc32(self.raw(name).data) != expected:
            raise self.broken(f"the numbers of {name!r} have changed since they were written")


def _naturals(value: Any) -> bool:
    """Whether a value from JSON is a list of integers that can be sizes or offsets."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


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
            data = array.reshape(-1).view(np.uint8).data
            file.write(data)
            dtypes[name], checksums[name] = array.dtype, zlib.crc32(data)
        file.seek(0)
        file.write(length.to_bytes(8, "little") + encoded(dtypes, checksums).ljust(length))
        file.flush()
        os.fsync(file.fileno())
    return {name: str(dtype) for name, dtype in dtypes.items()}
