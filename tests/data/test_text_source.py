import gzip
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from corpora import all_texts, open_default, random_texts, write_texts

from gemma_jax.data import source as source_module
from gemma_jax.data import text_source
from gemma_jax.data.source import LongText, Source, Text
from gemma_jax.errors import UserError


def read(source: Source) -> tuple[list[str], list[str]]:
    skipped: list[str] = []
    texts = [
        "".join(document.blocks())
        for shard in source.shards
        for document in source.read(shard, skipped.append)
        if isinstance(document, Text | LongText)
    ]
    return texts, skipped


def test_the_standard_library_is_read_by_pythons_own_rules() -> None:
    source = open_default("python-stdlib")
    texts, skipped = read(source)
    files = [file for shard in source.shards for file in shard.files]
    root = sysconfig.get_path("stdlib")
    assert os.path.join(root, "json", "decoder.py") in files
    assert not any("site-packages" in file or "dist-packages" in file for file in files)
    assert files == sorted(files, key=lambda file: Path(file).parts)
    with tokenize.open(json.decoder.__file__) as stream:
        assert stream.read() in texts
    assert len(texts) > 500 and all(texts)
    assert len(skipped) < 10 and all("bad" in reason for reason in skipped)
    assert source.fingerprint == open_default("python-stdlib").fingerprint


def test_text_files_come_unchanged_in_sorted_order_from_nested_folders(tmp_path: Path) -> None:
    texts = ["one\r\ntwo\r", "\ufeffmark", "naïve 数\n\n"]
    for name, text in zip(["a/b/1.txt", "a/2.txt", "z.txt"], texts, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "empty.txt").touch()
    source = open_default(str(tmp_path / "**" / "*.txt"))
    files = [file for shard in source.shards for file in shard.files]
    assert files == sorted(files) and len(files) == 4
    assert sorted(all_texts(source)) == sorted(texts)
    number = next(iter(source.read(source.shards[0], print))).number
    assert source.place(source.shards[0], number) == files[number]


def test_small_files_share_shards_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 3000)
    texts = random_texts(100)
    source = open_default(write_texts(tmp_path, texts))
    assert all_texts(source) == texts
    assert len(source.shards) > 5
    assert all(shard.size <= 3000 or len(shard.files) == 1 for shard in source.shards)


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


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    "bad", ["naïve 数 ".encode() + b"\xff and more", b"abcd\xe6\xff", "abc数".encode()[:-1]]
)
def test_a_byte_that_is_not_utf8_names_file_and_offset_or_skips_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool, bad: bytes
) -> None:
    if long:
        monkeypatch.setattr(text_source, "LONG_FILE_BYTES", 4)
        monkeypatch.setattr(text_source, "_READ_BYTES", 5)
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(bad)
    with pytest.raises(UnicodeDecodeError) as expected:
        bad.decode()
    with pytest.raises(UserError, match=rf"b\.txt is not UTF-8 text: .* at byte {expected.value.start};"):
        read(open_default(str(tmp_path / "*.txt")))
    texts, skipped = read(open_default(str(tmp_path / "*.txt"), bad_records="skip"))
    assert texts == ["good"]
    assert len(skipped) == 1 and "b.txt" in skipped[0]


def test_a_long_file_is_the_same_document_as_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "数 x\nnaïve\n\n" * 500
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_source, "LONG_FILE_BYTES", 1000)
    monkeypatch.setattr(text_source, "_READ_BYTES", 7)
    monkeypatch.setattr(source_module, "BLOCK_CHARACTERS", 100)
    source = open_default(str(path))
    (document,) = source.read(source.shards[0], print)
    assert isinstance(document, LongText)
    assert [*document.blocks()] == [*Text(text).blocks()]
    assert (document.digest, document.num_bytes) == (Text(text).digest, Text(text).num_bytes)


def _zstd(content: bytes) -> bytes:
    half = len(content) // 2
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(content[:half]) + compressor.compress(content[half:])


COMPRESSIONS: list[tuple[str, Callable[[bytes], bytes]]] = [
    (".jsonl", bytes),
    (".jsonl.gz", gzip.compress),
    (".jsonl.zst", _zstd),
]


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS)
@pytest.mark.parametrize("end", ["", "\n"])
def test_json_lines_plain_and_compressed(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_source, "_READ_BYTES", 64)
    texts = random_texts(50)
    lines = "\n".join(json.dumps({"id": 1, "body": text}, ensure_ascii=False) for text in texts) + end
    (tmp_path / f"a{ending}").write_bytes(compress(lines.encode()))
    assert all_texts(open_default(str(tmp_path / f"*{ending}"), text_field="body")) == texts


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


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b"[1]", "a JSON list where an object is expected"),
        (b'{"txt": "a", "n": 1}', "no field 'text' (data.text_field); its fields are: txt, n"),
        (b'{"text": null}', "field 'text' is not a string but NoneType"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        ('{"text": "a"}'.encode("utf-16-le"), "not"),
    ],
)
@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS)
@pytest.mark.parametrize("shard_bytes", [16, 10**6])
def test_a_bad_line_names_file_and_line_or_is_skipped_and_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: bytes,
    says: str,
    ending: str,
    compress: Callable[[bytes], bytes],
    shard_bytes: int,
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", shard_bytes)
    good = b'{"text": "good"}\n'
    path = tmp_path / f"b{ending}"
    path.write_bytes(compress(good * 3 + line + b"\n" + good))
    with pytest.raises(UserError) as error:
        read(open_default(str(path)))
    assert f"{path}, line 4: " in str(error.value) and says in str(error.value)
    assert "data.bad_records=skip" in str(error.value)
    texts, skipped = read(open_default(str(path), bad_records="skip"))
    assert texts == ["good"] * 4
    assert len(skipped) == 1 and f"{path}, line 4: " in skipped[0]


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS[1:])
def test_a_cut_or_damaged_compressed_file_is_an_error_not_its_end(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in random_texts(300)).encode()
    content = compress(lines)
    for number, broken in enumerate([content[:-20], content[:500], b"nonsense" + content]):
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(broken)
        # Not even bad_records=skip hides what is missing.
        with pytest.raises(UserError, match=f"{number}.jsonl.* is not a whole"):
            read(open_default(str(path), bad_records="skip"))


def test_a_file_that_vanished_or_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    for spec in (str(path), write_texts(tmp_path / "texts", ["a"])):
        source = open_default(spec)
        os.remove(source.shards[0].files[0])
        with pytest.raises(UserError, match="cannot be read"):
            read(source)
