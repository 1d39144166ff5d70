"""Saves and restores the checkpoints of a run: parts of its state, its position in the data, and its config.

RUN/checkpoints has a folder for each step (`folders` describes how one is completed). In it, each part of the
state, such as `params` and `opt_state`, is an orbax folder that holds the arrays by their dotted names.
run/data.json is the record, which also describes all the other files and arrays. A folder that is found to be
damaged is kept as STEP.damaged.
"""

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from gemma_jax.checkpoint import folders
from gemma_jax.checkpoint.folders import STEPS_FOLDER, saved_steps
from gemma_jax.checkpoint.lock import RunLock
from gemma_jax.checkpoint.record import (
    DamagedCheckpoint,
    RunRecord,
    array_records,
    fingerprints,
    run_record,
    storage_failure,
    write_record,
)
from gemma_jax.checkpoint.restore import absolute, check_readable, in_all_processes, load_arrays
from gemma_jax.checkpoint.s3 import orbax_context
from gemma_jax.config import CheckpointConfig
from gemma_jax.errors import UserError
from gemma_jax.paths import check_writable_path, children, in_bucket
from gemma_jax.sharding import named_arrays
from gemma_jax.startup import wait_for_all

Parts = dict[str, Any]  # trees of arrays

# On a full disk, orbax's threads log a traceback for each file; `CheckpointStore.wait` raises the error.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))


