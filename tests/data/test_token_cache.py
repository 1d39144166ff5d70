import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from corpora import cache_of, open_default, random_texts, write_texts
from etils import epath

from gemma_jax.data import source as source_module
from gemma_jax.data import storage, text_source, token_cache
from gemma_jax.data.source import Text, is_held_out
from gemma_jax.data.token_cache import SPLITS, Split, SplitSize, TokenCache, build_token_cache
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer


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
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", batch)
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
    assert not [*(tmp_path / "cache").rglob("*.tmp")]


def test_a_long_file_is_cached_as_its_text(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_source, "LONG_FILE_BYTES", 1000)
    monkeypatch.setattr(source_module, "BLOCK_CHARACTERS", 64)
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", 200)
    texts = ["short", "def f(x):\n    return x\n" * 300, "also short"]
    cache = cache_of(texts, tokenizer, tmp_path)
    assert documents_of(cache, "train") == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


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
    first = build_token_cache(source, counting, held_out=0.1, cache_dir=str(tmp_path / "cache"))
    assert counting.encoded == 30
    again = build_token_cache(source, counting, held_out=0.1, cache_dir=str(tmp_path / "cache"))
    assert counting.encoded == 30
    assert documents_of(again, "train") == documents_of(first, "train")
    build_token_cache(source, counting, held_out=0.2, cache_dir=str(tmp_path / "cache"))
    assert counting.encoded == 60
    counting.fingerprint = "another"
    build_token_cache(source, counting, held_out=0.1, cache_dir=str(tmp_path / "cache"))
    assert counting.encoded == 90
    assert len([*(tmp_path / "cache" / "tokens").iterdir()]) == 3


def test_progress_rises_to_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 5000)
    monkeypatch.setattr(token_cache, "_BATCH_CHARACTERS", 1000)
    source = open_default(write_texts(tmp_path / "texts", random_texts(100)))
    calls: list[tuple[int, int, int]] = []
    cache = build_token_cache(
        source,
        tokenizer,
        held_out=0.1,
        cache_dir=str(tmp_path / "cache"),
        progress=lambda *call: calls.append(call),
    )
    size = sum(shard.size for shard in source.shards)
    assert len(calls) > 2 * len(source.shards)
    assert calls == sorted(calls)
    assert calls[-1] == (size, size, sum(cache.size(split).tokens for split in SPLITS))


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
    build_token_cache(cache.source, counting, held_out=0.0, cache_dir=str(tmp_path / "cache"))
    assert files_of(tmp_path / "cache") == good
    assert counting.encoded == cache.shards[1].sizes["train"].documents


def test_a_full_disk_is_one_clear_sentence_and_leaves_only_whole_shards(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 5000)
    left = 60_000 // 4
    append = token_cache._SplitWriter.append

    def append_until_full(writer: token_cache._SplitWriter, ids: Sequence[int]) -> None:
        nonlocal left
        left -= len(ids)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(writer, ids)

    monkeypatch.setattr(token_cache._SplitWriter, "append", append_until_full)
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        cache_of(random_texts(200), tokenizer, tmp_path)
    assert not [*(tmp_path / "cache").rglob("*.tmp")]
    done = len([*(tmp_path / "cache").rglob("*.json")])
    assert done > 0
    monkeypatch.setattr(token_cache._SplitWriter, "append", append)
    cache = cache_of(random_texts(200), tokenizer, tmp_path / "whole")
    resumed = build_token_cache(
        open_default(str(tmp_path / "texts" / "*.txt")),
        tokenizer,
        held_out=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    assert documents_of(resumed, "train") == documents_of(cache, "train") and len(resumed.shards) > done


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = epath.Path(tmp_path / "file")
    path.write_text("old")

    def interrupted() -> None:
        with storage.replacing(path) as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files_of(tmp_path) == {"file": b"old"}
    # A whole write leaves what a reader has open as it was: it takes the name, never the file.
    with path.open("rb") as reader:
        with storage.replacing(path) as stream:
            stream.write(b"new")
        assert reader.read() == b"old"
    assert files_of(tmp_path) == {"file": b"new"}


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data.cache_dir"):
        build_token_cache(
            open_default(write_texts(tmp_path / "texts", ["a"])),
            tokenizer,
            held_out=0.0,
            cache_dir=str(tmp_path / "file"),
        )


def test_an_empty_corpus_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"texts/\*\.txt has no documents"):
        cache_of(["", ""], tokenizer, tmp_path)


