"""What a checkpoint says of itself, and whether it still is what was saved.

Three checks, each of what the others cannot see: a digest of the record; of orbax's files, sizes and the
beginnings, before orbax reads them, because it answers damage in its small files with pages of log; and of
the values, once they are on the devices, fingerprints.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from gemma_jax.errors import UserError
from gemma_jax.paths import LARGE_FILE, children, in_bucket, open_regular, read_json

RECORD_FILE = "run/data.json"
FORMAT = 2  # of runs; 1 had no number
CHECKED_BYTES = 2**20


class DamagedCheckpoint(UserError):
    """A checkpoint that is not, or no longer, what was saved."""

    def __init__(self, folder: epath.PathLike, reason: str) -> None:
        super().__init__(f"the checkpoint {folder} is damaged: {reason}; choose another step.")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """What is known of an array that was saved."""

    shape: tuple[int, ...]
    dtype: str
    fingerprint: int  # see `fingerprints`


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a checkpoint: the position of its run, and what its arrays and files must be."""

    step: int
    rows_seen: int  # rows of the data that were consumed: the whole position in the data
    config: dict[str, Any]  # the resolved config, from gemma_jax.config.to_dict
    evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By evaluator, where there was one at this step: its numbers by name."""
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the run remembers of its losses, as JSON."""
    arrays: dict[str, dict[str, ArrayRecord]] = dataclasses.field(default_factory=dict)
    """By part, such as `params`, and name. These and the files are known when all is written."""
    files: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Of orbax: size in bytes, and CRC-32 of the first CHECKED_BYTES."""
    format: int = FORMAT


def _fingerprint(x: jax.Array) -> jax.Array:
    bits = x[None] if x.ndim == 0 else x
    bits = bits.view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # Mixed with the place, so that swapped values show, by the last steps of MurmurHash3 (fmix32). Each is
    # invertible, so a change of one word always shows.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    # A sum modulo 2**32 is exact in any order, so the number does not depend on the mesh.
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


@jax.jit
def fingerprints(arrays: Any) -> Any:
    """A 32-bit checksum of every array of a tree, computed on its own devices: a tree of uint32 scalars.

    orbax writes zarr3 with a checksum of each index but none of the values, so that a flipped bit on
    disk would be loaded without a word.
    """
    return jax.tree.map(_fingerprint, arrays)


def array_records(shapes: Any, prints: Any) -> dict[str, dict[str, ArrayRecord]]:
    """The records of arrays, from their abstract values and fingerprints by part and name."""
    return {
        part: {
            name: ArrayRecord(tuple(x.shape), str(x.dtype), int(prints[part][name]))
            for name, x in tree.items()
        }
        for part, tree in shapes.items()
    }


def _checksums(folder: epath.Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and CRC-32 of the first CHECKED_BYTES of every file in a folder and below, by path."""
    sums: dict[str, tuple[int, int]] = {}
    for path in children(folder):
        if path.is_dir():
            sums |= {f"{path.name}/{name}": values for name, values in _checksums(path).items()}
        else:
            with path.open("rb") if in_bucket(path) else open_regular(path) as file:
                crc = zlib.crc32(file.read(CHECKED_BYTES))
            sums[path.name] = (path.stat().length, crc)
    return sums


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_record(folder: epath.Path, record: RunRecord) -> None:
    """Write the record of a checkpoint whose other files are all there, and with it what those are."""
    fields = dataclasses.asdict(dataclasses.replace(record, files=_checksums(folder)))
    path = folder / RECORD_FILE
    path.parent.mkdir()
    path.write_text(json.dumps({"record": fields, "sha256": _digest(fields)}))


def run_record(step_folder: epath.PathLike) -> RunRecord:
    """What the checkpoint in a step's folder says of itself.

    Raises:
      DamagedCheckpoint: the folder holds no checkpoint of gemma_jax, or its record is damaged.
      UserError: the checkpoint is of another format.
    """
    path = epath.Path(step_folder) / RECORD_FILE
    try:
        content = read_json(path, LARGE_FILE)
    except UserError as error:
        raise DamagedCheckpoint(step_folder, str(error).rstrip(".")) from error
    try:
        fields = content["record"]
        if _digest(fields) != content["sha256"]:
            raise ValueError("its digest is another")
        if (format := fields.get("format", 1)) != FORMAT:
            raise UserError(
                f"the checkpoint {step_folder} has format {format} of runs, but this version of gemma_jax "
                f"reads {FORMAT}; use the version that wrote it, or begin a new run."
            )
        arrays = {
            part: {name: _array_record(**values) for name, values in tree.items()}
            for part, tree in fields["arrays"].items()
        }
        files = {name: tuple(sums) for name, sums in fields["files"].items()}
        record = RunRecord(**{**fields, "arrays": arrays, "files": files})
        if type(record.step) is not int or type(record.rows_seen) is not int:
            raise ValueError("its step is no number")
        return record
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(step_folder, f"{RECORD_FILE} is not whole ({first_line(error)})") from error


def _array_record(shape: list[int], dtype: str, fingerprint: int) -> ArrayRecord:
    jax.dtypes.canonicalize_dtype(dtype)  # raises TypeError for what jax has no arrays of
    return ArrayRecord(tuple(shape), dtype, fingerprint)


def check_files(folder: epath.Path, record: RunRecord, parts: Collection[str]) -> None:
    """Check the files that reading these parts needs.

    Raises:
      DamagedCheckpoint: one of them is missing or has changed; it is named.
    """
    try:
        now = _checksums(folder)
    except OSError as error:
        raise DamagedCheckpoint(folder, first_line(error)) from error
    for name, sums in record.files.items():
        part, _, within = name.partition("/")
        if now.get(name) != sums and (part in parts or not within):
            what = "has changed" if name in now else "is missing"
            raise DamagedCheckpoint(folder, f"{name} {what}")


def storage_failure(error: Exception) -> str:
    """Why a disk or bucket failed, for a sentence; empty where an exception does not say that."""
    # tensorstore raises ValueErrors that begin with a status.
    if not isinstance(error, OSError) and not re.match("[A-Z_]+: ", str(error)):
        return ""
    # What the system says is enough: tensorstore's own message names a temporary file, twice.
    reasons = (
        os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)
    )
    return next((reason for reason in reasons if reason in str(error)), first_line(error)[:200])


def first_line(error: Exception) -> str:
    """The beginning of a message, for a sentence: orbax's go on for pages."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Leave out what tensorstore prints after an error of orbax's: its other answers find nobody waiting.

    They come late, so after an error this stays so until the process ends.
    """
    shown = sys.unraisablehook

    def show(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            shown(unraisable)

    sys.unraisablehook = show
    yield
    sys.unraisablehook = shown
