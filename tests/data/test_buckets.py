"""Corpora and caches in a bucket."""

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from corpora import all_texts, cache_of, open_default, random_texts, read_all, write_records
from etils import epath

from gemma_jax.data import source as source_module
from gemma_jax.data.documents import check_source
from gemma_jax.data.rows import PackedRows
from gemma_jax.data.token_cache import build_token_cache
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming


@pytest.fixture
def corpus(bucket: epath.Path, monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 6000)
    (bucket / "corpus").mkdir()
    return bucket / "corpus"


def test_documents_and_cache_in_a_bucket_equal_those_on_disk(
    corpus: epath.Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = random_texts(60)
    for number, text in enumerate(texts):
        (corpus / f"{number:06d}.txt").write_text(text)
    local = cache_of(texts, tokenizer, tmp_path, held_out=0.2)
    check_source("gs://bucket/corpus/*.txt")
    (corpus / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    )
    assert all_texts(open_default("gs://bucket/corpus/a.jsonl.gz")) == texts
    source = open_default("gs://bucket/corpus/*.txt")
    for _ in range(2):
        remote = build_token_cache(source, tokenizer, held_out=0.2, cache_dir="gs://bucket/cache")
        assert len(remote.shards) > 2
        batches = [read_all(PackedRows(cache, "train", 64), tokenizer) for cache in (local, remote)]
        assert all(np.array_equal(x, y) for x, y in zip(*batches, strict=True))
    assert not list(epath.Path("gs://bucket/cache/tokens").glob("*/*.tmp"))


def test_what_is_not_in_the_bucket_is_named(corpus: epath.Path) -> None:
    for spec in ("gs://bucket/corpus/*.txt", "gs://bucket/corpus/a.txt"):
        with pytest.raises(UserError, match=naming(f"'{spec}'")):
            check_source(spec)


def test_array_records_in_a_bucket(
    corpus: epath.Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are copied to this machine one by one, and messages about them name the bucket."""
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    texts = random_texts(60)
    files = []
    for name, part in (("a", texts[:25]), ("b", texts[25:])):
        path = tmp_path / f"{name}.array_record"
        write_records(path, [text.encode() for text in part])
        files.append(corpus / path.name)
        files[-1].write_bytes(path.read_bytes())
    source = open_default("gs://bucket/corpus/*.array_record")
    assert [shard.files for shard in source.shards] == [(str(file),) for file in files]
    assert all_texts(source) == texts
    assert source.place(source.shards[1], 3) == "gs://bucket/corpus/b.array_record, record 3"
    assert not list(copies.iterdir())
    files[0].write_bytes(b"nonsense" * 1000)
    files[1].write_bytes(b"")
    for name in ("a", "b"):
        source = open_default(f"gs://bucket/corpus/{name}.array_record")
        with pytest.raises(
            UserError, match="^" + naming(f"gs://bucket/corpus/{name}.array_record", "ArrayRecord")
        ):
            list(source.read(source.shards[0], print))
