"""The files of a corpus, local or in a bucket: which ones a path or glob names, and reading them."""

import bz2
import contextlib
import difflib
import errno
import fnmatch
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, cast

from etils import epath

from gemma_jax.errors import UserError
from gemma_jax.paths import user_path

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GLOB_CHARACTERS = re.compile(r"[*?\[]")
_COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst)$", re.IGNORECASE)
_READ_BYTES = 2**17


def matching_files(spec: str, pattern: str) -> list[str]:
    """The files that a path or glob (`**` too) names, in sorted order.

    A file that several symbolic links lead to counts once, so a link to a parent folder adds nothing. As in a
    shell, a glob matches no hidden names, and folders that it matches are left out.

    Raises:
      UserError: Nothing matches, or a file or folder that belongs to the glob cannot be read.
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
        parts = [part for part in pattern.split("/") if part]
        found = _expand("/" if pattern.startswith("/") else "", parts)
        files = _without_repeats(path for path in found if _is_regular(path))
    except OSError as error:
        raise UserError(
            f"{error.filename}, which belongs to {spec}, cannot be read ({error.strerror}); "
            "make it readable, or name the files without it."
        ) from error
    if not files:
        raise UserError(
            f"No corpus {spec!r}: no file and no known corpus has this name{_suggestion(pattern)}"
        )
    return files


def _expand(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """What a glob matches below a folder. Raises OSError where Python's own glob finds nothing."""
    first, *rest = parts
    if first == "**":
        for each in _folders_below(folder):
            yield from _expand(each, rest or ["*"])
        return
    if GLOB_CHARACTERS.search(first):
        names = [name for name in sorted(os.listdir(folder or ".")) if _matches(name, first)]
    else:
        names = [first] if os.path.lexists(os.path.join(folder, first)) else []
    for name in names:
        path = os.path.join(folder, name)
        if not rest:
            yield path
        elif _is_folder(path):
            yield from _expand(path, rest)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))


def _folders_below(top: str) -> Iterator[str]:
    """A folder and all below it, each once: by its own path, or else by the first link that leads to it."""
    seen: set[tuple[int, int]] = set()
    folders, links = [top], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        about = os.stat(folder or ".")
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        yield folder
        for name in sorted(os.listdir(folder or "."), reverse=True):
            path = os.path.join(folder, name)
            if not name.startswith(".") and _is_folder(path):
                (links if os.path.islink(path) else folders).append(path)


def _is_folder(path: str) -> bool:
    """As os.path.isdir, but what cannot be looked at raises OSError; a link to nothing is no folder."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _is_regular(path: str) -> bool:
    """False for a folder; raises OSError for what can be read as neither."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "neither a regular file nor a folder", path)
    return stat.S_ISREG(mode)


def _without_repeats(paths: Iterator[str]) -> list[str]:
    """Absolute paths in sorted order, one for each file; of links to one file the first, if need be."""
    real_folders: dict[str, str] = {}
    names: dict[str, str] = {}
    for path in map(os.path.abspath, paths):
        folder, name = os.path.split(path)
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(folder)
        is_link = os.path.islink(path)
        real = os.path.realpath(path) if is_link else os.path.join(real_folders[folder], name)
        if not is_link or real not in names:
            names.setdefault(real, path)
    return sorted(names.values())


def _matching_bucket_files(spec: str, pattern: str) -> list[str]:
    if not GLOB_CHARACTERS.search(pattern):
        path = user_path(pattern)
        files = [path] if path.exists() else []
    else:
        parts = pattern.split("/")
        literal = next(i for i, part in enumerate(parts) if GLOB_CHARACTERS.search(part))
        found = user_path("/".join(parts[:literal])).glob("/".join(parts[literal:]))
        files = [file for file in found if not file.is_dir()]
    if not files:
        raise UserError(f"No corpus {spec!r}: nothing in the bucket matches it; check the address.")
    return sorted(os.fspath(file) for file in files)


def _suggestion(pattern: str) -> str:
    """Names the known corpus or the neighbouring file whose name is nearest, if one is near."""
    parent, name = os.path.split(pattern)
    near = difflib.get_close_matches(pattern, ["python-stdlib"], 1)
    if not near and os.path.isdir(parent or "."):
        names = difflib.get_close_matches(name, os.listdir(parent or "."), 1)
        near = [os.path.join(parent, neighbour) for neighbour in names]
    return f"; did you mean {near[0]}?" if near else "; check the path."


def size_and_time(file: str) -> tuple[int, int]:
    """Bytes in a local or bucket file, and when it was changed last."""
    if "://" in file:
        remote = epath.Path(file).stat()
        return remote.length, int(remote.mtime)
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns


def names_below_common_folder(files: Sequence[str]) -> list[str]:
    """The files' paths without the folders that all of them have in common."""
    parts = [file.split("/") for file in files]
    common = os.path.commonprefix([part[:-1] for part in parts])
    return ["/".join(part[len(common) :]) for part in parts]


def is_compressed(file: str) -> bool:
    return bool(_COMPRESSED.search(file))


@contextlib.contextmanager
def reading(file: str) -> Iterator[BinaryIO]:
    """Opens a file, decompressed if its name ends in .gz, .bz2, .xz or .zst.

    Raises:
      UserError: It cannot be read, or is not whole; also while the block reads it.
    """
    try:
        with epath.Path(file).open("rb") as stream:
            yield _decompressed(file, stream) if is_compressed(file) else stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file, error) from error
        raise UserError(f"{file} is not a whole compressed file ({error}); fetch it again.") from error


def unreadable(file: str, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read ({error}); check that it is there and whole.")


def _decompressed(file: str, stream: BinaryIO) -> BinaryIO:
    if not stream.read(1):
        raise EOFError("it is empty")  # which gzip and zstandard take for the end
    stream.seek(0)
    ending = os.path.splitext(file)[1].lower()
    if ending == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if ending == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(stream))
    if ending == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(stream))
    return cast(BinaryIO, io.BufferedReader(_Zstandard(file, stream), _READ_BYTES))


class _Zstandard(io.RawIOBase):
    """A zstd file of one or more frames. (The library's own reader does not notice a cut file.)"""

    def __init__(self, file: str, stream: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{file} needs the zstandard package: pip install zstandard, or unpack the file."
            ) from error
        self._stream = stream
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._text:
            content = self._compressed or self._stream.read(_READ_BYTES)
            if not content:
                if self._frame is not None:
                    raise EOFError("it ends in mid-frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._text = memoryview(self._frame.decompress(content))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._text))
        target[:count] = self._text[:count]
        self._text = self._text[count:]
        return count
