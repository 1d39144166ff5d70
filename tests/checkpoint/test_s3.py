"""Checkpoints on S3 are as safe as on a disk. tests/commands/test_run_on_s3.py has the real clients."""

import itertools
from pathlib import Path

import pytest
from etils import epath

from gemma_jax.checkpoint.folders import saved_steps
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import CheckpointConfig
from gemma_jax.errors import UserError
from tests.checkpoint.buckets_on_disk import BucketsOnDisk, buckets_on_disk
from tests.checkpoint.states import PARTS, position, wait_for_writers


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketsOnDisk:
    return buckets_on_disk(tmp_path, monkeypatch)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_save_that_ends_anywhere_leaves_the_step_before(buckets: BucketsOnDisk, scheme: str) -> None:
    """The next start must not even find damage."""
    config = CheckpointConfig(keep_last=1)
    ended = 0
    for changes in itertools.count():
        run = epath.Path(f"{scheme}://bucket/{changes}")
        with CheckpointStore(run, config) as store:
            store.save(position(1), PARTS)
        store = CheckpointStore(run, config)
        buckets.changes_left = changes
        try:
            store.save(position(2), PARTS)
            store.close()
        except UserError:
            ended += 1
            wait_for_writers()
        left, buckets.changes_left = buckets.changes_left, None
        steps = saved_steps(run)
        assert steps and set(steps) <= {1, 2}
        with CheckpointStore(run, config) as store:
            restored = store.restore(PARTS)
        assert restored is not None and restored[1].step == steps[-1]
        assert {child.name for child in (run / "checkpoints").iterdir()} == set(map(str, steps))
        if left:
            break
    assert ended > 10
