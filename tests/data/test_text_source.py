import json
import os
import sysconfig
import tokenize
from pathlib import Path

import pytest
from corpora import all_texts, open_default, random_texts, write_texts

from gemma_jax.data import source as source_module
from gemma_jax.data import text_source
from gemma_jax.data.source import LongText, Text
from gemma_jax.tokenizer import Tokenizer


def test_the_standard_library_is_read_by_pythons_own_rules() -> None:
    source = open_default("python-stdlib")
    texts = all_texts(source)
    files = [file for shard in source.shards for file in shard.files]
    root = sysconfig.get_path("stdlib")
    assert os.path.join(root, "json", "decoder.py") in files
    assert not any("site-packages" in file or "dist-packages" in file for file in files)
    with tokenize.open(json.decoder.__file__) as stream:
        assert stream.read() in texts
    assert len(texts) > 500


def test_text_files_come_unchanged(tmp_path: Path) -> None:
    texts = ["one\r\ntwo\r", "\ufeffmark", "naïve 数\n\n"]
    source = open_default(write_texts(tmp_path, [*texts, ""]))
    assert all_texts(source) == texts
    (shard,) = source.shards
    numbers = [document.number for document in source.read(shard, print)]
    assert [source.place(shard, number) for number in numbers] == [*shard.files[:3]]


def test_the_fingerprint_changes_with_the_files_and_the_settings(tmp_path: Path) -> None:
    spec = write_texts(tmp_path, ["a", "b"])
    prints = {open_default(spec).fingerprint, open_default(spec, bad_records="skip").fingerprint}
    os.utime(tmp_path / "000000.txt", ns=(1, 1))
    prints.add(open_default(spec).fingerprint)
    (tmp_path / "000001.txt").write_text("bb")
    prints.add(open_default(spec).fingerprint)
    (tmp_path / "more.txt").write_text("c")
    prints.add(open_default(spec).fingerprint)
    assert len(prints) == 5


def test_a_long_file_is_the_same_document_as_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "数 x\nnaïve\n\n" * 500
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_source, "LONG_FILE_BYTES", 1000)
    monkeypatch.setattr(source_module, "_READ_CHARACTERS", 7)
    monkeypatch.setattr(source_module, "BLOCK_CHARACTERS", 100)
    source = open_default(str(path))
    (document,) = source.read(source.shards[0], print)
    assert isinstance(document, LongText)
    assert [*document.blocks()] == [*Text(text).blocks()]
    assert (document.digest, document.num_bytes) == (Text(text).digest, Text(text).num_bytes)


@pytest.mark.parametrize("shard_bytes", [1, 7, 64, 500, 10_000])
def test_every_line_belongs_to_exactly_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", shard_bytes)
    texts = [text[: 3 + 5 * (number % 7)] for number, text in enumerate(random_texts(40))]
    lines = [json.dumps({"text": text}) for text in texts]
    lines.insert(10, "")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    source = open_default(str(path))
    assert len(source.shards) == -(-path.stat().st_size // shard_bytes)
    assert all_texts(source) == texts
    placed = [
        (source.place(shard, document.number), document.text)
        for shard in source.shards
        for document in source.read(shard, print)
        if isinstance(document, Text)
    ]
    assert placed == [
        (f"{path}, line {number}", json.loads(line)["text"]) for number, line in enumerate(lines, 1) if line
    ]


@pytest.mark.parametrize("block", [10, 57, 1000])
def test_blocks_of_a_document_tokenise_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, block: int
) -> None:
    monkeypatch.setattr(source_module, "BLOCK_CHARACTERS", block)
    lines = "".join(
        f"{text}\n" * (1 + number % 3) for number, text in enumerate(["ab c", "(x):", "", "  y"] * 50)
    )
    blocks = [*Text(lines).blocks()]
    assert "".join(blocks) == lines and max(map(len, blocks)) <= block
    assert sum(tokenizer.encode_batch(blocks), []) == tokenizer.encode(lines)
    wide = "x" * 95 + " " * 30 + "数" * 200
    assert "".join(Text(wide).blocks()) == wide
