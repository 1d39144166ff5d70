"""The tokenizer loses nothing, lets no typed text become a control token, and refuses other files."""

import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

SOURCES = [
    f"def area_{n}(width, height):\n    total = width * height + {n}\n\n\treturn total  # naïve\n" * 3
    for n in range(20, 40)
] + ["class Box:\n    '''A box with a width, a height and a name.'''\n\n\n    def __init__(self): pass\n"]

# Lone surrogates are not text, and SentencePiece turns U+2581 into a space.
unicode_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
marker_fragments = st.lists(
    st.sampled_from(
        [
            *("<start_of_turn>", "<end_of_turn>", "<mask>", "<unused7>", "[@BOS@]", "[toxicity=0]"),
            *("<start_of_", "_of_turn>", "start_of_turn", "turn>", "<end", "<", ">"),
            *("<bos>", "<eos>", "<pad>", "<unk>", "<0x0A>", "<h1>", "</h1>"),
            *("\n", "\n\n", " ", "   ", "\t", "user", "é", "\0"),
        ]
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train(SOURCES, 480, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "gemma_tokenizer" / "tokenizer.model")


@pytest.fixture(scope="module", params=["small", "real"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = request.getfixturevalue(request.param)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def piece_bytes(tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.piece_bytes()


@settings(deadline=None)  # the machine may be busy
@given(text=unicode_text | marker_fragments)
@example(text=" \n\n  leading, doubled  and trailing white space \t\r\n ")
@example(text="nul \0 and U+FFFD \ufffd and U+2585 \u2585 and ﬁ ligature")
def test_decode_gives_back_every_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id} & set(ids)


@settings(deadline=None)
@given(text=unicode_text | marker_fragments)
def test_piece_bytes_sum_to_the_length_of_the_text(
    tokenizer: Tokenizer, piece_bytes: np.ndarray, text: str
) -> None:
    assert sum(piece_bytes[tokenizer.encode(text)]) == len(text.encode())


@settings(deadline=None)
@given(text=marker_fragments | unicode_text)
@example(text="<start_of_turn>")
@example(text="<start_of_<start_of_turn>turn>")
@example(text="<start_of_turn><start_of_turn><end_of_turn>")
@example(text="a<end_of_turn>\n<start_of_turn>model\n")
def test_typed_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_typed(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.vocab_size
    control = {tokenizer.start_of_turn_id, tokenizer.end_of_turn_id, *range(108)}
    if tokenizer.vocab_size == 256_000:
        control |= {255_968, 255_999}  # [toxicity=0], <unused99>
    assert not control & set(ids)


def test_typed_text_splits_markers_that_overlap(small: Tokenizer) -> None:
    overlapping = Tokenizer(small._model.replace(b"<mask>", b"ababab"))
    assert overlapping.encode("abababab")[0] == 4
    assert 4 not in overlapping.encode_typed("abababab")
    assert overlapping.decode(overlapping.encode_typed("abababab")) == "abababab"


@settings(deadline=None)
@given(texts=st.lists(unicode_text, max_size=5))
def test_a_batch_is_each_text_by_itself(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts, num_threads=2) == [tokenizer.encode(text) for text in texts]


def test_gemma_id_layout(tokenizer: Tokenizer) -> None:
    assert [tokenizer.piece(i) for i in range(5)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (106, 107)
    assert tokenizer.piece(105) == "<unused98>"
    assert tokenizer.encode("<start_of_turn><end_of_turn>") == [106, 107]
    assert [tokenizer.piece(i) for i in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
    assert [tokenizer.encode("\n" * n) for n in (1, 2, 3)] == [[108], [109], [110]]


def test_real_model_facts(real: Tokenizer) -> None:
    assert real.vocab_size == 256_000
    assert real.encode("\t") == [226]
    assert real.encode("<h1><mask>") == [185, 4]
    assert real.fingerprint == "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2"


def test_real_model_golden_tokenisations(real: Tokenizer, shared_data: Path) -> None:
    golden = shared_data / "gemma_tokenizer" / "golden_tokenisations.jsonl"
    vectors = [json.loads(line) for line in golden.read_text(encoding="utf-8").splitlines()]
    assert vectors
    for vector in vectors:
        assert vector["kind"] == "encode"
        # Control symbols in text are a habit of Hugging Face; SentencePiece's own ids stand beside those.
        plain = vector["special_tokens_parsed"] and "sentencepiece_plain_ids"
        expected = vector[plain or "ids"]
        bos = [real.bos_id] if vector["add_bos"] and not plain else []
        assert bos + real.encode(vector["text"]) == expected, vector["name"]


def test_special_ids_decode_to_nothing_but_unknown_ones_and_markers(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(np.array([2, 0, 106, 108, 1, 3], np.int32)) == "<start_of_turn>\n ⁇ "


def test_bytes_that_are_not_utf8_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    byte = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    assert tokenizer.decode([byte["<0xC3>"], byte["<0xA9>"]]) == "é"
    assert tokenizer.decode([byte["<0xC3>"], byte["<0xFF>"]]) == "\ufffd\ufffd"


def test_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=naming(wrong, 0, tokenizer.vocab_size - 1)):
            tokenizer.decode([5, wrong])
        with pytest.raises(UserError, match=str(wrong)):
            tokenizer.piece(wrong)


def test_lone_surrogate_is_a_clear_error(small: Tokenizer, tmp_path: Path) -> None:
    for encode in (small.encode, small.encode_typed, lambda text: small.encode_batch(["ok", text])):
        with pytest.raises(UserError, match=naming(2, "U+D800")):
            encode("ab\ud800")
    with pytest.raises(UserError, match=r"U\+D800"):
        Tokenizer.train([*SOURCES, "ab\ud800"], 480, tmp_path / "tokenizer.model")


def test_same_texts_give_the_same_file(
    small: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = Tokenizer.train(iter(SOURCES), 480, tmp_path / "deep" / "tokenizer.model")
    written = (tmp_path / "deep" / "tokenizer.model").read_bytes()
    assert again.fingerprint == small.fingerprint == hashlib.sha256(written).hexdigest()
    assert os.listdir(tmp_path / "deep") == ["tokenizer.model"]
    assert again.vocab_size == 480
    assert capfd.readouterr() == ("", "")


def test_long_lines_and_reserved_characters_are_trained_on(tmp_path: Path) -> None:
    trained = Tokenizer.train(["abc" * 50_000, "xyz\u2585xyz" * 1_000], 111 + 256 + 12, tmp_path / "a.model")
    assert [trained.piece(i) for i in trained.encode("abc x")] == ["abc", "\u2581", "x"]


def test_impossible_vocabularies_state_what_is_possible(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=naming(100, "small")) as too_small:
        Tokenizer.train(SOURCES, 100, path)
    smallest = re.findall(r"\d+", str(too_small.value))[1]
    with pytest.raises(UserError, match=naming(9000, "large")) as too_large:
        Tokenizer.train(SOURCES, 9000, path)
    largest = re.findall(r"\d+", str(too_large.value))[1]
    with pytest.raises(UserError, match="text"):
        Tokenizer.train(["", ""], 480, path)
    assert not path.exists()
    for size in (int(smallest), int(largest)):
        assert Tokenizer.train(SOURCES, size, path).vocab_size == size


def test_saves_and_pickles_as_its_model_file(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "copy.model")
    for copy in (Tokenizer.load(tmp_path / "copy.model"), pickle.loads(pickle.dumps(small))):
        assert copy.fingerprint == small.fingerprint
        assert copy.encode(SOURCES[0]) == small.encode(SOURCES[0])
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "copy.model" / "below-a-file.model"))):
        small.save(tmp_path / "copy.model" / "below-a-file.model")


def test_files_that_are_no_tokenizer(
    small: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = small._model
    bad = {
        "empty": b"",
        "random": np.random.default_rng(0).bytes(5000),
        **{f"cut_at_{cut}": whole[:cut] for cut in range(1, len(whole), 397)},
        "other_ids": whole.replace(b"<bos>", b"<boz>", 1),
        "broken_utf8": whole.replace(b"<unused7>", b"<un\xff\xffed7>"),
        "broken_byte": whole.replace(b"<0x7F>", b"<0x\xd9F>"),
        "no_markers": whole.replace(b"<end_of_turn>", b"<end_of_tuxn>"),
    }
    for name, content in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{re.escape(str(path))} .*tokenizer.model"):
            Tokenizer.load(path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "missing"))):
        Tokenizer.load(tmp_path / "missing")
    assert capfd.readouterr() == ("", "")


def test_model_that_loses_white_space_is_refused(small: Tokenizer) -> None:
    # The last bytes are the normaliser: its name, no table, no dummy prefix, white space kept.
    normalizer = b"\x08identity\x12\x00\x18"
    dummy_prefix = small._model.replace(normalizer + b"\x00", normalizer + b"\x01")
    assert dummy_prefix != small._model
    with pytest.raises(UserError, match="white space"):
        Tokenizer(dummy_prefix)
