"""Finds and reads the files of a corpus, local or in a bucket."""

import contextlib
import difflib
import errno
import fnmatch
import functools
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

from etils import epath

from gemma_jax.errors import UserError
from gemma_jax.paths import user_path

KINDS = "text, .jsonl, .ndjson and .json files (also .gz, .bz2, .zst), .parquet and .array_record files"
"""The kinds of files that can be read, for use in messages."""

GLOB_CHARACTERS = re.compile(r"[*?\[]")
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def matching_files(spec: str, pattern: str) -> list[str]:
    """Returns the files that a path or glob (`**` included) matches, sorted.

    A file that can be reached through several symbolic links is returned once, so a link to a parent folder
    adds nothing. As in a shell, a glob matches no hidden names. Folders that it matches are left out.

    Raises:
      UserError: Nothing matches, or a file or folder that the glob covers cannot be read.
    """
    if "://" in pattern:
        return _matching_bucket_files(spec, pattern)
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [os.path.abspath(pattern)]
    if os.path.isdir(pattern):
        raise UserError(
            f"{spec} is a directory that TFDS did not prepare; "
            f"name its files, as in {pattern.rstrip('/')}/**/*.txt."
        )
    try:
        files = _regular_files(pattern)
    except OSError as error:
        raise UserError(
            f"{error.filename}, which belongs to {spec}, cannot be read ({error.strerror}); "
            "make it readable, or name the files without it."
        ) from error
    if not files:
        raise UserError(
            f"no corpus {spec!r}: no file and no known corpus has this name{_suggestion(pattern)}"
        )
    return files


def _regular_files(pattern: str) -> list[str]:
    """Returns the absolute paths of the files that a glob matches, one path (the first) for each file.

    Raises OSError for a match that cannot be read or is neither a file nor a folder.
    """
    top, parts = _split_glob(pattern)
    real_folder = functools.cache(os.path.realpath)
    files: dict[str, str] = {}
    for path in map(os.path.abspath, _expand(top, parts) if os.path.isdir(top or ".") else ()):
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            folder, name = os.path.split(path)
            real = os.path.realpath(path) if os.path.islink(path) else f"{real_folder(folder)}/{name}"
            files.setdefault(real, path)
        elif not stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, "neither a file nor a folder", path)
    return sorted(files.values())


def _split_glob(pattern: str) -> tuple[str, list[str]]:
    """Splits a glob into the folder that holds all its matches and the remaining parts of the pattern."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if GLOB_CHARACTERS.search(part)), len(parts) - 1)
    return "/".join([*parts[:first], ""]), parts[first:]


def _expand(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Yields the paths below a folder that the parts of a glob match.

    Raises OSError for a folder that cannot be listed, which Python's own glob silently skips.
    """
    first, *rest = parts
    if first == "**":
        for each in _folders_below(folder):
            yield from _expand(each, rest or ["*"])
        return
    for name in fnmatch.filter(sorted(os.listdir(folder or ".")), first):
        path = os.path.join(folder, name)
        if name.startswith(".") and not first.startswith("."):
            continue
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _expand(path, rest)


def _folders_below(top: str) -> Iterator[str]:
    """Yields a folder and all folders below it, each once even if several links lead to it."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for folder, folders, _ in os.walk(top or ".", onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield folder
        kept = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(kept, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))


def _matching_bucket_files(spec: str, pattern: str) -> list[str]:
    top, parts = _split_glob(pattern)
    files = [file for file in user_path(top).glob("/".join(parts)) if not file.is_dir()]
    if not files:
        raise UserError(f"no corpus {spec!r}: nothing in the bucket matches it; check the address.")
    return sorted(map(os.fspath, files))


def _suggestion(pattern: str) -> str:
    """Suggests the known corpus or the file in the same folder with the most similar name, if any."""
    parent, name = os.path.split(pattern)
    near = difflib.get_close_matches(pattern, ["python-stdlib"], 1)
    if not near and os.path.isdir(parent or "."):
        names = difflib.get_close_matches(name, os.listdir(parent or "."), 1)
        near = [os.path.join(parent, neighbour) for neighbour in names]
    return f"; did you mean {near[0]}?" if near else "; check the path."


def size_and_time(file: str) -> tuple[int, int]:
    """The size of a local or bucket file in bytes, and the time when it was last modified."""
    if "://" in file:
        remote = epath.Path(file).stat()
        return remote.length, int(remote.mtime)
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns


def is_compressed(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in _CODECS


@contextlib.contextmanager
def reading(file: str) -> Iterator[BinaryIO]:
    """Opens a file for reading, and decompresses it if its name ends in .gz, .bz2 or .zst.

    Raises:
      UserError: The file cannot be read or is incomplete, when it is opened or while the block reads it.
    """
    try:
        with epath.Path(file).open("rb") as stream:
            yield _decompressed(file, stream) if is_compressed(file) else stream
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: str, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read ({error}); check that it is there and whole.")


def _decompressed(file: str, stream: BinaryIO) -> BinaryIO:
    # Python's own modules are not used: there is none for zstd, and gzip accepts an empty file as complete.
    import pyarrow

    if not stream.read(1):
        raise OSError("a compressed file is never empty")
    stream.seek(0)
    codec = _CODECS[os.path.splitext(file)[1].lower()]
    return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(stream, codec), 2**17))
