"""Randomly damaged files cause an error message or have no effect; values never change silently."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_jax.checkpoint.record import RECORD_FILE, run_record
from gemma_jax.cli import main
from gemma_jax.config import PretrainConfig, differences, from_record, replace, within
from gemma_jax.data.loader import Dataset, prepare
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.metrics import RunLog, plot_losses, read_metrics
from gemma_jax.training.run_directory import (
    MAY_CHANGE,
    check_data,
    check_same,
    check_tokenizer,
    load_config,
    open_run,
)

DAMAGES = 200


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns a file's content after one kind of accidental or deliberate damage."""
    start, length = rng.randrange(len(content)), rng.choice([1, 1, 2, 8, 512, 4096])
    stop = min(start + length, len(content))
    other = rng.randrange(len(content))
    return rng.choice(
        [
            content[:start],
            b"",
            content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :],
            content[:start] + bytes(stop - start) + content[stop:],
            content[:start] + rng.randbytes(stop - start) + content[stop:],
            content[:start] + content[stop:],
            content[:start] + content[other : other + length] + content[start:],
            content[:start]
            + rng.choice([b"9", b"-", b'"', b"{", b"[" * 5000, b"1e999", b"\xff", b"\n"])
            + content[start:],
        ]
    )


def each_damage(path: Path, check: Callable[[], None], damages: int = DAMAGES) -> int:
    """Calls `check` after each damage to a file. Returns how often it ended in an error message."""
    content, refused = path.read_bytes(), 0
    for seed in range(damages):
        path.write_bytes(damaged(content, random.Random(f"{path.name} {seed}")))
        try:
            check()
        except UserError:
            refused += 1
        except BaseException as error:
            error.add_note(f"damage {seed} to {path}")
            raise
        path.write_bytes(content)
    return refused


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def test_the_config_of_a_run(run: Path) -> None:
    whole = load_config(str(run), PretrainConfig)[0]
    recorded = from_record(run_record(run / "checkpoints" / "8").config, "the record")

    def check() -> None:
        config = load_config(str(run), PretrainConfig)[0]
        check_same(recorded, config, str(run))
        assert all(within(name, MAY_CHANGE) for name, *_ in differences(whole, config))

    assert each_damage(run / "config.json", check) > DAMAGES / 2


def test_the_log_of_a_run(run: Path, tmp_path: Path) -> None:
    whole = read_metrics(run)

    def check() -> None:
        entries = read_metrics(run)
        if any(entry not in whole for entry in entries):
            plot_losses({"damaged": entries}, tmp_path / "curve.png")
        shutil.copytree(run, tmp_path / "copy")
        try:
            RunLog(tmp_path / "copy", 8, 4).close()
            assert main(["runs", str(tmp_path / "copy")]) == 0
        finally:
            shutil.rmtree(tmp_path / "copy")

    assert each_damage(run / "metrics.jsonl", check) == 0


def test_the_record_of_a_checkpoint(run: Path) -> None:
    whole = run_record(run / "checkpoints" / "8")

    def check() -> None:
        assert run_record(run / "checkpoints" / "8") == whole

    assert each_damage(run / "checkpoints" / "8" / RECORD_FILE, check) > DAMAGES / 2


def test_the_tokenizer_of_a_run(run: Path) -> None:
    whole = Tokenizer.load(run / "tokenizer.model").fingerprint

    def check() -> None:
        tokenizer = Tokenizer.load(run / "tokenizer.model")
        check_tokenizer(run, tokenizer)
        assert tokenizer.fingerprint == whole

    assert each_damage(run / "tokenizer.model", check) > DAMAGES / 2


def rows_of(dataset: Dataset) -> list[np.ndarray]:
    batches = [dataset.train.batch(0, dataset.train.num_rows), *dataset.held_out.batches(8, None)]
    return [array for batch in batches for array in batch]


def test_the_token_cache_and_the_row_index(run: Path, tmp_path: Path) -> None:
    tokenizer, cache = Tokenizer.load(run / "tokenizer.model"), tmp_path / "cache"
    data = replace(open_run(str(run), PretrainConfig)[1].data, {"cache_dir": str(cache)})
    whole = rows_of(prepare(data, tokenizer, 0))
    (folder,) = (cache / "tokens").iterdir()
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)

    def check() -> None:
        try:
            dataset = prepare(data, tokenizer, 0)
            check_data(run, dataset)
            for before, now in zip(whole, rows_of(dataset), strict=True):
                np.testing.assert_array_equal(before, now)
        finally:
            shutil.rmtree(folder)
            shutil.copytree(backup, folder)

    files = sorted(folder.iterdir())
    assert len(files) * 40 > 2 * DAMAGES
    for path in files:
        refused = each_damage(path, check, 40)
        assert not refused or path.suffix != ".json"  # what describes a shard is written again