def kept_steps(losses: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """Returns the steps whose checkpoints are kept.

    Args:
      losses: For each step that has a checkpoint, the metric that `keep_best_by` names, None if not measured.
      config: Its `keep_last`, `keep_every` and `keep_best` apply; a step that any of them keeps is kept.
    """
    best = sorted((loss, step) for step, loss in losses.items() if loss is not None and np.isfinite(loss))
    return {
        *sorted(losses)[-config.keep_last :],
        # An extra checkpoint, saved at a stop, must not displace one that an unstopped run would keep.
        *sorted(step for step in losses if step % config.every == 0)[-config.keep_last :],
        *(step for step in losses if config.keep_every and step % config.keep_every == 0),
        *(step for _, step in best[: config.keep_best]),
    }


class CheckpointStore:
    """The checkpoints of the run that this process trains. `restore.py` reads those of any run.

    A run has only one store at a time, which holds the run's lock and removes what a killed process left
    unfinished. In a job of several processes, each has a store and calls the same methods in the same order:
    every process writes and reads its own arrays, and only the first does everything else.
    """

    def __init__(self, run_dir: epath.PathLike, config: CheckpointConfig, *, overwrite: bool = False) -> None:
        """Take the run's lock and remove unfinished checkpoints.

        Args:
          run_dir: The run directory; created if it does not exist.
          config: Which checkpoints to keep.
          overwrite: Whether to delete the existing checkpoints first.

        Raises:
          UserError: Another process is training there, or the directory cannot be written.
        """
        check_writable_path(run_dir)
        self._run_dir, self._config = absolute(run_dir), config
        self.folder = self._run_dir / STEPS_FOLDER
        self._first = jax.process_index() == 0
        self._lock: RunLock | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._first:
                self._lock = RunLock(self._run_dir)
                if overwrite and self.folder.exists():  # a bucket has no empty folders
                    self.folder.rmtree()
                    self.folder.mkdir()
                folders.remove_unfinished(self.folder)
        except OSError as error:
            raise UserError(f"cannot write into {run_dir}: {error}; give another --run_dir.") from error
        wait_for_all("the run directory is in order")
        self._losses: dict[int, float | None] = {}
        for step in saved_steps(run_dir):
            self._losses[step] = self._loss(step) if config.keep_best else None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and jax.process_count() > 1:
            # The checkpoint being written may never complete: another process may be gone. This one must end.
            return
        self.close()

    def _loss(self, step: int) -> float | None:
        try:
            return self._best_by(run_record(self.folder / str(step)))
        except DamagedCheckpoint:  # reported when the checkpoint is needed
            return None

    def _best_by(self, record: RunRecord) -> float | None:
        numbers = {name: x for found in record.evaluations.values() for name, x in found.items()}
        return numbers.get(self._config.keep_best_by)

    def save(self, record: RunRecord, parts: Parts) -> None:
        """Start writing a checkpoint, and return when the arrays have been copied off the devices.

        Waits for the previous checkpoint first, if that is still being written.

        Args:
          record: The record of the run; its `arrays` and `files` are filled in here.
          parts: Trees of arrays on the mesh, by name of the part.

        Raises:
          UserError: This checkpoint or the previous one could not be written.
        """
        self.wait()
        arrays = {part: named_arrays(tree) for part, tree in parts.items()}
        prints = fingerprints(arrays)  # dispatched only: they are computed while the next steps run
        if jax.process_count() > 1:
            # orbax next compares paths between the processes with a collective of its own. Two programs whose
            # collectives ran at once have been seen to mix them up (gloo, on CPU).
            jax.block_until_ready(prints)
        folder = self.folder / str(record.step)
        unfinished = folders.written_to(folder)
        try:
            if self._first:
                folders.begin(folder)
            with orbax_context(unfinished):
                response = ocp.save_checkpointables_async(unfinished, arrays)
        except OSError as error:
            raise self._not_written(error) from error
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

        def finish() -> None:
            response.result()
            if self._first:
                saved = array_records(shapes, jax.device_get(prints))
                write_record(unfinished, dataclasses.replace(record, arrays=saved))
                check_readable(unfinished)
                folders.finish(folder)
            self._losses[record.step] = self._best_by(record)
            self._remove_old()

        self._writing = self._writer.submit(finish)

    def _remove_old(self) -> None:
        for step in self._losses.keys() - kept_steps(self._losses, self._config):
            if self._first:
                folders.remove(self.folder / str(step))
            del self._losses[step]

    def steps(self) -> list[int]:
        """Wait until everything is on disk, and return the steps that have a checkpoint, ascending.

        Raises:
          UserError: See `wait`.
        """
        self.wait()
        return sorted(self._losses)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps.

        The latest is removed first, so a kill in between leaves a valid run that has not fully rolled back.

        Raises:
          UserError: See `wait`.
        """
        for later in reversed([saved for saved in self.steps() if saved > step]):
            if self._first:
                folders.remove(self.folder / str(later))
            del self._losses[later]
        wait_for_all("later checkpoints are removed")

    def restore(self, abstract: Parts, optional: Collection[str] = ()) -> tuple[Parts, RunRecord] | None:
        """Load the newest intact checkpoint; returns None if nothing has been saved.

        Newer checkpoints that are damaged are reported on standard error and renamed to STEP.damaged, because
        the run will reach their steps again.

        Args:
          abstract: For each part, a tree of jax.ShapeDtypeStruct with the shardings of the loaded arrays.
          optional: Parts that are skipped if the checkpoint does not hold them.

        Raises:
          UserError: There are checkpoints but none is intact, or they belong to another model.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(saved_steps(self._run_dir)):
            folder = self.folder / str(step)
            try:
                record = in_all_processes(folder, functools.partial(run_record, folder))
                wanted = {
                    part: tree
                    for part, tree in abstract.items()
                    if part in record.arrays or part not in optional
                }
                loaded = load_arrays(folder, wanted, record)
            except DamagedCheckpoint as error:
                damaged.append((step, error.reason))
                continue
            for bad_step, reason in damaged:
                self._set_aside(bad_step, reason, step)
            return loaded, record
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole (step {damaged[0][0]}: {damaged[0][1]}); "
                "restore one from a backup, or start again with --existing_run overwrite."
            )
        return None

    def _set_aside(self, step: int, reason: str, instead: int) -> None:
        del self._losses[step]
        if not self._first:
            return
        names = {child.name for child in children(self.folder)}
        number = 1
        while (name := f"{step}.damaged" + (f"-{number}" if number > 1 else "")) in names:
            number += 1
        folders.rename(self.folder / str(step), self.folder / name)
        found = f"the checkpoint of step {step} is damaged ({reason}): it was renamed to {self.folder / name}"
        print(f"{found}, and the run resumes from step {instead}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Wait until everything that was saved is on disk.

        Raises:
          UserError: The disk is full or cannot be written; earlier checkpoints are unchanged.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, ValueError, DamagedCheckpoint) as error:
            if not isinstance(error, DamagedCheckpoint) and not storage_failure(error):
                raise
            if self._first and not in_bucket(self.folder):  # on a disk it takes up scarce space
                with contextlib.suppress(OSError):  # another thread may still be writing there
                    folders.remove_unfinished(self.folder)
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> UserError:
        reason = error.reason if isinstance(error, DamagedCheckpoint) else storage_failure(error)
        return UserError(
            f"cannot write a checkpoint into {self.folder} ({reason}); free some space or "
            "check the disk, then give the same command again."
        )

    def close(self) -> None:
        """Wait for the last checkpoint, and release the lock so that other processes can train in this run.

        Raises:
          UserError: See `wait`.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._lock is not None:
                self._lock.release()
