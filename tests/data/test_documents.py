"""Opening corpora by name: files are found, none lost or counted twice; and sampling of texts."""

import bz2
import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from corpora import all_texts, open_default, random_texts, write_texts

from gemma_jax.data import source as source_module
from gemma_jax.data.documents import check_source, sample_texts
from gemma_jax.data.source import Text, is_held_out
from gemma_jax.errors import UserError
from tests.messages import naming


def zstd(content: bytes) -> bytes:
    half = len(content) // 2
    return b"".join(
        pyarrow.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:])
    )


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def tree(folder: Path) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", ".hidden/d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("*/*.txt", ["sub/b.txt"]),
        ("**/*.txt", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("**", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("**/deep/*", ["sub/deep/c.txt"]),
        ("s[tu]b/?.txt", ["sub/b.txt"]),
        (".hidden/*", [".hidden/d.txt"]),
    ],
)
def test_a_glob_names_files_as_a_shell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glob: str, names: list[str]
) -> None:
    tree(tmp_path)
    assert all_texts(open_default(f"{tmp_path}/{glob}")) == names
    monkeypatch.chdir(tmp_path)
    assert all_texts(open_default(glob)) == names


def test_links_add_nothing_that_is_there_already(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    tree(corpus)
    tree(elsewhere)
    (corpus / "0loop").symlink_to(corpus)
    (corpus / "1loop").symlink_to(".")
    (corpus / "sub" / "up").symlink_to("..")
    (corpus / "latest").symlink_to("sub")
    (corpus / "again.txt").symlink_to("sub/b.txt")
    names = ["a.txt", "sub/b.txt", "sub/deep/c.txt"]
    assert sorted(all_texts(open_default(f"{corpus}/**/*.txt"))) == names
    (corpus / "linked").symlink_to(elsewhere)
    assert sorted(all_texts(open_default(f"{corpus}/**/*.txt"))) == sorted(2 * names)


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS.items())
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".ndjson", ".json", ".JSONL"])
def test_texts_and_json_lines_plain_and_compressed(
    tmp_path: Path, kind: str, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    content = "naïve 数\n" * 5000 if kind == ".txt" else '\ufeff{"text": "one"}\n\n{"text": "naïve"}'
    path = tmp_path / f"a{kind}{ending}"
    path.write_bytes(compress(content.encode()))
    assert all_texts(open_default(str(path))) == ([content] if kind == ".txt" else ["one", "naïve"])
    if ending:
        whole = path.read_bytes()
        for broken in (whole[:-5], b"", b"nonsense" + whole):
            path.write_bytes(broken)
            with pytest.raises(UserError, match=naming(path)):
                all_texts(open_default(str(path), bad_records="skip"))


def test_other_kinds_of_files_are_refused_with_the_kinds_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04\xff")
    with pytest.raises(UserError, match=naming("a.zip", "UTF-8", ".parquet")):
        all_texts(open_default(str(tmp_path / "a.zip")))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("python-stdlb", "'python-stdlb' python-stdlib"),
        ("{folder}/corpus.tx", "'{folder}/corpus.tx' {folder}/corpus.txt"),
        ("{folder}", "{folder} {folder}/**/*.txt"),
        ("tokens:uint8:{folder}/x", "tokens:uint8: tokens:uint16:PATH tokens:uint32:PATH"),
        ("tokens:uint16:{folder}/x", "{folder}/x"),
        ("tfds:imdb_revews", "'tfds:imdb_revews' tfds:imdb_reviews"),
    ],
)
def test_an_unknown_corpus_is_named_and_a_near_one_suggested(tmp_path: Path, spec: str, says: str) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    for function in (check_source, open_default):
        with pytest.raises(UserError, match=naming(*says.format(folder=tmp_path).split())):
            function(spec.format(folder=tmp_path))
    assert "tensorflow" not in sys.modules


def test_a_glob_over_several_kinds_of_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match=naming("JSON lines", "text files")):
        open_default(str(tmp_path / "*"))


def test_the_sample_is_even_deterministic_of_the_right_size_and_has_nothing_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 20_000)
    sources = [open_default(write_texts(tmp_path / str(seed), random_texts(400, seed))) for seed in range(2)]
    total = sum(shard.size for source in sources for shard in source.shards)
    texts = [*sample_texts(sources, total / 4e6, held_out=0.3)]
    assert texts == [*sample_texts(sources, total / 4e6, held_out=0.3)]
    assert not any(is_held_out(Text(text), 0.3) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert 0.1 * total < size < 0.3 * total
    places = [int(text.split(" ")[0].split(".")[1]) for text in texts]
    for quarter in range(4):
        assert sum(quarter * 100 <= place < quarter * 100 + 100 for place in places) > len(places) / 8
    # More than there is gives everything that is not held out.
    everything = [text for source in sources for text in all_texts(source)]
    kept = [text for text in everything if not is_held_out(Text(text), 0.3)]
    assert 0 < len(kept) < len(everything)
    assert sorted(sample_texts(sources, 1000, held_out=0.3)) == sorted(kept)
