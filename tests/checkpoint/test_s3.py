"""Checkpoints on S3 are as safe as on a disk. tests/commands/test_run_on_s3.py has the real clients."""

import itertools
from pathlib import Path

import pytest
from etils import epath

from gemma_jax.checkpoint.folders import saved_steps
from gemma_jax.checkpoint.record import DamagedCheckpoint, run_record
from gemma_jax.checkpoint.restore import load_arrays
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import CheckpointConfig
from gemma_jax.errors import UserError
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import TrainState, abstract_train_state
from tests.checkpoint.buckets_on_disk import BucketsOnDisk, buckets_on_disk
from tests.checkpoint.states import CONFIG, KEEP_ALL, PARTS, bits, position, save


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketsOnDisk:
    return buckets_on_disk(tmp_path, monkeypatch)


def test_a_run_on_s3_comes_back_bit_for_bit_and_a_damaged_step_is_put_aside(
    buckets: BucketsOnDisk, tmp_path: Path, states: dict[int, TrainState], capsys: pytest.CaptureFixture[str]
) -> None:
    run = epath.Path("s3://bucket/runs/a")
    folder = tmp_path / "bucket" / "runs" / "a" / "checkpoints"
    with CheckpointStore(run, KEEP_ALL) as store:
        for step, state in states.items():
            save(store, step, state)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    record = run_record(run / "checkpoints" / "3")
    written = {str(p.relative_to(folder / "3")) for p in (folder / "3").rglob("*") if p.is_file()}
    assert record.files.keys() == written - {"run/data.json"}
    target = abstract_train_state(pretraining(CONFIG, cpu_mesh(2)))
    (folder / "3" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"params/manifest\.ocdbt is missing"):
        load_arrays(run / "checkpoints" / "3", {"params": target.trainable}, record)
    with CheckpointStore(run, KEEP_ALL) as store:
        restored = store.restore(target.parts)
        assert restored is not None and restored[1].step == 2
        assert bits(restored[0]) == bits(states[2].parts)
        assert f"it is kept as {run}/checkpoints/3.damaged" in capsys.readouterr().err
        save(store, 3, states[3])
        store.remove_after(2)
    assert saved_steps(run) == [1, 2] and (folder / "3.damaged" / "run" / "data.json").exists()
    with CheckpointStore(run, KEEP_ALL, overwrite=True) as store:
        assert store.steps() == [] and not folder.exists()


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
