"""Turns a user's text into a path, on this machine or in a bucket (gs://, s3://), and reads files.

Files may come from untrusted sources. They are read here, or opened by `open_regular`, so that none of them
can make the program wait for ever, fill its memory, or fail with a traceback instead of a one-sentence error.
"""

import importlib.util
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any, BinaryIO

from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

SMALL_FILE = 2**20  # bytes: the largest size of a file that describes a model or a few settings
LFS_POINTER = b"version https://git-lfs"  # start of a pointer that replaces a large file in a repository
LARGE_FILE = 2**30  # bytes: the largest size of a log or a record

# Characters that a path to checkpoints must not contain. orbax treats such a path as a pattern, finds none of
# the files that it has written, and leaves the checkpoint unfinished. It cannot write names at all that are
# not UTF-8.
_REFUSED = re.compile(r"[*?\[\]\\\x00-\x1f\x7f\ud800-\udfff]")


def user_path(name: str | os.PathLike[str]) -> "epath.Path":
    """Returns the path that a user names; `~` is the home directory.

    Raises:
      UserError: the name is another kind of address, or needs a package that is not installed.
    """
    from etils import epath  # imported here because help and error messages do not need it

    scheme, separator, _ = os.fspath(name).partition("://")
    if not separator:
        return epath.Path(name).expanduser()
    if scheme not in ("gs", "s3"):
        raise UserError(f"{name} is neither a path nor the address of a bucket (gs://, s3://).")
    # epath uses TensorFlow's file systems if TensorFlow is installed, otherwise those of fsspec.
    if importlib.util.find_spec("tensorflow") is None:
        import fsspec

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UserError(f"{name}: {error}, as in pip install 'gemma_jax[data]'.") from error
        # Listings are not cached, so that files of other processes and libraries are found.
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is the address of a bucket."""
    return "://" in os.fspath(path)


def children(folder: "epath.Path") -> "list[epath.Path]":
    """Returns the contents of a folder, sorted by name; an empty list if it does not exist.

    A bucket has no empty folders.

    Raises:
      UserError: the path is not a folder, or may not be read.
    """
    try:
        if in_bucket(folder):
            return sorted(folder.iterdir()) if folder.exists() else []
        return [folder / name for name in sorted(os.listdir(folder))]  # epath omits names such as x~
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error}); check it and your access."
        ) from error


def check_writable_path(path: str | os.PathLike[str]) -> None:
    """Checks that orbax can write checkpoints below a directory, considering its whole path from the root.

    Raises:
      UserError: the path has a character of shell patterns or a control character, or is not UTF-8.
    """
    whole = os.fspath(path) if in_bucket(path) else os.path.abspath(path)
    if found := _REFUSED.search(whole):
        raise UserError(
            f"no checkpoint can be written below {whole!a}: {found[0]!a} in its path is not supported; "
            "give a directory without such a character."
        )


def open_regular(path: str | os.PathLike[str], most: float = float("inf")) -> BinaryIO:
    """Opens a file of this machine for reading.

    Raises:
      UserError: the file does not exist, may not be read, is not a regular file (reading a pipe or a device
        could wait for ever), is a pointer of Git LFS, or has more than `most` bytes.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a process that writes to it.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115  # the caller closes it
        about = os.fstat(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); check the path and your access.") from error
    regular = stat.S_ISREG(about.st_mode)
    pointer = regular and file.peek(len(LFS_POINTER)).startswith(LFS_POINTER)
    if regular and about.st_size <= most and not pointer:
        return file
    file.close()
    if pointer:
        raise UserError(f"{path} is a pointer of Git LFS, not the file; get that by `git lfs pull`.")
    if regular:
        raise UserError(f"{path} has {about.st_size:,} bytes, but such a file has at most {int(most):,}.")
    raise UserError(f"{path} is not a regular file, so it is not read; put the file itself there.")


def read_bytes(path: "str | os.PathLike[str]", most: int = SMALL_FILE) -> bytes:
    """Returns the content of a file, on this machine or in a bucket.

    Raises:
      UserError: as `open_regular` does.
    """
    if not in_bucket(path):
        with open_regular(path, most) as file:
            return file.read(most)
    try:
        found = user_path(path)
        if found.stat().length <= most:
            return bytes(found.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); check the address and your access.") from error
    raise UserError(f"{path} has more than {most:,} bytes, which is more than such a file has.")


def read_text(path: "str | os.PathLike[str]", most: int = SMALL_FILE, errors: str = "strict") -> str:
    """Returns the content of a text file.

    Args:
      path: The path of the file.
      most: The largest size in bytes that is accepted.
      errors: How to handle bytes that are not UTF-8, as for `bytes.decode`.

    Raises:
      UserError: as `read_bytes` does, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode(errors=errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); copy or download it again.") from error


def parse_json(text: str, origin: str | os.PathLike[str]) -> Any:
    """Parses JSON. An object with the same key twice is an error, whereas Python would use the last value.

    Args:
      text: The JSON text.
      origin: Where the text comes from, for messages.

    Raises:
      UserError: the text is not valid JSON, or an object has the same key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            raise ValueError("an object has the same key twice")
        return data

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested too deeply
        raise UserError(f"{origin} is not valid JSON ({str(error)[:100]}); copy it again.") from error


def read_json(path: "str | os.PathLike[str]", most: int = SMALL_FILE) -> Any:
    """Returns the parsed content of a JSON file.

    Raises:
      UserError: as `read_text` and `parse_json` do.
    """
    return parse_json(read_text(path, most), path)
