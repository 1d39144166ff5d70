"""From what a user writes to a path, on this machine or in a bucket (gs://, s3://), and to a file's content.

Files may come from anybody. They are read here, or opened by `open_regular`, so that none of them can make
the program wait for ever, fill its memory, or end in another error than a sentence.
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

SMALL_FILE = 2**20  # bytes: what a description of a model or of a few settings has at most
LFS_POINTER = b"version https://git-lfs"  # what stands in a repository in the place of a large file
LARGE_FILE = 2**30  # bytes: what a log or a record has at most

# Below a folder whose name has one of these, orbax finds nothing of what it has written: it takes the path
# for a pattern, and leaves the checkpoint in pieces. Names that are not UTF-8 it cannot write at all.
_REFUSED = re.compile(r"[*?\[\]\\\x00-\x1f\x7f\ud800-\udfff]")


def user_path(name: str | os.PathLike[str]) -> "epath.Path":
    """The path that a user names; `~` is the home directory.

    Raises:
      UserError: an address of another kind, or one that needs a package which is not installed.
    """
    from etils import epath  # late: help and error messages do not need it

    scheme, separator, _ = os.fspath(name).partition("://")
    if not separator:
        return epath.Path(name).expanduser()
    if scheme not in ("gs", "s3"):
        raise UserError(f"{name} is neither a path nor the address of a bucket (gs://, s3://).")
    # epath takes TensorFlow's file systems where that is installed, and fsspec's elsewhere.
    if importlib.util.find_spec("tensorflow") is None:
        import fsspec

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UserError(f"{name}: {error}, as in pip install 'gemma_jax[data]'.") from error
        # What other processes and libraries write must be seen: a list of objects is not kept.
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of a bucket."""
    return "://" in os.fspath(path)


def children(folder: "epath.Path") -> "list[epath.Path]":
    """What is in a folder, by name; nothing if it is not there. A bucket has no empty folders.

    Raises:
      UserError: it is no folder, or may not be read.
    """
    try:
        if in_bucket(folder):
            return sorted(folder.iterdir()) if folder.exists() else []
        return [folder / name for name in sorted(os.listdir(folder))]  # epath leaves out names such as x~
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error}); check it and your access."
        ) from error


def check_writable_path(path: str | os.PathLike[str]) -> None:
    """Refuse a directory for checkpoints whose path, from the root on, orbax cannot handle.

    Raises:
      UserError: the path has a character of shell patterns, a control character, or is not UTF-8.
    """
    whole = os.fspath(path) if in_bucket(path) else os.path.abspath(path)
    if found := _REFUSED.search(whole):
        raise UserError(
            f"no checkpoint can be written below {whole!a}: {found[0]!a} in its path is not supported; "
            "give a directory without such a character."
        )


def open_regular(path: str | os.PathLike[str], most: float = float("inf")) -> BinaryIO:
    """Open a file of this machine for reading.

    Raises:
      UserError: there is none, it may not be read, it is no regular file (a pipe or a device would be waited
        for without end), it is a pointer of Git LFS, or it has more than `most` bytes.
    """
    try:
        # Without O_NONBLOCK, to open a pipe waits for somebody who writes into it.
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
    """The content of a file, on this machine or in a bucket.

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
    """The content of a text file.

    Args:
      path: of the file.
      most: bytes that it may have.
      errors: what is done where it is not UTF-8, as `bytes.decode` has it.

    Raises:
      UserError: as `read_bytes` does, or it is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode(errors=errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); copy or download it again.") from error


def parse_json(text: str, origin: str | os.PathLike[str]) -> Any:
    """What a text in JSON says. An object with the same key twice is refused, where Python takes the last.

    Args:
      text: the JSON.
      origin: where it is from, for messages.

    Raises:
      UserError: it is not JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            raise ValueError("an object has the same key twice")
        return data

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets
        raise UserError(f"{origin} is not valid JSON ({str(error)[:100]}); copy it again.") from error


def read_json(path: "str | os.PathLike[str]", most: int = SMALL_FILE) -> Any:
    """What a JSON file says.

    Raises:
      UserError: as `read_text` and `parse_json` do.
    """
    return parse_json(read_text(path, most), path)
