"""The record of a checkpoint, and the checks that the checkpoint is still what was saved.

There are three checks, and each finds damage that the others miss: a digest protects the record; the size and
the first bytes of each of orbax's files are compared before orbax reads them, because orbax reports damage in
its small files with pages of log; and the array values are compared by fingerprint once they are on the
devices.
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
FORMAT = 2  # version of the run format; records of version 1 have no such field
CHECKED_BYTES = 2**20


class DamagedCheckpoint(UserError):
    """Raised when a folder holds no valid checkpoint or its contents differ from what was saved."""

    def __init__(self, folder: epath.PathLike, reason: str) -> None:
        super().__init__(f"the checkpoint {folder} is damaged: {reason}; choose another step.")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """The recorded properties of a saved array."""

    shape: tuple[int, ...]
    dtype: str
    fingerprint: int  # see `fingerprints`


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a checkpoint: the position of the run, and the arrays and files that were saved."""

    step: int
    rows_seen: int  # rows of data consumed so far; this alone is the position in the data
    config: dict[str, Any]  # the resolved config, as returned by gemma_jax.config.to_dict
    evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Results of the evaluators that ran at this step: for each evaluator, its metrics by name."""
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The loss history that the run keeps, as JSON."""
    arrays: dict[str, dict[str, ArrayRecord]] = dataclasses.field(default_factory=dict)
    """By part, such as `params`, then by name. Like `files`, filled in when everything is written."""
    files: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """By path of each file of orbax: its size in bytes and the CRC-32 of its first CHECKED_BYTES."""
    quantization: str = ""
    """The kind of the weights, as `weights.Quantization.parse` reads it; empty if they are dense."""
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For a run that trains adapters: the checkpoint below them, what identifies its weights, the adapters'
    scale, and the ids of the tokens whose embedding they train."""
    end_tokens: tuple[int, ...] = ()
    """The ids that end an answer, where training has taught the model some."""
    format: int = FORMAT


def _fingerprint(x: jax.Array) -> jax.Array:
    bits = x[None] if x.ndim == 0 else x
    bits = bits.view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # Each word is mixed with its position, so that swapped values are detected, by the final steps of
    # MurmurHash3 (fmix32). Each step is invertible, so a change of a single word is always detected.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    # A sum modulo 2**32 is exact in any order, so the fingerprint does not depend on the mesh.
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


@jax.jit
def fingerprints(arrays: Any) -> Any:
    """Returns a 32-bit checksum of every array in a tree, computed on the array's devices, as uint32 scalars.

    orbax writes zarr3 with a checksum of each index but none of the values, so a flipped bit on disk would
    otherwise be loaded without an error.
    """
    return jax.tree.map(_fingerprint, arrays)


def array_records(shapes: Any, prints: Any) -> dict[str, dict[str, ArrayRecord]]:
    """Builds the records of arrays from their shapes, dtypes and fingerprints, all by part and name."""
    return {
        part: {
            name: ArrayRecord(tuple(x.shape), str(x.dtype), int(prints[part][name]))
            for name, x in tree.items()
        }
        for part, tree in shapes.items()
    }


def _checksums(folder: epath.Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and CRC-32 of the first CHECKED_BYTES of each file below a folder, by relative path."""
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
    """Write the record of a checkpoint, with the checksums of its other files, which must all exist."""
    fields = dataclasses.asdict(dataclasses.replace(record, files=_checksums(folder)))
    path = folder / RECORD_FILE
    path.parent.mkdir()
    path.write_text(json.dumps({"record": fields, "sha256": _digest(fields)}))


def run_record(step_folder: epath.PathLike) -> RunRecord:
    """Read and verify the record of the checkpoint in a step's folder.

    Raises:
      DamagedCheckpoint: The folder holds no checkpoint of gemma_jax, or its record is damaged.
      UserError: The checkpoint has another format.
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
    jax.dtypes.canonicalize_dtype(dtype)  # raises TypeError for a dtype that jax does not support
    return ArrayRecord(tuple(shape), dtype, fingerprint)


def check_files(folder: epath.Path, record: RunRecord, parts: Collection[str]) -> None:
    """Check the files that are needed to read the given parts.

    Raises:
      DamagedCheckpoint: A file is missing or has changed; the message names it.
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
    """The reason of a disk or bucket failure, for use in a message; empty if the error is of another kind."""
    # tensorstore raises ValueErrors that begin with a status.
    if not isinstance(error, OSError) and not re.match("[A-Z_]+: ", str(error)):
        return ""
    # The system's error text is enough: tensorstore's own message names a temporary file, twice.
    reasons = map(os.strerror, (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO))
    return next((reason for reason in reasons if reason in str(error)), first_line(error)[:200])


def first_line(error: Exception) -> str:
    """The first line of an error's message, for use in a message: orbax's errors are pages long."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Suppress the "Event loop is closed" reports that follow an error in orbax.

    tensorstore's remaining results then arrive after the event loop that awaits them has closed. They arrive
    late, so after an error the suppression stays until the process ends.
    """
    shown = sys.unraisablehook

    def show(unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            shown(unraisable)

    sys.unraisablehook = show
    yield
    sys.unraisablehook = shown
