"""Files of the cache: written whole or not at all, and read without loading them, on disk or in a bucket."""

import contextlib
import errno
import io
import os
import tokenize
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from numpy.typing import NDArray

from gemma_jax.errors import UserError
from gemma_jax.paths import in_bucket


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the place of `path` if the block ends well, and else is deleted.

    A reader, another writer or a kill therefore meets a whole file or none. OSError raised in the block must
    come from writing: it becomes a UserError about the cache.
    """
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as stream:
            yield stream
            if not in_bucket(path):
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cache_error(path, error) from error
        raise


def cache_error(path: epath.Path, error: OSError) -> UserError:
    remedy = "free some space" if error.errno == errno.ENOSPC else "check it"
    return UserError(f"The cache file {path} failed ({error}); {remedy}, or set data.cache_dir elsewhere.")


def save_array(path: epath.Path, array: NDArray[Any]) -> None:
    with replacing(path) as stream:
        np.save(stream, array, allow_pickle=False)


class ArrayFile:
    """An array of one dimension in a file on disk or in a bucket, read by ranges.

    Not a memory map: there, a file that is cut short or a disk that fails ends the process (SIGBUS), where a
    read raises OSError. A read in between takes microseconds.
    """

    def __init__(self, path: epath.Path, dtype: np.dtype[Any] | None = None):
        """Opens a flat file of values of `dtype`, or a .npy file, whose header has the dtype.

        Raises:
          OSError: The file is not there or cannot be read.
          ValueError: It is not a whole .npy file of one dimension and plain values.
        """
        self._path = path
        self._file = None if in_bucket(path) else open(path, "rb", buffering=0)  # noqa: SIM115  # it stays open
        self._start = 0
        self._whole: bytes | None = None
        if dtype is None:
            if self._file is None:  # one request, instead of one for each row
                self._whole = path.read_bytes()
            stream = self._file or io.BytesIO(self._whole or b"")
            try:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            except tokenize.TokenError as error:  # numpy takes a damaged header for one of Python 2
                raise ValueError(f"{path} has no whole header") from error
            self._start = stream.tell()
            size = stream.seek(0, os.SEEK_END)
            if len(shape) != 1 or dtype.hasobject or size != self._start + shape[0] * dtype.itemsize:
                raise ValueError(f"{path} is not a whole array")
            self._length = shape[0]
        self.dtype = dtype

    def __len__(self) -> int:
        """Values in a .npy file."""
        return self._length

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Values `start` to `stop`.

        Raises:
          OSError: The file cannot be read.
          ValueError: It ends before.
        """
        if (
            not 0 <= start <= stop < 2**48
        ):  # as from a damaged index; what the system cannot count raises otherwise
            raise ValueError(f"{self._path} has no values {start} to {stop}")
        size = self.dtype.itemsize
        begin, length = self._start + start * size, (stop - start) * size
        if self._whole is not None:
            content = self._whole[begin : begin + length]
        elif self._file is not None:
            content = os.pread(self._file.fileno(), length, begin)
        else:
            with self._path.open("rb") as stream:
                stream.seek(begin)
                content = stream.read(length)
        if len(content) != length:
            raise ValueError(f"{self._path} ends too early")
        return np.frombuffer(content, self.dtype)
