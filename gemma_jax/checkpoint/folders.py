"""The folders of a run's checkpoints: which are complete, how one is completed, and how one is deleted.

RUN/checkpoints has a folder for each step. The name STEP.unfinished marks a step that is incomplete. On a
disk it is the name of the folder itself until a final rename. A bucket has no rename (every object would be
copied, one after the other), so there the folder has its final name from the start, and STEP.unfinished is an
object beside it that is written first and deleted last. Either way a single operation makes a checkpoint
complete, or incomplete again, and a process that is killed at any moment leaves only files that the next
start removes.
"""

import os

import fsspec
from etils import epath

from gemma_jax.paths import children, in_bucket

STEPS_FOLDER = "checkpoints"
UNFINISHED = ".unfinished"


def saved_steps(run_dir: epath.PathLike) -> list[int]:
    """The steps with a completed checkpoint, ascending. The contents are not verified; one may be damaged."""
    names = {child.name for child in children(epath.Path(run_dir) / STEPS_FOLDER)}
    return sorted(int(name) for name in names if _is_step(name) and f"{name}{UNFINISHED}" not in names)


def begin(folder: epath.Path) -> None:
    """Prepare for writing a step. Only the first process calls this, before any file of the step is written.

    Args:
      folder: The folder that the step will have when it is complete.
    """
    if in_bucket(folder):
        _unfinished(folder).write_text(f"{folder.name} is being written or deleted\n")


def written_to(folder: epath.Path) -> epath.Path:
    """The folder to write a step to; `finish` makes it available as `folder`."""
    return folder if in_bucket(folder) else _unfinished(folder)


def finish(folder: epath.Path) -> None:
    """Mark a step as complete once all its files are written."""
    if in_bucket(folder):
        _unfinished(folder).unlink()
    else:
        _unfinished(folder).rename(folder)


def remove(folder: epath.Path) -> None:
    """Delete a step. It is marked as incomplete before the first of its files is deleted."""
    if in_bucket(folder):
        begin(folder)
    else:
        folder.rename(_unfinished(folder))
    _remove_unfinished(_unfinished(folder))


def rename(folder: epath.Path, target: epath.Path) -> None:
    """Rename a step's folder. In a bucket, a kill in the middle of this leaves files under both names."""
    if not os.fspath(folder).startswith("s3://"):
        folder.rename(target)
        return
    # fsspec's own rename fails here: it also requests the folders, which do not exist as objects on S3.
    filesystem, path = fsspec.url_to_fs(os.fspath(folder))
    files = filesystem.find(path)
    filesystem.copy(files, [f"{target}{name.removeprefix(path)}" for name in files])
    folder.rmtree()


def remove_unfinished(steps_folder: epath.Path) -> None:
    """Delete every incomplete step."""
    for child in children(steps_folder):
        if UNFINISHED in child.name:
            _remove_unfinished(child)


def _remove_unfinished(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
        return
    step = path.parent / path.name.removesuffix(UNFINISHED)
    if _is_step(step.name) and step.exists():
        step.rmtree()
    path.unlink()


def _unfinished(folder: epath.Path) -> epath.Path:
    return folder.parent / f"{folder.name}{UNFINISHED}"


def _is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name
