"""Bits flipped anywhere in a checkpoint."""

import random
import shutil
from pathlib import Path

import pytest

from gemma_jax.checkpoint import record as record_module
from gemma_jax.checkpoint.record import DamagedCheckpoint, run_record
from gemma_jax.checkpoint.restore import load_arrays
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.training.state import TrainState
from tests.checkpoint.states import CONFIG_AS_JSON, KEEP_ALL, bits, save


@pytest.mark.slow
@pytest.mark.filterwarnings(  # orbax's, in the second case
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)
@pytest.mark.parametrize(
    ("checked_bytes", "flips_a_file"),
    [(2**20, 20), (0, 6)],
    ids=["as it is", "with orbax and the fingerprints alone"],
)
def test_any_flipped_bit_is_refused_or_without_effect(
    tmp_path: Path,
    states: dict[int, TrainState],
    abstract: TrainState,
    monkeypatch: pytest.MonkeyPatch,
    checked_bytes: int,
    flips_a_file: int,
) -> None:
    monkeypatch.setattr(record_module, "CHECKED_BYTES", checked_bytes)
    with CheckpointStore(tmp_path / "run", KEEP_ALL) as store:
        save(store, 3, states[3])
    original = tmp_path / "run" / "checkpoints" / "3"
    files = [path.relative_to(original) for path in sorted(original.rglob("*")) if path.is_file()]
    files = [path for path in files if (original / path).stat().st_size]
    assert len(files) > 10
    expected = bits(states[3].parts)
    rng, refused = random.Random(checked_bytes), 0
    for number in range(flips_a_file * len(files)):
        # At a new path each time: tensorstore caches what it has read.
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        path = folder / files[number % len(files)]
        raw = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        try:
            record = run_record(folder)
            loaded = load_arrays(folder, abstract.parts, record)
        except DamagedCheckpoint:
            refused += 1
        else:
            assert bits(loaded) == expected, (path, bit)
            assert (record.step, record.rows_seen, record.config) == (3, 24, CONFIG_AS_JSON)
        shutil.rmtree(folder)
    assert refused > 0.4 * number
