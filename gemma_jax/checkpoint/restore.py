"""Reads checkpoints that were saved by this process's run or by any other run."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from gemma_jax.checkpoint.folders import STEPS_FOLDER, saved_steps
from gemma_jax.checkpoint.record import (
    RECORD_FILE,
    ArrayRecord,
    DamagedCheckpoint,
    RunRecord,
    check_files,
    fingerprints,
    first_line,
    run_record,
)
from gemma_jax.checkpoint.s3 import orbax_context
from gemma_jax.errors import UserError
from gemma_jax.memory import require_memory
from gemma_jax.model import ModelSpec
from gemma_jax.paths import user_path
from gemma_jax.sharding import Arrays, named_arrays, with_arrays
from gemma_jax.startup import any_process
from gemma_jax.weights import Dense, parameter_table
from gemma_jax.weights.quantized import from_bytes, to_bytes

Result = TypeVar("Result")


def step_folder(checkpoint: epath.PathLike) -> tuple[epath.Path, epath.Path]:
    """Returns the step folder that a path refers to, and the run directory that it belongs to.

    Args:
      checkpoint: A run directory, which stands for its newest step, or the folder of one step.

    Raises:
      UserError: The path does not exist, or no checkpoint has been saved there yet.
    """
    path = user_path(checkpoint)
    if not path.exists():
        raise UserError(
            f"there is no checkpoint {checkpoint!s}; give the directory of a run or of published weights, "
            "a name on the Hub, or random:PRESET."
        )
    if (path / RECORD_FILE).exists():
        return path, path.parent.parent
    steps = saved_steps(path)
    if not steps:
        raise UserError(f"{checkpoint!s} holds no checkpoint; train there first, or give another directory.")
    return path / STEPS_FOLDER / str(steps[-1]), path


def load_params(step_folder: epath.PathLike, record: RunRecord, spec: ModelSpec) -> nnx.State:
    """Load the parameters of a checkpoint with the kind, dtypes and shardings of the spec.

    If the checkpoint is dense and the spec is not, the arrays are packed one after the other.

    Raises:
      DamagedCheckpoint, UserError: See `load_arrays`.
    """
    require_memory(spec.params, "the model")
    if (
        record.quantization
        or spec.kind is Dense
        or record.arrays["params"].keys() == named_arrays(spec.params).keys()
    ):
        return load_arrays(step_folder, {"params": spec.params}, record)["params"]
    arrays: Arrays = {}
    for name, x in named_arrays(dataclasses.replace(spec, kind=Dense).params).items():
        loaded = load_arrays(step_folder, {"params": {name: x}}, record, whole=False)["params"][name]
        arrays |= _packed(spec, name, loaded)
    return with_arrays(spec.params, arrays)


def _packed(spec: ModelSpec, name: str, array: jax.Array) -> Arrays:
    """Packs a dense parameter, layer by layer if it has layers; frees the array."""

    def pack(array: jax.Array) -> Arrays:
        def of_layer(array: jax.Array) -> Arrays:
            return {key: to_bytes(x) for key, x in spec.pack(name, array).items()}

        return jax.lax.map(of_layer, array) if parameter_table(spec.config)[name].layers else of_layer(array)

    abstract = named_arrays(spec.params)
    out = {key: abstract[key].sharding for key in jax.eval_shape(pack, array)}
    packed: Arrays = jax.block_until_ready(jax.jit(pack, out_shardings=out)(array))
    array.delete()
    for key, x in packed.items():
        if x.dtype != abstract[key].dtype:
            packed[key] = jax.jit(from_bytes, out_shardings=out[key])(x)
    return packed


def load_arrays(
    step_folder: epath.PathLike, abstract: dict[str, Any], record: RunRecord, *, whole: bool = True
) -> dict[str, Any]:
    """Load trees of arrays from a checkpoint, each with the sharding and dtype of its abstract array.

    Args:
      step_folder: The checkpoint of one step.
      abstract: For each part, such as `params`, a tree of jax.ShapeDtypeStruct with shardings.
      record: The record of this checkpoint.
      whole: Whether each tree must have all arrays of its part.

    Raises:
      DamagedCheckpoint: An array is missing or differs from what was saved; the message names it if known.
      UserError: The checkpoint belongs to another model.
    """
    wanted = {part: named_arrays(tree) for part, tree in abstract.items()}
    saved = {}
    for part, arrays in wanted.items():
        if part not in record.arrays:
            raise UserError(f"the checkpoint {step_folder} holds no {part}; choose one that has it.")
        of_part = record.arrays[part]
        held = of_part if whole else {name: of_part[name] for name in arrays.keys() & of_part.keys()}
        _compare(arrays, held, step_folder)
        # Arrays are loaded in the dtypes of the checkpoint, and cast after their fingerprints are compared.
        dtypes = {name: jax.numpy.dtype(array.dtype) for name, array in record.arrays[part].items()}
        saved[part] = {
            name: jax.ShapeDtypeStruct(x.shape, dtypes[name], sharding=x.sharding)
            for name, x in arrays.items()
        }
    in_all_processes(step_folder, lambda: check_files(epath.Path(step_folder), record, wanted.keys()))
    context = orbax_context(step_folder)
    context.pytree.loading.partial_load = not whole
    with context:
        loaded = in_all_processes(step_folder, lambda: ocp.load_checkpointables(absolute(step_folder), saved))
    prints = jax.device_get(fingerprints(loaded))
    for part, arrays in wanted.items():
        for name, x in arrays.items():
            if prints[part][name] != record.arrays[part][name].fingerprint:
                raise DamagedCheckpoint(step_folder, f"{part}.{name} has changed")
            loaded[part][name] = loaded[part][name].astype(x.dtype)
    return {part: with_arrays(tree, loaded[part]) for part, tree in abstract.items()}


def check_readable(step_folder: epath.Path) -> None:
    """Read back a checkpoint that was just written, except the values of its arrays, which would be slow.

    Raises:
      DamagedCheckpoint: A file is missing, or orbax finds other arrays than those in the record.
    """
    record = run_record(step_folder)
    check_files(step_folder, record, record.arrays)
    for part, arrays in record.arrays.items():
        with orbax_context(step_folder):
            # metadata is None if orbax cannot read the header of an array; orbax logs that.
            found: dict[str, Any] = ocp.metadata(absolute(step_folder), part).metadata or {}
        read = {name: (tuple(array.shape), str(np.dtype(array.dtype))) for name, array in found.items()}
        if read != {name: (array.shape, array.dtype) for name, array in arrays.items()}:
            raise DamagedCheckpoint(step_folder, f"its {part} cannot be read back")


def in_all_processes(step_folder: epath.PathLike, read: Callable[[], Result]) -> Result:
    """Run `read` in every process; if it fails in any, raise in all, so that none hangs in a collective.

    Raises:
      DamagedCheckpoint: `read` failed in this process or in another.
    """
    problem = ""
    try:
        result = read()
    except DamagedCheckpoint as error:
        problem = error.reason
    except (OSError, ValueError, KeyError) as error:
        problem = first_line(error)
    if any_process(bool(problem)):
        raise DamagedCheckpoint(step_folder, problem or "another process could not read it")
    return result


def _compare(wanted: Arrays, saved: dict[str, ArrayRecord], origin: epath.PathLike) -> None:
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved or name not in wanted:
            where = "is missing from" if name not in saved else "is not part of the model but is in"
            raise UserError(
                f"{name} {where} the checkpoint {origin}; it belongs to another model or optimizer."
            )
        if tuple(wanted[name].shape) != saved[name].shape:
            raise UserError(
                f"{name} has shape {saved[name].shape} in the checkpoint {origin}, but "
                f"{tuple(wanted[name].shape)} in the model; it belongs to another model."
            )
        if jax.dtypes.canonicalize_dtype(saved[name].dtype) != saved[name].dtype:
            raise UserError(
                f"{name} is {saved[name].dtype} in the checkpoint {origin}; set JAX_ENABLE_X64=1 to read it."
            )


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute form of a path, which orbax requires; the address of a bucket is absolute already."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(path))
