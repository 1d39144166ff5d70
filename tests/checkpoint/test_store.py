"""Checkpoints come back bit for bit, or are refused by name; what is whole is never harmed."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gemma_jax import Gemma
from gemma_jax.checkpoint import folders
from gemma_jax.checkpoint.folders import saved_steps
from gemma_jax.checkpoint.record import FORMAT, DamagedCheckpoint, fingerprints, run_record
from gemma_jax.checkpoint.restore import load_arrays, step_folder
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import CheckpointConfig, ComputeConfig, MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import TrainState, abstract_train_state
from tests.checkpoint.states import (
    CONFIG,
    CONFIG_AS_JSON,
    KEEP_ALL,
    PARTS,
    bits,
    contents,
    names,
    position,
    save,
    wait_for_writers,
)
from tests.messages import naming


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_checkpoint_comes_back_bit_for_bit_on_any_mesh(
    run: Path, states: dict[int, TrainState], devices: int
) -> None:
    target = abstract_train_state(pretraining(CONFIG, cpu_mesh(devices)))
    with CheckpointStore(run, KEEP_ALL) as store:
        restored = store.restore(target.parts)
    assert restored is not None
    parts, record = restored
    assert bits(parts) == bits(states[3].parts)
    assert jax.tree.map(lambda x: x.sharding, parts) == jax.tree.map(lambda x: x.sharding, target.parts)
    assert (record.step, record.rows_seen, record.config) == (3, 24, CONFIG_AS_JSON)


def test_another_dtype_is_cast_after_the_check(run: Path, states: dict[int, TrainState]) -> None:
    target = abstract_train_state(
        pretraining(dataclasses.replace(CONFIG, compute=ComputeConfig(param_dtype="bfloat16")), cpu_mesh(2))
    )
    folder = run / "checkpoints" / "3"
    loaded = load_arrays(folder, {"params": target.trainable}, run_record(folder))["params"]
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), states[3].trainable)
    assert bits({"params": loaded}) == bits({"params": expected})
    # A changed value is found although another dtype is wanted.
    record = run_record(folder)
    record.arrays["params"]["embedding"] = dataclasses.replace(
        record.arrays["params"]["embedding"], fingerprint=1
    )
    with pytest.raises(DamagedCheckpoint, match=r"params\.embedding"):
        load_arrays(folder, {"params": target.trainable}, record)


def test_a_fingerprint_shows_every_flipped_bit_and_does_not_depend_on_the_mesh() -> None:
    key = jax.random.key(0)
    arrays = {
        "float32": jax.random.normal(key, (8, 6, 4)),
        "bfloat16": jax.random.normal(key, (8, 16), jnp.bfloat16),
        "int32": jnp.int32(7),
        "int8": jnp.arange(64, dtype=jnp.int8),
    }
    expected = jax.device_get(fingerprints(arrays))
    for devices in (2, 8):
        sharding = jax.NamedSharding(cpu_mesh(devices), jax.P("fsdp"))
        placed = {n: jax.device_put(x, sharding) if x.ndim else x for n, x in arrays.items()}
        assert jax.device_get(fingerprints(placed)) == expected
    rng = random.Random(0)
    for name, x in arrays.items():
        for _ in range(50):
            raw = bytearray(np.asarray(x).tobytes())
            bit = rng.randrange(8 * len(raw))
            raw[bit // 8] ^= 1 << bit % 8
            changed = jnp.asarray(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape))
            assert jax.device_get(fingerprints({name: changed}))[name] != expected[name]
    # Values that changed places, and two sign bits at once.
    swapped = arrays["float32"].at[0, 0, 0].set(1.0).at[7, 5, 3].set(2.0)
    back = arrays["float32"].at[0, 0, 0].set(2.0).at[7, 5, 3].set(1.0)
    signs = arrays["float32"].at[jnp.array([0, 5]), 0, 0].multiply(-1)
    a, b, c = (int(fingerprints(x)) for x in (swapped, back, signs))
    assert len({a, b, c, int(expected["float32"])}) == 4


def flip(path: Path, place: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw))] ^= 4
    path.write_bytes(raw)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped in params": (lambda f: flip(largest(f / "params"), 0.5), "params/"),
    "flipped in opt_state": (lambda f: flip(largest(f / "opt_state"), 0.5), "opt_state/"),
    "flipped in the record": (lambda f: flip(f / "run" / "data.json", 0.3), "run/data.json"),
    "cut short": (lambda f: os.truncate(largest(f / "params"), 1000), "params/"),
    "a file is missing": (lambda f: (f / "params" / "manifest.ocdbt").unlink(), "params/manifest.ocdbt"),
    "a part is missing": (lambda f: shutil.rmtree(f / "opt_state"), "opt_state/"),
    "the record is missing": (lambda f: (f / "run" / "data.json").unlink(), "run/data.json"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_told_kept_and_passed_over(
    run: Path,
    states: dict[int, TrainState],
    abstract: TrainState,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    told: str,
) -> None:
    folder = run / "checkpoints"
    damage(folder / "3")
    evidence, before = contents(folder / "3"), contents(folder / "2")
    for number in (1, 2):  # and a second time, when the run has come to that step again
        capfd.readouterr()
        with CheckpointStore(run, KEEP_ALL) as store:
            restored = store.restore(abstract.parts)
            assert restored is not None and restored[1].step == 2
            assert bits(restored[0]) == bits(states[2].parts)
            lines = capfd.readouterr().err.splitlines()
            assert len(lines) == 1, lines
            kept = "3.damaged" if number == 1 else "3.damaged-2"
            assert re.search(naming("step 3", told, kept, "step 2"), lines[0]), lines
            assert contents(folder / kept) == evidence and contents(folder / "2") == before
            save(store, 3, states[3])
            store.wait()
            again = store.restore(abstract.parts)
            assert again is not None and again[1].step == 3
        shutil.rmtree(folder / "3")
        shutil.copytree(folder / "3.damaged", folder / "3")
    assert names(folder) == ["1", "2", "3", "3.damaged", "3.damaged-2"]


def test_where_none_is_whole_nothing_is_touched(run: Path, abstract: TrainState) -> None:
    for step in (1, 2, 3):
        flip(largest(run / "checkpoints" / str(step) / "params"), 0.9)
    before = contents(run / "checkpoints")
    for _ in range(2):  # it must not begin from scratch the second time
        with (
            CheckpointStore(run, KEEP_ALL) as store,
            pytest.raises(UserError, match=naming(run / "checkpoints", 3, "--existing_run overwrite")),
        ):
            store.restore(abstract.parts)
    assert contents(run / "checkpoints") == before


def test_another_model_is_not_taken_for_damage(run: Path) -> None:
    model = dataclasses.replace(CONFIG.model, hidden_dim=128)
    target = abstract_train_state(pretraining(dataclasses.replace(CONFIG, model=model), cpu_mesh(8)))
    with (
        CheckpointStore(run, KEEP_ALL) as store,
        pytest.raises(UserError, match=naming("blocks.feed_forward.", run / "checkpoints" / "3", 128)),
    ):
        store.restore(target.parts)
    assert names(run / "checkpoints") == ["1", "2", "3"]


def test_parts_that_a_checkpoint_does_not_hold(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "run", KEEP_ALL) as store:
        store.save(position(1), {"params": PARTS["params"]})
        store.wait()
        with pytest.raises(UserError, match=naming("checkpoints/1", "opt_state")):
            store.restore(PARTS)
        restored = store.restore(PARTS, optional=["opt_state"])
    assert restored is not None and bits(restored[0]) == bits({"params": PARTS["params"]})


def test_a_run_of_the_old_format_is_refused_and_not_taken_for_damage(run: Path, abstract: TrainState) -> None:
    path = run / "checkpoints" / "3" / "run" / "data.json"
    fields = json.loads(path.read_text())["record"]
    del fields["format"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"record": fields, "sha256": digest}))
    before = contents(run / "checkpoints")
    with (
        CheckpointStore(run, KEEP_ALL) as store,
        pytest.raises(UserError, match=naming(run / "checkpoints" / "3", "format", 1, FORMAT)),
    ):
        store.restore(abstract.parts)
    assert contents(run / "checkpoints") == before


def test_reading_a_damaged_model_is_refused_and_changes_nothing(run: Path) -> None:
    folder = run / "checkpoints" / "3"
    shutil.rmtree(folder / "opt_state")  # which sampling does not need
    Gemma.from_pretrained(run, mesh=MeshConfig(cpu_devices=1))
    flip(largest(folder / "params"), 0.5)
    before = contents(run)
    for checkpoint in (run, folder):
        with pytest.raises(UserError, match=naming(folder, "params/", "step")):
            Gemma.from_pretrained(checkpoint, mesh=MeshConfig(cpu_devices=1))
    assert contents(run) == before


def test_steps_that_follow_at_once_do_not_reach_what_is_being_saved(tmp_path: Path) -> None:
    """Each step is given the buffers of the one before, which are still being written."""
    sharding = jax.NamedSharding(cpu_mesh(8), jax.P("fsdp"))
    make = jax.jit(lambda key: {"w": jax.random.normal(key, (4096, 1024))}, out_shardings={"w": sharding})
    step = jax.jit(lambda tree: {"w": tree["w"] * 1.5 + 1}, donate_argnums=0)
    params = make(jax.random.key(0))
    abstract = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=sharding)}
    opt_state = {"count": jnp.int32(0)}
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(cpu_mesh(8), jax.P()))
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    jax.block_until_ready(step(make(jax.random.key(1))))  # compiled
    with CheckpointStore(tmp_path / "run", KEEP_ALL) as store:
        for number in range(3):
            params = step(params)
            parts = {"params": params, "opt_state": opt_state}
            expected = bits(copy(parts))  # looking at the arrays themselves would keep them
            store.save(position(number), parts)
            for _ in range(5):
                params = step(params)
            jax.block_until_ready(params)
            store.wait()
            restored = store.restore({"params": abstract, "opt_state": {"count": count}})
            assert restored is not None and restored[1].step == number
            assert bits(restored[0]) == expected


LOSSES = {1: float("nan"), 2: 4.0, 3: 1.0, 4: None, 5: 5.0, 6: 2.0, 7: 3.0, 8: None}
KEPT = {
    "last": (CheckpointConfig(keep_last=3), {6, 7, 8}),
    "every": (CheckpointConfig(keep_last=1, keep_every=3), {3, 6, 8}),
    "best": (CheckpointConfig(keep_last=1, keep_best=2), {3, 6, 8}),
    "all": (CheckpointConfig(keep_last=2, keep_every=5, keep_best=1), {3, 5, 7, 8}),
}


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(("config", "kept"), KEPT.values(), ids=KEPT)
def test_what_is_kept(tmp_path: Path, config: CheckpointConfig, kept: set[int], reopened: bool) -> None:
    store = CheckpointStore(tmp_path / "run", config)
    for step, loss in LOSSES.items():
        measured = {"held_out": {"held_out_loss": loss}} if loss else {}
        store.save(position(step, evaluations=measured), PARTS)
        if reopened:
            store.close()
            store = CheckpointStore(tmp_path / "run", config)
    store.close()
    assert set(saved_steps(tmp_path / "run")) == kept
    assert names(tmp_path / "run" / "checkpoints") == sorted(map(str, kept))


def test_a_run_that_goes_back_loses_what_came_later_and_remembers_what_it_was_given(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "run", KEEP_ALL) as store:
        for step in (1, 2, 3, 4):
            store.save(position(step, history={"losses": [0.5, float(step)]}), PARTS)
        store.remove_after(2)  # the last one may still be on its way to the disk
        assert store.steps() == saved_steps(tmp_path / "run") == [1, 2]
        restored = store.restore(PARTS)
        assert restored is not None
        assert restored[1].step == 2 and restored[1].history == {"losses": [0.5, 2.0]}
        store.save(position(3), PARTS)
    assert saved_steps(tmp_path / "run") == [1, 2, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one checkpoint and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_kill_while_going_back_leaves_a_run_that_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointStore(tmp_path, KEEP_ALL) as store:
        for step in (2, 4, 6):
            store.save(position(step), PARTS)
        store.wait()
        remove, removed = folders.remove, []

        def remove_one(folder: epath.Path) -> None:
            if removed:
                raise KeyboardInterrupt
            removed.append(folder)
            remove(folder)

        monkeypatch.setattr(folders, "remove", remove_one)
        with pytest.raises(KeyboardInterrupt):
            store.remove_after(2)
    assert saved_steps(tmp_path) == [2, 4]


def test_a_full_disk_is_told_and_harms_nothing(
    small_disk: Path, states: dict[int, TrainState], abstract: TrainState, capfd: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    store = CheckpointStore(run, KEEP_ALL)
    save(store, 1, states[1])
    store.wait()
    before = contents(run / "checkpoints")
    save(store, 2, states[2])
    with pytest.raises(UserError, match=naming(run / "checkpoints", "No space")):
        save(store, 3, states[3])
    save(store, 2, states[2])
    with pytest.raises(UserError, match=naming(run / "checkpoints", "No space")):
        store.close()
    wait_for_writers()
    with CheckpointStore(run, KEEP_ALL) as store:
        assert contents(run / "checkpoints") == before
        restored = store.restore(abstract.parts)
    assert restored is not None and restored[1].step == 1
    assert bits(restored[0]) == bits(states[1].parts)
    assert capfd.readouterr().err == ""


def test_what_a_kill_left_is_removed_by_the_next_run_and_no_reader(run: Path, abstract: TrainState) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.unfinished.orbax-checkpoint-tmp")
    shutil.copytree(folder / "3", folder / "5.unfinished")
    before = contents(run)
    assert step_folder(run)[0].name == "3"
    Gemma.from_pretrained(run, mesh=MeshConfig(cpu_devices=1))
    assert contents(run) == before
    with CheckpointStore(run, KEEP_ALL):
        assert names(folder) == ["1", "2", "3"]
        (folder / "4.unfinished").mkdir()
        with pytest.raises(UserError):
            CheckpointStore(run, KEEP_ALL)
        assert names(folder) == ["1", "2", "3", "4.unfinished"]  # this one is being written


def test_two_runs_do_not_share_a_directory(run: Path, states: dict[int, TrainState]) -> None:
    with CheckpointStore(run, KEEP_ALL) as store:
        before = contents(run)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=naming(os.getpid(), run, "--run_dir")):
                CheckpointStore(run, KEEP_ALL, overwrite=overwrite)
        assert contents(run) == before
        save(store, 4, states[1])
    with CheckpointStore(run, KEEP_ALL):
        pass
    with CheckpointStore(run, KEEP_ALL, overwrite=True) as store:
        assert names(run / "checkpoints") == []
        with pytest.raises(UserError, match=naming(os.getpid(), run, "--run_dir")):
            CheckpointStore(run, KEEP_ALL)
