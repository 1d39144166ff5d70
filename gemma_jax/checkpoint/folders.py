"""The folders of a run's checkpoints: which are whole, how one becomes whole, and how one is deleted.

RUN/checkpoints has a folder for each step, and what is not whole is named STEP.unfinished. On a disk that is
the folder itself, which is renamed at last. A bucket has no rename, only copies of every object, one after
the other; so there the folder has its name from the start, and STEP.unfinished is an object beside it that is
written first and deleted last. Either way one operation makes a checkpoint, or ends one, and a kill at any
moment leaves only what the next start removes.
"""

import os

import fsspec
from etils import epath

from gemma_jax.paths import children, in_bucket

STEPS_FOLDER = "checkpoints"
UNFINISHED = ".unfinished"


def saved_steps(run_dir: epath.PathLike) -> list[int]:
    """Steps that have a checkpoint, whole or damaged, ascending."""
    names = {child.name for child in children(epath.Path(run_dir) / STEPS_FOLDER)}
    return sorted(int(name) for name in names if _is_step(name) and f"{name}{UNFINISHED}" not in names)


def begin(folder: epath.Path) -> None:
    """To be called before anything of a step is written, by the first process alone.

    Args:
      folder: that the step will have when it is whole.
    """
    if in_bucket(folder):
        _unfinished(folder).write_text(f"{folder.name} is being written or deleted\n")


def written_to(folder: epath.Path) -> epath.Path:
    """Where a step is written that will be in `folder` when it is whole."""
    return folder if in_bucket(folder) else _unfinished(folder)


def finish(folder: epath.Path) -> None:
    """Make a step whole, of which all is written."""
    if in_bucket(folder):
        _unfinished(folder).unlink()
    else:
        _unfinished(folder).rename(folder)


def remove(folder: epath.Path) -> None:
    """Delete a step. It ends at once, before the first of its files."""
    if in_bucket(folder):
        begin(folder)
    else:
        folder.rename(_unfinished(folder))
    _remove_unfinished(_unfinished(folder))


def rename(folder: epath.Path, target: epath.Path) -> None:
    """Give a step's folder another name. A kill in the middle of that leaves both in a bucket."""
    if not os.fspath(folder).startswith("s3://"):
        folder.rename(target)
        return
    # fsspec's own renaming asks S3 for the folders too, which are no objects there, and fails.
    filesystem, path = fsspec.url_to_fs(os.fspath(folder))
    files = filesystem.find(path)
    filesystem.copy(files, [f"{target}{name.removeprefix(path)}" for name in files])
    folder.rmtree()


def remove_unfinished(steps_folder: epath.Path) -> None:
    """Delete what is not whole."""
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
