"""Checkpoints of a run: parameters, optimizer state, position in the data, and the config.

Under RUN/checkpoints, a folder for each step (`folders` tells how it becomes whole): orbax's `params` and
`opt_state` hold arrays by their dotted names, run/data.json the record, which also tells what all the rest
must be. A folder that turned out to be damaged is kept as STEP.damaged.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from gemma_jax.checkpoint import folders
from gemma_jax.checkpoint.folders import STEPS_FOLDER, saved_steps
from gemma_jax.checkpoint.lock import LOCK_FILE, RunLock
from gemma_jax.checkpoint.record import (
    ArrayRecord,
    DamagedCheckpoint,
    RunRecord,
    fingerprints,
    first_line,
    run_record,
    write_record,
)
from gemma_jax.checkpoint.restore import absolute, in_all_processes, load_arrays
from gemma_jax.checkpoint.s3 import orbax_context
from gemma_jax.config import CheckpointConfig
from gemma_jax.errors import UserError
from gemma_jax.sharding import named_arrays
from gemma_jax.startup import wait_for_all

Tree = TypeVar("Tree")

# orbax's threads log the traceback of a full disk once for each file; `CheckpointStore.wait` raises it too.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))


def kept_steps(losses: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """Which of the steps that have a checkpoint are kept.

    Args:
      losses: for each of them, held-out loss if it was measured.
      config: `keep_last`, `keep_every` and `keep_best`; what any of them keeps is kept.
    """
    best = sorted((loss, step) for step, loss in losses.items() if loss is not None and np.isfinite(loss))
    return {
        *sorted(losses)[-config.keep_last :],
        # What a stop saved besides must not push out what a run without it would have.
        *sorted(step for step in losses if step % config.every == 0)[-config.keep_last :],
        *(step for step in losses if config.keep_every and step % config.keep_every == 0),
        *(step for _, step in best[: config.keep_best]),
    }


class CheckpointStore:
    """The checkpoints of the run that this process trains. `restore.py` reads those of any run.

    One at a time: it holds the run's lock, and removes what a killed process left unfinished. In a job of
    several processes each has a store and calls the same methods in the same order: all write and read their
    own arrays, and the first one alone does the rest.
    """

    def __init__(self, run_dir: epath.PathLike, config: CheckpointConfig, *, overwrite: bool = False) -> None:
        """Args:
        run_dir: made if it is not there.
        config: what to keep.
        overwrite: delete all that is in run_dir first.

        Raises:
          UserError: another process trains there, or the directory cannot be written.
        """
        self._run_dir, self._config = absolute(run_dir), config
        self.folder = self._run_dir / STEPS_FOLDER
        self._first = jax.process_index() == 0
        self._lock: RunLock | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._first:
                self._lock = RunLock(self._run_dir)
                if overwrite:
                    self._clear()
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and jax.process_count() > 1:
            # What is being written may never be whole: another process may be gone, and this one must end.
            return
        self.close()

    def _clear(self) -> None:
        if self.folder.exists():
            self.folder.rmtree()  # first: without them, what a kill leaves is no run
        for child in folders.children(self._run_dir):
            if child.name == LOCK_FILE:
                continue
            if child.is_dir():
                child.rmtree()
            else:
                child.unlink()
        self.folder.mkdir()

    def _loss(self, step: int) -> float | None:
        try:
            return run_record(self.folder / str(step)).held_out_loss
        except DamagedCheckpoint:  # told when it is needed
            return None

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        rows_seen: int,
        config: dict[str, Any],
        held_out_loss: float | None = None,
        history: dict[str, Any] | None = None,
    ) -> None:
        """Start writing a checkpoint; returns when the arrays have been copied off the devices.

        Waits for the checkpoint before it, if that is still being written.

        Args:
          step: optimizer steps done.
          params, opt_state: trees of arrays on the mesh.
          rows_seen: position in the data.
          config: the resolved config.
          held_out_loss: nats a token, for keep_best.
          history: more to be given back by `restore`, as JSON.

        Raises:
          UserError: this checkpoint or the one before it could not be written.
        """
        self.wait()
        arrays = {"params": named_arrays(params), "opt_state": named_arrays(opt_state)}
        about = {
            part: {name: ArrayRecord(tuple(x.shape), str(x.dtype), 0) for name, x in tree.items()}
            for part, tree in arrays.items()
        }
        record = RunRecord(step, rows_seen, config, held_out_loss, about, {}, history or {})
        prints = fingerprints(arrays)  # only started here: they are computed while the next steps run
        if jax.process_count() > 1:
            # orbax now compares paths between the processes by a collective of its own, and two programs with
            # collectives that run at once have been seen to mix them up (gloo, on CPU).
            jax.block_until_ready(prints)
        folder = self.folder / str(step)
        unfinished = folders.written_to(folder)
        try:
            if self._first:
                folders.begin(folder)
            with orbax_context(unfinished):
                response = ocp.save_checkpointables_async(unfinished, arrays)
        except OSError as error:
            raise self._not_written(error) from error

        def finish() -> None:
            response.result()
            if self._first:
                write_record(unfinished, record, jax.device_get(prints))
                folders.finish(folder)
            self._losses[step] = held_out_loss
            self._remove_old()

        self._writing = self._writer.submit(finish)

    def _remove_old(self) -> None:
        for step in self._losses.keys() - kept_steps(self._losses, self._config):
            if self._first:
                folders.remove(self.folder / str(step))
            del self._losses[step]

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, when all that was saved is on disk.

        Raises:
          UserError: as `wait` does.
        """
        self.wait()
        return sorted(self._losses)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, the latest first: a kill leaves a run that did not go back.

        Raises:
          UserError: as `wait` does.
        """
        for later in reversed([saved for saved in self.steps() if saved > step]):
            if self._first:
                folders.remove(self.folder / str(later))
            del self._losses[later]
        wait_for_all("later checkpoints are removed")

    def restore(self, params: Tree, opt_state: Any) -> tuple[Tree, Any, RunRecord] | None:
        """The newest whole checkpoint, on the mesh of the abstract trees; None if nothing has been saved.

        Damaged ones that are newer are told on standard error and renamed to STEP.damaged: the run will come
        to their steps again.

        Raises:
          UserError: there are checkpoints but none is whole, or they belong to another model.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(saved_steps(self._run_dir)):
            folder = self.folder / str(step)
            try:
                record = in_all_processes(folder, functools.partial(run_record, folder))
                loaded = load_arrays(folder, {"params": params, "opt_state": opt_state}, record)
            except DamagedCheckpoint as error:
                damaged.append((step, error.reason))
                continue
            for bad_step, reason in damaged:
                self._set_aside(bad_step, reason, step)
            return loaded["params"], loaded["opt_state"], record
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
        names = {child.name for child in folders.children(self.folder)}
        number = 1
        while (name := f"{step}.damaged" + (f"-{number}" if number > 1 else "")) in names:
            number += 1
        folders.rename(self.folder / str(step), self.folder / name)
        told = f"the checkpoint of step {step} is damaged ({reason}): it is kept as {self.folder / name}"
        print(f"{told}, and the run goes on from step {instead}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Return when everything that was saved is on disk.

        Raises:
          UserError: the disk is full or cannot be written; checkpoints from before are as they were.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, ValueError) as error:
            # tensorstore's errors are ValueError, and their message begins with a status.
            if isinstance(error, ValueError) and not re.match("[A-Z_]+: ", str(error)):
                raise
            if self._first and not folders.in_bucket(self.folder):  # on a disk it takes room that is short
                with contextlib.suppress(OSError):  # another thread may still be writing there
                    folders.remove_unfinished(self.folder)
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> UserError:
        full = os.strerror(errno.ENOSPC)  # tensorstore's own message names a temporary file, twice
        reason = full if full in str(error) else first_line(error)
        return UserError(
            f"cannot write a checkpoint into {self.folder} ({reason}); free some space or "
            "check the disk, then give the same command again."
        )

    def close(self) -> None:
        """Wait, and let other processes train in this run.

        Raises:
          UserError: as `wait` does.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._lock is not None:
                self._lock.release()
