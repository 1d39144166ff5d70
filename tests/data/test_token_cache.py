import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from corpora import build, cache_of, open_default, random_texts, write_records, write_texts

from gemma_jax.data import shard_writer, token_cache
from gemma_jax.data import source as source_module
from gemma_jax.data.cached_shard import SplitSize
from gemma_jax.data.source import SPLITS, Split, Text, is_held_out
from gemma_jax.data.token_cache import TokenCache
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming


def documents_of(cache: TokenCache, split: Split) -> list[list[int]]:
    documents = []
    for shard in cache.shards:
        if shard.sizes[split].documents:
            ids = shard.tokens(split).read(0, shard.sizes[split].tokens)
            stops = np.cumsum(shard.lengths(split))
            assert stops[-1] == len(ids)
            documents += [part.tolist() for part in np.split(ids, stops[:-1])]
    return documents


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Counting(Tokenizer):
    """Counts the texts that it encodes."""

    def __init__(self, tokenizer: Tokenizer):
        self.__dict__.update(tokenizer.__dict__)
        self.encoded = 0

    def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
        self.encoded += len(texts)
        return super().encode_batch(texts, num_threads)


@pytest.mark.parametrize("batch", [1, 300, 10**6])
def test_the_cache_holds_each_document_with_eos_in_its_split(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(shard_writer, "_BATCH_CHARACTERS", batch)
    monkeypatch.setattr(source_module, "SHARD_BYTES", 5000)
    texts = random_texts(100)
    cache = cache_of(texts, tokenizer, tmp_path, held_out=0.2)
    assert len(cache.shards) > 3
    for split in SPLITS:
        mine = [text for text in texts if is_held_out(Text(text), 0.2) == (split == "held_out")]
        assert documents_of(cache, split) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in mine]
        assert cache.size(split) == SplitSize(
            len(mine),
            sum(len(tokenizer.encode(text)) + 1 for text in mine),
            sum(len(text.encode()) for text in mine),
        )
    assert cache.shards[0].dtype == "<u2"
    kinds = {path.name.split(".", 2)[-1] for path in (tmp_path / "cache").rglob("*.*.*")}
    assert kinds == {"ids", "lengths.npy"}  # nothing of loss weights, and nothing temporary


