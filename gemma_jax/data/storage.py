"""Writes files of the cache atomically, and reads ranges of them, on disk or in a bucket."""

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
    """Opens a temporary file, which replaces `path` if the block succeeds and is deleted if it raises.

    So there is always a complete file or none, even if several processes write it or one is killed. An
    OSError in the block must come from writing: it becomes a UserError about the cache.
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

    It is not a memory map, because a truncated file or a failing disk would then end the process (SIGBUS),
    while a read raises an exception. A read takes only microseconds more.
    """

    def __init__(self, path: epath.Path, dtype: np.dtype[Any] | None = None):
        """Opens a flat file of values of `dtype` or, if that is None, a .npy file.

        Raises:
          OSError: The file does not exist or cannot be read.
          ValueError: It is not a complete .npy file of one dimension and plain values.
        """
        self._path = path
        self._file = None if in_bucket(path) else open(path, "rb", buffering=0)  # noqa: SIM115  # stays open for later reads
        self._start = 0
        self._whole: bytes | None = None
        if dtype is None:
            if self._file is None:  # one request instead of one per row
                self._whole = path.read_bytes()
            stream = self._file or io.BytesIO(self._whole or b"")
            try:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            except tokenize.TokenError as error:  # numpy parses a damaged header as one written by Python 2
                raise ValueError(f"{path} has no whole header") from error
            self._start = stream.tell()
            size = stream.seek(0, os.SEEK_END)
            if len(shape) != 1 or dtype.hasobject or size != self._start + shape[0] * dtype.itemsize:
                raise ValueError(f"{path} is not a whole array")
            self._length = shape[0]
        self.dtype = dtype

    def __len__(self) -> int:
        """The number of values in a .npy file."""
        return self._length

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns values `start` to `stop`.

        Raises:
          OSError: The file cannot be read.
          ValueError: The file ends before `stop`, or the range is not valid.
        """
        if (
            not 0 <= start <= stop < 2**48
        ):  # such a range can come from a damaged index; os.pread raises another error for huge offsets
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
