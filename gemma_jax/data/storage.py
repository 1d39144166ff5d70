"""Files of the cache: written whole or not at all, and read without loading them, on disk or in a bucket."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np
from etils import epath
from numpy.typing import NDArray

from gemma_jax.errors import UserError


class TokenStream(Protocol):
    """Token ids that are read by slices: a memory map, or byte ranges of a file in a bucket."""

    def __getitem__(self, key: slice, /) -> NDArray[Any]: ...


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


def open_tokens(path: epath.Path, dtype: np.dtype[Any]) -> TokenStream:
    """The flat file of token ids as something that slices read from. It must not be empty."""
    if is_local(path):
        return np.memmap(path, dtype, mode="r")
    return _RemoteTokens(path, dtype)


class _RemoteTokens:
    def __init__(self, path: epath.Path, dtype: np.dtype[Any]):
        self._path = path
        self._dtype = dtype

    def __getitem__(self, key: slice, /) -> NDArray[Any]:
        size = self._dtype.itemsize
        with self._path.open("rb") as stream:
            stream.seek(key.start * size)
            return np.frombuffer(stream.read((key.stop - key.start) * size), self._dtype)
