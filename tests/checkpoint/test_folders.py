"""A step is whole or not there, whenever a process was killed, on a disk and in a bucket."""

import itertools
from pathlib import Path

import pytest
from etils import epath

from gemma_jax.checkpoint import folders
from gemma_jax.checkpoint.folders import saved_steps
from tests.checkpoint.buckets_on_disk import BucketsOnDisk, buckets_on_disk

PARTS = ("params/0", "params/1", "run/data.json")


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketsOnDisk:
    return buckets_on_disk(tmp_path, monkeypatch)


def write(folder: epath.Path) -> None:
    """A step, in the order of `CheckpointStore.save`."""
    folders.begin(folder)
    for part in PARTS:
        path = folders.written_to(folder) / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(part)
    folders.finish(folder)


def whole(run: epath.Path) -> dict[int, bool]:
    steps = {step: run / "checkpoints" / str(step) for step in saved_steps(run)}
    return {step: all((folder / part).exists() for part in PARTS) for step, folder in steps.items()}


def names(folder: epath.Path) -> set[str]:
    return {child.name for child in folders.children(folder)}


@pytest.mark.parametrize("address", ["", "s3://bucket/run"])
def test_steps_come_and_go(address: str, buckets: BucketsOnDisk, tmp_path: Path) -> None:
    run = epath.Path(address or tmp_path / "run")
    steps = run / "checkpoints"
    for step in (1, 2, 30):
        write(steps / str(step))
        assert whole(run)[step]
    assert saved_steps(run) == [1, 2, 30]
    folders.rename(steps / "2", steps / "2.damaged")
    folders.remove(steps / "1")
    folders.remove_unfinished(steps)
    assert saved_steps(run) == [30] and names(steps) == {"2.damaged", "30"}
    assert (steps / "2.damaged" / PARTS[0]).read_text() == PARTS[0]


def test_a_kill_at_any_moment_leaves_whole_steps_and_what_the_next_start_removes(
    buckets: BucketsOnDisk,
) -> None:
    left = set()
    for action in (write, folders.remove):
        for changes in itertools.count():
            run = epath.Path(f"s3://bucket/{action.__name__}/{changes}")
            steps = run / "checkpoints"
            for step in (1,) if action is write else (1, 2):
                write(steps / str(step))
            buckets.changes_left = changes
            try:
                action(steps / "2")
                break
            except OSError:
                left.add((action, "2" in names(steps)))
            finally:
                buckets.changes_left = None
            still = {1: True} if action is write or changes else {1: True, 2: True}
            assert whole(run) == still  # what a reader sees
            folders.remove_unfinished(steps)
            assert whole(run) == still and names(steps) == set(map(str, still))
        assert whole(run) == ({1: True, 2: True} if action is write else {1: True})
    assert left == {(action, there) for action in (write, folders.remove) for there in (True, False)}
