"""Checkpoints of a run: parameters, optimizer state, position in the data, and the config.

On disk, under RUN/checkpoints, a folder for each step, written by orbax under a temporary name and
renamed when whole: `params` and `opt_state` hold arrays by their dotted names, `run` a JSON record.
"""

import dataclasses
import json
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from gemma_jax.config import CheckpointConfig
from gemma_jax.errors import UserError
from gemma_jax.sharding import Arrays, named_arrays, with_arrays

Tree = TypeVar("Tree")

STEPS_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says of itself besides its arrays."""

    step: int
    rows_seen: int  # rows of the data that were consumed: the whole position in the data
    config: dict[str, Any]  # the resolved config, as gemma_jax.config.to_dict gives it
    fingerprints: dict[str, dict[str, int]]  # of the arrays of params and opt_state


def _fingerprint(x: jax.Array) -> jax.Array:
    bits = x[None] if x.ndim == 0 else x
    bits = bits.view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # Odd multipliers that differ by place, so that swapped values show too. Sums modulo 2**32 are exact
    # in any order, so the number does not depend on the mesh.
    return jnp.sum(bits * (place * jnp.uint32(0x9E3779B0) | 1), dtype=jnp.uint32)


_fingerprint_all = jax.jit(lambda arrays: jax.tree.map(_fingerprint, arrays))


def fingerprints(arrays: Arrays) -> dict[str, int]:
    """A 32-bit checksum of every array, computed where the array lies.

    orbax writes zarr3 with a checksum of each index but none of the values, so that a flipped bit on
    disk would be loaded without a word.
    """
    return {name: int(value) for name, value in jax.device_get(_fingerprint_all(arrays)).items()}


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="run")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def run_record(step_folder: epath.PathLike) -> RunRecord:
    """What the checkpoint in a step's folder says of itself.

    Raises:
      UserError: the folder holds no checkpoint of gemma_jax, or its record is damaged.
    """
    path = epath.Path(step_folder) / "run" / "data.json"
    try:
        record = RunRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{step_folder} is not a whole checkpoint of gemma_jax ({error}); choose another step."
        ) from error
    return record


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_dir: epath.PathLike, config: CheckpointConfig) -> None:
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=config.keep_best
                )
            )
        self.folder = epath.Path(run_dir) / STEPS_FOLDER
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            context=_context(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        rows_seen: int,
        config: dict[str, Any],
        held_out_loss: float | None = None,
    ) -> None:
        """Start writing a checkpoint; returns when the arrays have been copied off the devices.

        Args:
          step: optimizer steps done.
          params, opt_state: trees of arrays on the mesh.
          rows_seen: position in the data.
          config: the resolved config.
          held_out_loss: nats a token, for keep_best.
        """
        arrays = {"params": named_arrays(params), "opt_state": named_arrays(opt_state)}
        record = RunRecord(
            step, rows_seen, config, {name: fingerprints(tree) for name, tree in arrays.items()}
        )
        metrics = None if held_out_loss is None else {"loss": held_out_loss}
        self._orbax.save_checkpointables_async(
            step, {**arrays, "run": dataclasses.asdict(record)}, metrics=metrics, overwrite=True
        )

    def restore(self, step: int, params: Tree, opt_state: Any) -> tuple[Tree, Any, RunRecord]:
        """The checkpoint of a step, on the mesh of the abstract trees that are given.

        Raises:
          UserError: the checkpoint is damaged or belongs to another model.
        """
        folder = self.folder / str(step)
        record = run_record(folder)
        loaded = load_arrays(folder, {"params": params, "opt_state": opt_state}, record)
        return loaded["params"], loaded["opt_state"], record

    def wait(self) -> None:
        """Return when everything that was saved is on disk.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        try:
            self._orbax.wait()
        except OSError as error:
            raise UserError(f"cannot write a checkpoint into {self.folder}: {error}.") from error

    def close(self) -> None:
        """Wait, and end orbax's threads."""
        self.wait()
        self._orbax.close()


def load_arrays(step_folder: epath.PathLike, abstract: dict[str, Any], record: RunRecord) -> dict[str, Any]:
    """Trees of arrays from a checkpoint, each array placed as its abstract one says.

    Args:
      step_folder: the checkpoint of one step.
      abstract: `params` and perhaps `opt_state`: trees of jax.ShapeDtypeStruct with shardings.
      record: of this checkpoint.

    Raises:
      UserError: an array is missing, has another shape or was damaged; the array is named.
    """
    wanted = {part: named_arrays(tree) for part, tree in abstract.items()}
    with _context():
        try:
            on_disk = ocp.checkpointables_metadata(step_folder).metadata
            for part, arrays in wanted.items():
                _compare(arrays, on_disk[part], step_folder)
            loaded = ocp.load_checkpointables(step_folder, wanted)
        except (ValueError, OSError, KeyError, TypeError, ocp.errors.InvalidLayoutError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"the checkpoint {step_folder} cannot be read ({first}); choose another step."
            ) from error
    for part, arrays in loaded.items():
        if any(arrays[name].dtype != on_disk[part][name].dtype for name in arrays):
            continue  # cast while loading: the bits are not those that were saved
        for name, value in fingerprints(arrays).items():
            if value != record.fingerprints[part][name]:
                raise UserError(
                    f"the checkpoint {step_folder} is damaged: {name} has changed; choose another step."
                )
    return {part: with_arrays(tree, loaded[part]) for part, tree in abstract.items()}


def _compare(wanted: Arrays, on_disk: Arrays, origin: epath.PathLike) -> None:
    for name in sorted(wanted.keys() | on_disk.keys()):
        if name not in on_disk or name not in wanted:
            where = "is missing from" if name not in on_disk else "is not part of the model but is in"
            raise UserError(
                f"{name} {where} the checkpoint {origin}; it belongs to another model or optimizer."
            )
        if tuple(wanted[name].shape) != tuple(on_disk[name].shape):
            raise UserError(
                f"{name} has shape {tuple(on_disk[name].shape)} in the checkpoint {origin}, but "
                f"{tuple(wanted[name].shape)} in the model; it belongs to another model."
            )


def step_folder(checkpoint: epath.PathLike) -> tuple[epath.Path, epath.Path]:
    """The folder of the step that a path means, and the run directory that it belongs to.

    Args:
      checkpoint: a run directory (its newest step is meant) or the folder of one step.

    Raises:
      UserError: nothing there, or nothing saved there yet.
    """
    path = epath.Path(checkpoint).expanduser()
    if not path.exists():
        raise UserError(
            f"there is no checkpoint {checkpoint!s}; give a run directory, a step of one, or random:PRESET."
        )
    if (path / "run" / "data.json").exists():
        return path, path.parent.parent
    folder = path / STEPS_FOLDER
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()] if folder.exists() else []
    if not steps:
        raise UserError(f"{checkpoint!s} holds no checkpoint; train there first, or give another directory.")
    return folder / str(max(steps)), path
