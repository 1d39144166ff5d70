"""Whether a corpus is the same as before, and what has changed in it."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from corpora import random_texts

from gemma_jax.config.sections import DataConfig
from gemma_jax.data import source as source_module
from gemma_jax.data.loader import prepare
from gemma_jax.data.statistics import SourceStatistics
from gemma_jax.tokenizer import Tokenizer

FILES = 12


def write(folder: Path, kind: str) -> None:
    """Writes files of equal size, so that sums of sizes or tokens do not reveal a change of their order."""
    texts = [(f"{number:02d} " + text)[:40].ljust(40) for number, text in enumerate(random_texts(FILES * 3))]
    folder.mkdir()
    for number in range(FILES):
        mine = texts[3 * number : 3 * number + 3]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in mine)
        (folder / f"{number:02d}.{kind}").write_text("\n".join(mine) if kind == "txt" else lines)


def statistics_of(glob: Path, tokenizer: Tokenizer, cache: Path) -> SourceStatistics:
    config = DataConfig(sources=(str(glob),), held_out=0.3, sequence_length=32, cache_dir=str(cache))
    return prepare(config, tokenizer, 0).statistics[0]


def reverse(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        (folder / name).rename(folder / f"{name}.old")
    for name, other in zip(names, reversed(names), strict=True):
        (folder / f"{name}.old").rename(folder / other)


def edit(folder: Path) -> None:
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes().replace(b"03", b"33").replace(b"09", b"99"))


def swap(folder: Path) -> None:
    first, second = sorted(folder.iterdir())[3:5]
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def rename(folder: Path) -> None:
    path = sorted(folder.iterdir())[5]
    path.rename(folder / f"05b{path.suffix}")  # in the same place of the order


def add(folder: Path) -> None:
    path = sorted(folder.iterdir())[5]
    shutil.copy(path, folder / f"zz{path.suffix}")


CHANGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "reversed": (reverse, ["changed: 00.", "and 9 more"]),
    "swapped": (swap, ["changed: 03.", "04."]),
    "renamed": (rename, ["missing: 05.", "new: 05b."]),
    "edited": (edit, ["changed: 03."]),
    "removed": (lambda folder: sorted(folder.iterdir())[5].unlink(), ["missing: 05."]),
    "added": (add, ["new: zz."]),
}


@pytest.mark.parametrize("shard_bytes", [200, 10**6])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_copy_is_the_same_corpus_and_any_other_is_not(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str, shard_bytes: int
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", shard_bytes)
    write(tmp_path / "corpus", kind)
    before = statistics_of(tmp_path / "corpus" / f"*.{kind}", tokenizer, tmp_path / "cache")
    recorded = json.loads(json.dumps(dataclasses.asdict(before)))
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(tmp_path / "corpus", copy)
    for path in copy.iterdir():
        os.utime(path, ns=(1, 1))
    assert statistics_of(copy / f"*.{kind}", tokenizer, tmp_path / "cache").change_since(recorded) == ""
    for name, (change, says) in CHANGES.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "corpus", folder)
        change(folder)
        found = statistics_of(folder / f"*.{kind}", tokenizer, tmp_path / "cache").change_since(recorded)
        assert all(words in found for words in says), (name, found)
