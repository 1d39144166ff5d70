"""Checkpoints on S3: their addresses reach tensorstore, and they are as safe there as on a disk."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorstore
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from gemma_jax.checkpoint import store as store_module
from gemma_jax.checkpoint.folders import saved_steps
from gemma_jax.checkpoint.record import DamagedCheckpoint, run_record
from gemma_jax.checkpoint.restore import load_arrays
from gemma_jax.checkpoint.s3 import FUNCTION, MANGLED, orbax_context
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import CheckpointConfig
from gemma_jax.errors import UserError
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import TrainState, abstract_train_state
from tests.checkpoint.buckets_on_disk import BucketsOnDisk, buckets_on_disk
from tests.checkpoint.states import CONFIG, KEEP_ALL, PARTS, bits, position, save

VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
)


@pytest.fixture
def orbax(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """orbax and the environment, to be changed."""
    monkeypatch.setattr(tensorstore_utils, FUNCTION, getattr(tensorstore_utils, FUNCTION))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def stores(spec: Any, driver: str) -> list[dict[str, Any]]:
    """All of this driver in a spec."""
    if isinstance(spec, list):
        return [store for part in spec for store in stores(part, driver)]
    if not isinstance(spec, dict):
        return []
    found = [spec] if spec.get("driver") == driver else []
    return found + [store for part in spec.values() for store in stores(part, driver)]


def test_an_address_on_s3_reaches_tensorstore_and_others_are_as_they_were(orbax: pytest.MonkeyPatch) -> None:
    others = ("/a/b", "gs://bucket/a/b")
    before = [tensorstore_utils.build_kvstore_tspec(path, "name") for path in others]
    for _ in range(2):
        orbax_context("s3://bucket/runs/a")
    build = tensorstore_utils.build_kvstore_tspec
    assert [build(path, "name") for path in others] == before
    options = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.WRITE)
    temporary = tensorstore_utils.OcdbtTemporaryMetadataContext(epath.Path("/a"))
    for spec, path in [
        (build("s3://bucket/a/b", "name"), "a/b"),
        (build("s3://bucket/a/b/", "name", ocdbt_process_spec="p", ocdbt_write_options=options), "a/b/p"),
        (build("s3://bucket/a/b", "name", use_ocdbt=False), "a/b/name"),
        (build("s3://bucket/a/b", ocdbt_temporary_metadata_context=temporary), "a/b/"),  # a list of stores
    ]:
        assert stores(spec, "s3") == [{"driver": "s3", "bucket": "bucket", "path": path}]
        assert not stores(spec, "gcs") and not stores(spec, "file")
        tensorstore.KvStore.Spec(spec)  # it can be read
        assert tensorstore_utils.is_remote_storage(spec)


def test_where_s3_is_comes_from_the_environment(orbax: pytest.MonkeyPatch) -> None:
    orbax_context("s3://bucket/runs/a")

    def store() -> dict[str, Any]:
        (found,) = stores(tensorstore_utils.build_kvstore_tspec("s3://bucket/a"), "s3")
        tensorstore.KvStore.Spec(found)
        return {name: value for name, value in found.items() if name not in ("driver", "bucket", "path")}

    orbax.setenv("AWS_DEFAULT_REGION", "eu-west-1")  # the bucket's may be another
    assert store() == {}
    orbax.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert store() == {"endpoint": "http://minio:9000", "aws_region": "eu-west-1"}
    orbax.setenv("AWS_ENDPOINT_URL_S3", "http://s3:9000")
    orbax.setenv("AWS_ACCESS_KEY_ID", "key")
    assert store() == {
        "endpoint": "http://s3:9000",
        "aws_region": "eu-west-1",
        "aws_credentials": {"type": "environment"},
    }


def test_an_orbax_that_knows_s3_is_left_alone_and_one_that_is_another_is_told(
    orbax: pytest.MonkeyPatch,
) -> None:
    assert tensorstore_utils.build_kvstore_tspec("s3://bucket/folder", use_ocdbt=False) == MANGLED

    def mended(directory: str, **options: Any) -> dict[str, str]:
        return {"driver": "s3", "bucket": "bucket", "path": "folder"}

    orbax.setattr(tensorstore_utils, FUNCTION, mended)
    orbax_context("s3://bucket/a")
    assert getattr(tensorstore_utils, FUNCTION) is mended
    orbax.delattr(tensorstore_utils, FUNCTION)
    for path in ("/a", "gs://bucket/a"):
        orbax_context(path)
    told = r"s3://bucket/a cannot hold checkpoints; install orbax-checkpoint 0"
    with pytest.raises(UserError, match=told):
        orbax_context("s3://bucket/a")
    orbax.delattr("orbax.checkpoint._src.serialization.tensorstore_utils")  # and the whole module
    orbax.setitem(sys.modules, tensorstore_utils.__name__, None)
    with pytest.raises(UserError, match=told):
        orbax_context("s3://bucket/a")


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


def test_a_save_that_failed_stays_unfinished_until_the_next_start(
    buckets: BucketsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last objects may still be on their way."""
    run = epath.Path("s3://bucket/run")

    def fails(*args: object) -> None:
        raise OSError("no answer")

    store = CheckpointStore(run, KEEP_ALL)
    store.save(position(1), PARTS)
    store.wait()
    monkeypatch.setattr(store_module, "write_record", fails)
    store.save(position(2), PARTS)
    with pytest.raises(
        UserError, match="cannot write a checkpoint into s3://bucket/run/checkpoints .no answer"
    ):
        store.close()
    assert {child.name for child in store.folder.iterdir()} == {"1", "2", "2.unfinished"}
    assert saved_steps(run) == [1]
    with CheckpointStore(run, KEEP_ALL):
        assert {child.name for child in store.folder.iterdir()} == {"1"}


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
