"""ArrayRecord, TFDS and Parquet, written here, and real files of C4."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from corpora import all_texts, example, open_default, random_texts, write_records
from etils import epath
from pyarrow import parquet

from gemma_jax.data import source as source_module
from gemma_jax.data.documents import check_source
from gemma_jax.errors import UserError
from tests.messages import naming

pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
import tensorflow_datasets as tfds


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
    with pytest.raises(UserError, match=naming("record 0", "'body'", "url", "text", "score")):
        all_texts(open_default(path, text_field="body"))


def test_the_real_c4_file(shared_data: Path) -> None:
    source = open_default(str(shared_data / "maxtext_c4_minimal" / "c4-train.array_record-00000-of-00008"))
    texts = all_texts(source)
    assert len(texts) == 125
    assert texts[0].startswith("Posted on April 12, 2018 by admin Posted in VmWare")


TEXTS = random_texts(100, seed=7)


class LittleCorpus(tfds.core.GeneratorBasedBuilder):  # TFDS has no types
    """A dataset of this test's own."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> "tfds.core.DatasetInfo":
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, object]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, object]]]:
        for number, text in enumerate(TEXTS):
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
        assert sorted(all_texts(source)) == sorted(TEXTS)
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match=naming("'body'", "data.text_field", "text")):
        open_default("tfds:little_corpus", text_field="body")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_folder / "nothing"))
    with pytest.raises(
        UserError, match=naming("tfds:little_corpus", tfds_folder / "nothing", "array_record")
    ):
        check_source("tfds:little_corpus")


def write_parquet(path: "Path | epath.Path", texts: object, row_group_size: int = 7) -> str:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})  # type: ignore[arg-type]  # any sequence
    with path.open("wb") as stream:
        parquet.write_table(table, stream, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize("shard_bytes", [1, 5000, 10**8])
@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet_rows_in_order_over_row_groups_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, kind: str
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", shard_bytes)
    for name, part in (("a", TEXTS[:60]), ("b", ["", *TEXTS[60:]])):
        types = {"binary": pyarrow.binary(), "large_string": pyarrow.large_string()}
        array = pyarrow.array(part, types.get(kind, pyarrow.string()))
        column = array.dictionary_encode() if kind == "dictionary" else array
        write_parquet(tmp_path / f"{name}.parquet", column)
    source = open_default(str(tmp_path / "*.parquet"))
    assert all_texts(source) == TEXTS
    assert len(source.shards) == {1: 9 + 6, 10**8: 2}.get(shard_bytes, len(source.shards))
    last = source.shards[-1]
    *_, document = source.read(last, print)
    assert source.place(last, document.number) == f"{tmp_path}/b.parquet, row 40"


def test_parquet_in_a_bucket(bucket: epath.Path) -> None:
    spec = write_parquet(bucket / "a.parquet", TEXTS)
    assert all_texts(open_default(spec)) == TEXTS


def test_the_real_parquet_file(shared_data: Path) -> None:
    texts = all_texts(open_default(str(shared_data / "maxtext_c4_minimal" / "c4-train-00000*.parquet")))
    assert len(texts) == 200 and texts[0].startswith("Beginners BBQ Class Taking Place in Missoula!\n")


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_a_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, random_texts(3000), row_group_size=1000)
    else:
        write_records(path, [text.encode() for text in random_texts(3000)])
    whole = path.read_bytes()
    middle = len(whole) // 2
    for broken in (
        b"",
        whole[:-10],
        whole[:middle],
        whole[middle:],
        whole[:middle] + bytes(5000) + whole[middle + 5000 :],
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=naming(path)):
            all_texts(open_default(str(path), bad_records="skip"))
