"""Files of the cache: written whole or not at all, and read without loading them, on disk or in a bucket."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from numpy.typing import NDArray

from gemma_jax.errors import UserError


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


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
            if is_local(path):
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


def load_array(path: epath.Path) -> NDArray[Any]:
    """A .npy file, memory-mapped where it is on disk.

    Raises:
      ValueError: It is not a whole .npy file of plain values.
      FileNotFoundError: It is not there.
    """
    try:
        if is_local(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with path.open("rb") as stream:
                array = np.load(stream, allow_pickle=False)
    except EOFError as error:
        raise ValueError(f"{path} is empty") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is no array")
    return array


class TokenFile:
    """A flat file of token ids on disk or in a bucket, read by ranges.

    Not a memory map: there, a file that is cut short or a disk that fails ends the process (SIGBUS), where a
    read raises OSError. A read in between takes microseconds.
    """

    def __init__(self, path: epath.Path, dtype: np.dtype[Any]):
        """Raises OSError if the file is not there."""
        self._path = path
        self._dtype = dtype
        self._file = open(path, "rb", buffering=0) if is_local(path) else None  # noqa: SIM115  # it stays open

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Ids `start` to `stop`; fewer if the file ends before, which the caller must check.

        Raises:
          OSError: The file cannot be read.
          ValueError: It ends within an id.
        """
        size = self._dtype.itemsize
        if self._file is not None:
            content = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        else:
            with self._path.open("rb") as stream:
                stream.seek(start * size)
                content = stream.read((stop - start) * size)
        return np.frombuffer(content, self._dtype)
