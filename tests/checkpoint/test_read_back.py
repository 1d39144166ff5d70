"""A checkpoint counts only after it was read back, and is begun only where it can be written."""

import shutil
from pathlib import Path

import jax
import pytest
from etils import epath

from gemma_jax.checkpoint.record import RunRecord, write_record
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.errors import UserError
from tests.checkpoint.states import KEEP_ALL, PARTS, bits, names, position
from tests.messages import naming


@pytest.mark.parametrize(
    "lost", ["params/manifest.ocdbt", "params/d", "opt_state/_METADATA", "run/data.json"]
)
def test_a_checkpoint_that_cannot_be_read_back_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def write_and_lose(folder: epath.Path, record: RunRecord) -> None:
        write_record(folder, record)
        path = Path(folder) / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        store.save(position(1), PARTS)
        store.wait()
        monkeypatch.setattr("gemma_jax.checkpoint.store.write_record", write_and_lose)
        store.save(position(2), PARTS)
        with pytest.raises(UserError, match=naming(tmp_path / "checkpoints", lost)):
            store.wait()
    assert names(tmp_path / "checkpoints") == ["1"]


@pytest.mark.parametrize("character", [*"[]*?\\\n\x00\x7f", "\udcff"])
def test_a_path_that_orbax_cannot_write_is_refused_before_anything_is_made(
    tmp_path: Path, character: str
) -> None:
    for folder in (tmp_path / f"a{character}b", tmp_path / f"a{character}b" / "run"):
        with pytest.raises(UserError, match=naming(ascii(character))):
            CheckpointStore(folder, KEEP_ALL)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "name", ["a b", "100%", "#1", "$HOME", "{x}", "é日本", "'\"", "x~", "-", ":;&|!", "a" * 200]
)
def test_any_other_path_holds_checkpoints(tmp_path: Path, name: str) -> None:
    with CheckpointStore(tmp_path / name, KEEP_ALL) as store:
        store.save(position(1), PARTS)
        store.wait()
        restored = store.restore(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), PARTS)
        )
    assert restored is not None
    assert bits(restored[0]) == bits(PARTS)