def test_equal_documents_are_never_on_both_sides(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = random_texts(100)
    folder = tmp_path / "texts"
    cache = cache_of([*texts, *reversed(texts)], tokenizer, folder, held_out=0.3)
    train, held_out = ({tuple(ids) for ids in documents_of(cache, split)} for split in SPLITS)
    assert len(train) + len(held_out) == 100 and not train & held_out and len(held_out) > 15
    # The split is the text's own: neither order nor file names play a part in it.
    other = cache_of(texts[::-1], tokenizer, tmp_path / "other", held_out=0.3)
    assert {tuple(ids) for ids in documents_of(other, "held_out")} == held_out


def test_a_second_run_encodes_nothing_and_other_settings_have_a_cache_of_their_own(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    counting = Counting(tokenizer)
    source = open_default(write_texts(tmp_path / "texts", random_texts(30)))
    caches = [build(source, counting, tmp_path / "cache", 0.1) for _ in range(2)]
    assert counting.encoded == 30
    assert documents_of(caches[0], "train") == documents_of(caches[1], "train")
    build(source, counting, tmp_path / "cache", 0.2)
    counting.fingerprint = "another"
    build(source, counting, tmp_path / "cache", 0.1)
    assert counting.encoded == 90 and len([*(tmp_path / "cache" / "tokens").iterdir()]) == 3


@pytest.mark.parametrize("damage", ["cut", "grown", "gone", "nonsense"])
@pytest.mark.parametrize("file", ["00001.train.ids", "00001.train.lengths.npy", "00001.json"])
def test_a_damaged_shard_is_written_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, damage: str, file: str
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 5000)
    cache = cache_of(random_texts(60), tokenizer, tmp_path)
    good = files_of(tmp_path / "cache")
    path = Path(cache.shards[0].directory) / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "grown" and file.endswith(".npy"):
        np.save(path, np.append(cache.shards[1].lengths("train"), 1))
    else:
        path.write_bytes({"cut": content[:-3], "grown": content + b"x", "nonsense": b"\x93NUMPY"}[damage])
    counting = Counting(tokenizer)
    build(cache.source, counting, tmp_path / "cache", 0.0)
    assert files_of(tmp_path / "cache") == good
    assert counting.encoded == cache.shards[1].sizes["train"].documents


def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_only_whole_shards(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 5000)
    texts = random_texts(60)
    texts[40] = "x y " * 4000  # longer than a file may be
    source = open_default(write_texts(tmp_path / "texts", texts))
    counting = Counting(tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(UserError, match=naming(tmp_path, "File too large")):
            build(source, tokenizer, tmp_path, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.rglob("*.tmp")]
    build(source, counting, tmp_path, 0.0)
    assert 0 < counting.encoded < 60


def test_a_cache_that_cannot_be_made_and_an_empty_corpus_are_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="data.cache_dir"):
        cache_of(["a"], tokenizer, tmp_path)
    with pytest.raises(UserError, match=naming("texts/*.txt", "documents")):
        cache_of(["", ""], tokenizer, tmp_path / "empty")


def test_hosts_and_processes_fill_one_cache_together(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 3000)
    alone = cache_of(random_texts(150), tokenizer, tmp_path, held_out=0.2)
    assert len(alone.shards) > 3
    counters = [Counting(tokenizer) for _ in range(4)]

    def work(index: int) -> None:
        build(alone.source, counters[index], tmp_path / "hosts", 0.2, process_index=index, process_count=3)

    with ThreadPoolExecutor(3) as hosts:
        assert [*hosts.map(work, range(3))] == [None] * 3
    assert all(counter.encoded < 150 for counter in counters)
    monkeypatch.setattr(token_cache, "_cores", lambda: 2 * token_cache.THREADS_A_PROCESS)
    build(alone.source, counters[3], tmp_path / "processes", 0.2)
    assert counters[3].encoded == 0
    for folder in ("hosts", "processes"):
        assert files_of(tmp_path / folder) == files_of(tmp_path / "cache")


KILLED = """
import sys, time
from gemma_jax.data import shard_writer, source
from gemma_jax.data.documents import open_source
from gemma_jax.data.token_cache import build_token_cache
from gemma_jax.tokenizer import Tokenizer

class Slow(Tokenizer):
    def encode_batch(self, texts, num_threads=-1):
        print("batch", flush=True)
        time.sleep(0.002)
        return super().encode_batch(texts, num_threads)

source.SHARD_BYTES = 20_000
shard_writer._BATCH_CHARACTERS = 4_000
corpus, model, cache = sys.argv[1:]
opened = open_source(corpus, text_field="text", bad_records="error")
build_token_cache(opened, Slow.load(model), held_out=0.1, cache_dir=cache)
print("whole", flush=True)
"""


def test_a_tokenisation_killed_at_any_moment_resumes_to_the_same_cache(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 20_000)
    model = tmp_path / "tokenizer.model"
    tokenizer.save(model)
    corpus = write_texts(tmp_path / "texts", random_texts(500))
    undisturbed = build(open_default(corpus), tokenizer, tmp_path / "undisturbed", 0.1)
    shards_seen = []
    for batches in (8, 15, 20):
        command = [sys.executable, "-c", KILLED, corpus, str(model), str(tmp_path / "killed")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(batches):
            line = process.stdout.readline()
            assert line == "batch\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        shards_seen.append(len([*(tmp_path / "killed").rglob("*.json")]))
    assert 0 < shards_seen[0] < shards_seen[-1] < len(undisturbed.shards)
    counting = Counting(tokenizer)
    build(open_default(corpus), counting, tmp_path / "killed", 0.1)
    assert 0 < counting.encoded < 500
    whole = files_of(tmp_path / "killed")
    assert {name: content for name, content in whole.items() if not name.endswith(".tmp")} == files_of(
        tmp_path / "undisturbed"
    )


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([300, 512], naming("record 1", "token", 512, 512)),
        ([300, 1, 301], naming("record 1", "eos", 1)),
        ([2, 2, 300], naming("record 1", "bos", 2)),
        ([300, 0, 301, 0], naming("record 1", "pad", 0)),
    ],
)
def test_token_records_lose_their_own_bos_and_eos_and_hold_no_other_control_ids(
    tmp_path: Path, tokenizer: Tokenizer, ids: list[int], says: str
) -> None:
    good = [[300, 301], [2, 302, 1], [2, 303], [304, 1]]
    write_records(tmp_path / "a.array_record", [np.array(each, np.uint32).tobytes() for each in good])
    cache = build(open_default(f"tokens:uint32:{tmp_path}/a.array_record"), tokenizer, tmp_path)
    assert documents_of(cache, "train") == [[300, 301, 1], [302, 1], [303, 1], [304, 1]]
    write_records(tmp_path / "b.array_record", [np.array(each, np.uint16).tobytes() for each in ([300], ids)])
    with pytest.raises(UserError, match=says):
        build(open_default(f"tokens:uint16:{tmp_path}/b.array_record"), tokenizer, tmp_path)
