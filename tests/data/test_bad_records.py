"""Records of every format without text are reported with their position, or skipped and counted."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pytest
from corpora import build, example, open_default, write_records
from pyarrow import parquet

from gemma_jax.data import source as source_module
from gemma_jax.data import text_source
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

GOOD = b'{"text": "good"}'
KINDS = {
    "txt": ("/3.txt: ", b"good"),
    "long.txt": ("/3.long.txt: ", b"good"),
    "jsonl": (".jsonl, line 4: ", GOOD),
    "jsonl.gz": (".jsonl.gz, line 4: ", GOOD),
    "array_record": (".array_record, record 3: ", example(text="good")),
    "tokens": (".tokens, record 3: ", b"\0\1"),
    "parquet": (".parquet, row 3: ", b"good"),
}


def write(folder: Path, kind: str, records: Sequence[bytes | None]) -> str:
    path = folder / f"a.{kind}"
    if kind.endswith("txt"):
        for number, record in enumerate(records):
            (folder / f"{number}.{kind}").write_bytes(record or b"")
        return f"{folder}/*.{kind}"
    if kind.startswith("jsonl"):
        content = b"\n".join(record or b"" for record in records)
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind == "parquet":
        column = pyarrow.array(records, pyarrow.binary()).view(pyarrow.string())
        parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=2)
    else:
        write_records(path, [record or b"" for record in records])
    return f"tokens:uint16:{path}" if kind == "tokens" else str(path)


@pytest.mark.parametrize(
    ("kind", "record", "says"),
    [
        ("txt", "naïve 数 ".encode() + b"\xff and more", "UTF-8 byte 11"),
        ("long.txt", "数".encode()[:-1] * 20, "UTF-8"),
        ("jsonl", b'{"text": "a"', "JSON"),
        ("jsonl", b"[1]", "list object"),
        ("jsonl", b'{"txt": "a", "n": 1}', "'text' data.text_field txt n"),
        ("jsonl", b'{"text": null}', "field 'text' NoneType"),
        ("jsonl.gz", b'{"text": "\\ud800"}', "surrogate"),
        ("jsonl", b'{"text": "\xff"}', "UTF-8"),
        ("jsonl", b"[" * 100_000, "JSON"),
        ("jsonl.gz", '{"text": "a"}'.encode("utf-16-le"), "not"),
        ("array_record", b"\xff\xfe", "tf.train.Example"),
        ("array_record", b"", "tf.train.Example"),
        ("array_record", example(body="x"), "'text' data.text_field"),
        ("array_record", example(text="#").replace(b"#", b"\xff"), "UTF-8"),
        ("tokens", b"abc", "3 bytes uint16"),
        ("parquet", None, "'text' NoneType"),
        ("parquet", b"caf\xe9", "column 'text' UTF-8"),
    ],
)
def test_a_bad_record_is_named_or_skipped_and_counted(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    record: bytes | None,
    says: str,
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", max(20, len(record or b"")))
    if kind == "long.txt":
        monkeypatch.setattr(text_source, "LONG_FILE_BYTES", 8)
    place, good = KINDS[kind]
    spec = write(tmp_path, kind, [good, good, good, record, good])
    with pytest.raises(UserError, match=naming(place, *says.split(), "data.bad_records=skip")):
        build(open_default(spec), tokenizer, tmp_path)
    cache = build(open_default(spec, bad_records="skip"), tokenizer, tmp_path)
    assert (cache.size("train").documents, cache.skipped) == (4, 1)
