"""Corpora and caches in a bucket, with an in-memory file system in the place of gs://."""

import gzip
import json
from pathlib import Path

import pytest
from corpora import cache_of, open_default, random_texts
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from gemma_jax.data import source as source_module
from gemma_jax.data.documents import check_source
from gemma_jax.data.packing import empty_rows
from gemma_jax.data.rows import PackedRows
from gemma_jax.data.token_cache import build_token_cache
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer


class Bucket(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """gs:// in memory."""

    protocol = ("gs", "gcs")
    cachable = False
    store: dict[str, object] = {}
    pseudo_dirs: list[str] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    filesystem = Bucket()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: filesystem)
    monkeypatch.setattr(source_module, "SHARD_BYTES", 6000)
    path = epath.Path("gs://bucket/corpus")
    path.mkdir(parents=True)
    return path


def test_documents_and_cache_in_a_bucket_equal_those_on_disk(
    bucket: epath.Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = random_texts(60)
    for number, text in enumerate(texts):
        (bucket / f"{number:06d}.txt").write_text(text)
    local = cache_of(texts, tokenizer, tmp_path, held_out=0.2)
    check_source("gs://bucket/corpus/*.txt")
    source = open_default("gs://bucket/corpus/*.txt")
    for _ in range(2):
        remote = build_token_cache(source, tokenizer, held_out=0.2, cache_dir="gs://bucket/cache")
        assert len(remote.shards) > 2
        a, b = (PackedRows(cache, "train", 64) for cache in (local, remote))
        assert len(a) == len(b)
        for row in range(len(a)):
            batches = [empty_rows(1, 64, 0) for _ in range(2)]
            for rows, batch in zip((a, b), batches, strict=True):
                rows.read_into(batch, 0, row, 2)
            assert all((x == y).all() for x, y in zip(*batches, strict=True))
    assert not list(epath.Path("gs://bucket/cache/tokens").glob("*/*.tmp"))


def test_json_lines_in_a_bucket(bucket: epath.Path) -> None:
    texts = random_texts(60)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (bucket / "a.jsonl").write_bytes(lines)
    (bucket / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "b.jsonl.gz"):
        source = open_default(f"gs://bucket/corpus/{name}")
        read = [document for shard in source.shards for document in source.read(shard, print)]
        assert [document.text for document in read if isinstance(document, source_module.Text)] == texts


def test_what_is_not_in_the_bucket_is_named(bucket: epath.Path) -> None:
    for spec in ("gs://bucket/corpus/*.txt", "gs://bucket/corpus/a.txt"):
        with pytest.raises(UserError, match="nothing in the bucket matches"):
            check_source(spec)
    (bucket / "a.array_record").write_bytes(b"x")
    with pytest.raises(UserError, match="read from local disks only"):
        open_default("gs://bucket/corpus/a.array_record")