def test_leftovers_of_killed_processes_go_away_but_not_those_of_running_ones(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    cache = cache_of(["text"], tokenizer, tmp_path)
    directory = Path(cache.shards[0].directory)
    for name, age in (("old.tmp", 7200), ("new.tmp", 10)):
        (directory / name).touch()
        os.utime(directory / name, (time.time() - age,) * 2)
    cache_of(["text"], tokenizer, tmp_path)
    build_token_cache(cache.source, tokenizer, held_out=0.0, cache_dir=str(tmp_path / "cache"))
    assert (directory / "new.tmp").exists() and not (directory / "old.tmp").exists()


def test_processes_fill_one_cache_together(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 3000)
    alone = cache_of(random_texts(150), tokenizer, tmp_path)
    counters = [Counting(tokenizer) for _ in range(3)]
    failures: list[BaseException] = []

    def build(index: int) -> None:
        try:
            build_token_cache(
                alone.source,
                counters[index],
                held_out=0.0,
                cache_dir=str(tmp_path / "together"),
                process_index=index,
                process_count=3,
            )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=build, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert files_of(tmp_path / "together") == files_of(tmp_path / "cache")
    assert all(counter.encoded < 150 for counter in counters)


def test_several_processes_of_one_machine_write_the_same_cache(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 3000)
    alone = cache_of(random_texts(150), tokenizer, tmp_path, held_out=0.2)
    monkeypatch.setattr(token_cache, "_cores", lambda: 2 * token_cache.THREADS_A_PROCESS)
    counting, progress = Counting(tokenizer), list[tuple[int, int, int]]()
    again = build_token_cache(
        alone.source, tokenizer, held_out=0.2, cache_dir=str(tmp_path / "cache"), progress=print
    )
    assert again.shards == alone.shards  # nothing was missing, so nothing was started
    build_token_cache(
        alone.source,
        counting,
        held_out=0.2,
        cache_dir=str(tmp_path / "together"),
        progress=lambda *numbers: progress.append(numbers),
    )
    assert files_of(tmp_path / "together") == files_of(tmp_path / "cache")
    assert counting.encoded == 0 and len(alone.shards) > 3
    assert progress == sorted(progress) and len(progress) == len(alone.shards)
    assert progress[-1][0] == progress[-1][1]


def test_a_mistake_in_one_of_several_processes_is_told(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 3000)
    monkeypatch.setattr(token_cache, "_cores", lambda: 2 * token_cache.THREADS_A_PROCESS)
    spec = write_texts(tmp_path / "texts", random_texts(60))
    (tmp_path / "texts" / "000050.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="000050.txt is not UTF-8 text"):
        build_token_cache(open_default(spec), tokenizer, held_out=0.2, cache_dir=str(tmp_path / "cache"))


KILLED = """
import sys, time
from gemma_jax.data import source, token_cache
from gemma_jax.data.documents import open_source
from gemma_jax.tokenizer import Tokenizer

source.SHARD_BYTES = 20_000
token_cache._BATCH_CHARACTERS = 4_000
report = lambda *call: (print("batch", flush=True), time.sleep(0.002))
corpus, model, cache = sys.argv[1:]
opened = open_source(corpus, text_field="text", bad_records="error")
token_cache.build_token_cache(opened, Tokenizer.load(model), held_out=0.1, cache_dir=cache, progress=report)
print("whole", flush=True)
"""


def test_a_tokenisation_killed_at_any_moment_resumes_to_the_same_cache(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 20_000)
    model = tmp_path / "tokenizer.model"
    tokenizer.save(model)
    corpus = write_texts(tmp_path / "texts", random_texts(500))
    undisturbed = build_token_cache(
        open_default(corpus), tokenizer, held_out=0.1, cache_dir=str(tmp_path / "undisturbed")
    )
    shards_seen = []
    for batches in (5, 12, 20):
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
    build_token_cache(open_default(corpus), counting, held_out=0.1, cache_dir=str(tmp_path / "killed"))
    assert 0 < counting.encoded < 500
    whole = files_of(tmp_path / "killed")
    assert {name: content for name, content in whole.items() if not name.endswith(".tmp")} == files_of(
        tmp_path / "undisturbed"
    )


def write_token_records(path: Path, documents: Sequence[Sequence[int]], dtype: str) -> str:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for ids in documents:
        writer.write(np.array(ids, dtype).tobytes())
    writer.close()
    return f"tokens:{dtype}:{path}"


def test_token_records_are_cached_without_their_own_bos_and_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = write_token_records(
        tmp_path / "a.array_record", [[300, 301], [2, 302, 1], [2, 303], [304, 1]], "uint32"
    )
    cache = build_token_cache(open_default(spec), tokenizer, held_out=0.0, cache_dir=str(tmp_path))
    assert documents_of(cache, "train") == [[300, 301, 1], [302, 1], [303, 1], [304, 1]]


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([300, 512], "record 1 holds token id 512, outside the vocabulary of 512"),
        ([300, 1, 301], "record 1 holds the eos id 1 inside"),
        ([2, 2, 300], "record 1 holds the bos id 2 inside"),
        ([300, 0, 301, 0], "record 1 holds the pad id 0 inside"),
    ],
)
def test_token_ids_that_no_document_of_this_vocabulary_holds(
    tmp_path: Path, tokenizer: Tokenizer, ids: list[int], says: str
) -> None:
    spec = write_token_records(tmp_path / "a.array_record", [[300], ids], "uint16")
    with pytest.raises(UserError, match=says):
        build_token_cache(open_default(spec), tokenizer, held_out=0.0, cache_dir=str(tmp_path / "cache"))


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Large(Counting):
        def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
            return [[70_000] * len(text) for text in texts]

    large = Large(tokenizer)
    large.vocab_size = 70_001
    cache = cache_of(["abc"], large, tmp_path)
    assert documents_of(cache, "train") == [[70_000, 70_000, 70_000, 1]]


def test_skipped_records_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nbad\n{"text": "b"}\n{}\n')
    source = open_default(str(path), bad_records="skip")
    for _ in range(2):
        cache = build_token_cache(source, tokenizer, held_out=0.0, cache_dir=str(tmp_path / "cache"))
        assert (cache.skipped, cache.size("train").documents) == (2, 2)
