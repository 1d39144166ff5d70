import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from corpora import all_texts, open_default, random_texts

from gemma_jax.data import source as source_module
from gemma_jax.data.documents import check_source, sample_texts
from gemma_jax.data.record_source import parse_example
from gemma_jax.data.source import Source, TokenIds
from gemma_jax.errors import UserError

pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
import tensorflow_datasets as tfds


def write_records(path: Path, records: Sequence[bytes]) -> str:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def skipping(source: Source) -> tuple[int, list[str]]:
    skipped: list[str] = []
    return sum(1 for shard in source.shards for _ in source.read(shard, skipped.append)), skipped


def field(number: int, content: bytes) -> bytes:
    """A length-delimited proto field."""
    length = len(content)
    varint = b""
    while length > 127:
        varint += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content


def example(**features: str) -> bytes:
    """A serialised tf.train.Example with string features and one of numbers."""
    entries = b"".join(
        field(1, field(1, name.encode()) + field(2, field(1, field(1, text.encode()))))
        for name, text in features.items()
    )
    floats = field(1, field(1, b"score") + field(2, field(2, field(1, struct.pack("<f", 1.5)))))
    return field(1, entries + floats)


def test_records_of_text_in_order_over_shards_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 2000)
    texts = [*random_texts(150), "\n\x02starts like a proto"]
    write_records(tmp_path / "a.array_record-00000-of-00002", [text.encode() for text in texts[:100]])
    write_records(tmp_path / "a.array_record-00001-of-00002", [text.encode() for text in [*texts[100:], ""]])
    source = open_default(str(tmp_path / "a.array_record*"))
    assert len(source.shards) > 4
    assert all_texts(source) == texts
    shard = source.shards[1]
    assert (
        source.place(shard, next(iter(source.read(shard, print))).number)
        == f"{shard.files[0]}, record {shard.start}"
    )


def test_records_of_examples(tmp_path: Path) -> None:
    texts = ["", *random_texts(20)]
    path = write_records(tmp_path / "a.array_record", [example(url="u", text=text) for text in texts])
    assert all_texts(open_default(path)) == texts[1:]
    assert all_texts(open_default(path, text_field="url")) == ["u"] * 21
    with pytest.raises(UserError, match=r"record 0: no feature 'body'.*url, text, score"):
        all_texts(open_default(path, text_field="body"))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (b"\xff\xfe", "not a tf.train.Example"),
        (example(body="x"), "no feature 'text'"),
        (example(text="#").replace(b"#", b"\xff"), "is not UTF-8"),
    ],
)
def test_a_bad_record_is_named_or_skipped(tmp_path: Path, record: bytes, says: str) -> None:
    path = write_records(tmp_path / "a.array_record", [example(text="good"), record, example(text="good")])
    with pytest.raises(UserError) as error:
        all_texts(open_default(path))
    assert f"{path}, record 1: " in str(error.value) and says in str(error.value)
    count, skipped = skipping(open_default(path, bad_records="skip"))
    assert count == 2 and len(skipped) == 1 and f"{path}, record 1: " in skipped[0]


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\n",
        b"\n\x05ab",
        b"plain text",
        example(text="x").replace(b"\n", b"\x08", 1),
        b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
)
def test_what_is_no_example_is_refused(record: bytes) -> None:
    with pytest.raises(ValueError, match="proto|features|number"):
        parse_example(record)


def test_the_real_c4_file(shared_data: Path) -> None:
    source = open_default(str(shared_data / "maxtext_c4_minimal" / "c4-train.array_record-00000-of-00008"))
    texts = all_texts(source)
    assert len(texts) == 125
    assert texts[0].startswith("Posted on April 12, 2018 by admin Posted in VmWare")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_records_of_token_ids(tmp_path: Path, dtype: str) -> None:
    documents = [[300, 301], [], [302] * 1000, [2, 303, 1]]
    write_records(tmp_path / "a.array_record", [np.array(ids, dtype).tobytes() for ids in documents])
    source = open_default(f"tokens:{dtype}:{tmp_path}/*.array_record")
    read = [document for shard in source.shards for document in source.read(shard, print)]
    assert all(isinstance(document, TokenIds) for document in read)
    assert [document.ids.tolist() for document in read if isinstance(document, TokenIds)] == [
        documents[0],
        documents[2],
        documents[3],
    ]
    with pytest.raises(UserError, match="set tokenizer.path"):
        [*sample_texts([source], 1, 0)]


def test_a_token_record_that_is_no_whole_number_of_ids(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.array_record", [b"abc"])
    with pytest.raises(UserError, match="record 0: 3 bytes are no whole number of uint16"):
        skipping(open_default(f"tokens:uint16:{path}"))


def test_a_file_that_is_no_array_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(UserError, match="is not an ArrayRecord file"):
        skipping(open_default(str(path)))


def test_a_damaged_array_record_is_named(tmp_path: Path) -> None:
    path = Path(write_records(tmp_path / "a.array_record", [text.encode() for text in random_texts(3000)]))
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 2000] = b"\0" * 2000
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.array_record"):
        skipping(open_default(str(path)))


TFDS_TEXTS = random_texts(60, seed=7)


class LittleCorpus(tfds.core.GeneratorBasedBuilder):  # TFDS has no types
    """A dataset of this test's own."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> "tfds.core.DatasetInfo":
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, object]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, object]]]:
        for number, text in enumerate(TFDS_TEXTS):
            yield number, {"text": text, "label": number}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    LittleCorpus(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_by_directory_and_by_name(tfds_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 5000)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_folder))
    for spec in (
        str(tfds_folder / "little_corpus" / "1.0.0"),
        "tfds:little_corpus",
        "tfds:little_corpus:1.0.0",
    ):
        check_source(spec)
        source = open_default(spec)
        assert len(source.shards) > 1
        assert sorted(all_texts(source)) == sorted(TFDS_TEXTS)
    assert "tensorflow" not in sys.modules


def test_tfds_mistakes(tfds_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tfds_folder / "little_corpus" / "1.0.0")
    with pytest.raises(UserError, match="no feature 'body'.*text"):
        open_default(folder, text_field="body")
    with pytest.raises(UserError, match="feature 'label' is not one string but 0"):
        all_texts(open_default(folder, text_field="label"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tfds:little_corpus is not prepared in .*download_and_prepare"):
        check_source("tfds:little_corpus")
