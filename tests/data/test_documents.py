import sys
from pathlib import Path

import pytest
from corpora import all_texts, open_default, random_texts, write_texts

from gemma_jax.data import source as source_module
from gemma_jax.data.documents import check_source, sample_texts
from gemma_jax.data.source import Text, cut_position, is_held_out
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("python-stdlb", "did you mean python-stdlib?"),
        ("{folder}/corpus.tx", "did you mean {folder}/corpus.txt?"),
        ("{folder}/nothing/*.txt", "{folder}/nothing/*.txt"),
        ("{folder}", "{folder}/**/*.txt"),
        ("tokens:{folder}/x", "tokens:uint16:PATH or tokens:uint32:PATH"),
        ("tokens:uint8:{folder}/x", "tokens:uint16:PATH or tokens:uint32:PATH"),
        ("tokens:uint16:{folder}/x", "{folder}/x"),
        ("tfds:no_such_dataset", "no_such_dataset"),
        ("tfds:imdb_revews", "did you mean tfds:imdb_reviews?"),
    ],
)
def test_an_unknown_corpus_is_named_and_a_near_one_suggested(tmp_path: Path, spec: str, says: str) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    for function in (check_source, open_default):
        with pytest.raises(UserError) as error:
            function(spec.format(folder=tmp_path))
        assert says.format(folder=tmp_path) in str(error.value)
    assert "tensorflow" not in sys.modules


def test_a_glob_over_several_kinds_of_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match="JSON lines and text files"):
        open_default(str(tmp_path / "*"))


def test_check_source_accepts_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for spec in ("python-stdlib", str(tmp_path / "a.txt"), str(tmp_path / "**/*.txt")):
        check_source(spec)


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


def test_the_held_out_share_is_about_what_was_asked() -> None:
    texts = [Text(text) for text in random_texts(3000)]
    for share in (0.01, 0.25):
        assert abs(sum(is_held_out(text, share) for text in texts) / 3000 - share) < 0.02
    assert not any(is_held_out(text, 0.0) for text in texts)
    assert all(is_held_out(text, 1.0) for text in texts)


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


def test_where_a_text_is_cut() -> None:
    assert cut_position("ab\ncd\n\n ef gh") == 7
    assert cut_position("ab\ncd\n\n") == 3
    assert cut_position("ab cd   ") == 5
    assert cut_position("    ") == 4
    assert cut_position("abcd") == 4
    assert cut_position("\n\n\n") == 3
