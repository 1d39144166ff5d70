"""What the file formats of published weights share: a header, then the data of tensors without gaps."""

import dataclasses
import mmap
import os
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.paths import open_regular
from gemma_jax.pretrained.published_config import shown

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = FLOATS | {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The shape, type and position of a tensor in a file."""

    shape: tuple[int, ...]
    type: str  # as the format names it: F32, BF16, Q4_0 ...
    start: int  # offset in the file, in bytes
    size: int  # in bytes

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which it is read; float32 for a type that numpy does not have."""
        return DTYPES.get(self.type, DTYPES["F32"])


class TensorFile:
    """A file that is mapped into memory. A format reads its header and sets `metadata` and `tensors`."""

    form: ClassVar[str]  # the name of the format, for messages
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def __init__(self, path: Path, least: int) -> None:
        """Map a file of at least `least` bytes.

        Raises:
          UserError: The file is smaller, or `open_regular` raises it.
        """
        self.path = path
        with open_regular(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < least:
                raise self.broken(f"it has {self.size} bytes")
            self.bytes = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)

    def broken(self, reason: str) -> UserError:
        """Returns the error that says why the file is not what its format asks for."""
        return UserError(f"{self.path} is not a whole {self.form} file: {reason}; copy or download it again.")

    def check_layout(self, begin: int, alignment: int = 1) -> None:
        """Check that the tensors fill the file from `begin` on, because no format allows hidden bytes.

        Raises:
          UserError: There is a gap, an overlap, or a tensor that ends beyond the file.
        """
        place = begin
        for name, stored in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].size)):
            if stored.start != place:
                raise self.broken(f"{shown(name)} begins at byte {stored.start:,} where {place:,} is next")
            if place + stored.size > self.size:
                raise self.broken(f"{shown(name)} ends at byte {place + stored.size:,} of {self.size:,}")
            place += -(-stored.size // alignment) * alignment
        if place < self.size:
            raise self.broken(f"{self.size - place:,} bytes after its last tensor belong to nothing")

    def raw(self, name: str) -> np.ndarray:
        """Returns a read-only view of a tensor's bytes. Data is read from disk when it is accessed."""
        # What was read before leaves the memory of this process; the system keeps it, and an older view reads
        # it again. Otherwise a loaded model would be in memory twice.
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self.bytes.madvise(mmap.MADV_DONTNEED)
        stored = self.tensors[name]
        return np.frombuffer(self.bytes, np.uint8, stored.size, stored.start)

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a read-only view of a tensor of one of `DTYPES`."""
        stored = self.tensors[name]
        return self.raw(name).view(stored.dtype).reshape(stored.shape)
