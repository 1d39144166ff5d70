"""Ids to text as they arrive: what is certain, what it costs, and where a stop text ends it."""

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import cast

import pytest

from gemma_jax.sampling.text import Detokenizer, TextCompletion
from gemma_jax.tokenizer import Tokenizer

FLAG = "\U0001f1e9\U0001f1ea"  # two characters of four bytes each
# Bytes that begin characters, continue them, or are never part of one.
AWKWARD = (0x41, 0x80, 0x90, 0xA0, 0xBF, 0xC1, 0xC2, 0xE0, 0xE6, 0xED, 0xF0, 0xF4, 0xF5, 0xFF)


class Counting(Tokenizer):
    """Counts the ids that are decoded."""

    decoded = 0

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        self.decoded += len(ids)
        return super().decode(ids)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Counting:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train([f"{a} {b} flags \ufffd {a * b}\n" for a in range(60) for b in range(60)], 395, path)
    return Counting(path.read_bytes())


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Pieces, whole and broken characters in any order."""
    byte_ids = {tokenizer.byte(id): id for id in range(tokenizer.vocab_size)}
    kinds = [
        lambda: [rng.randrange(tokenizer.vocab_size)],
        lambda: [byte_ids[rng.choice(AWKWARD)]],
        lambda: [byte_ids[byte] for byte in rng.choice(["\xe9", "\u65e5", FLAG, "\ufffd"]).encode()],
    ]
    return [id for _ in range(rng.randrange(1, 8)) for id in rng.choice(kinds)()]


def test_pieces_join_to_the_whole_and_no_certain_text_changes(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(3000):
        ids, detokenizer, text = random_ids(tokenizer, rng), Detokenizer(tokenizer), ""
        for count, id in enumerate(ids, 1):
            text += detokenizer.add(id)
            # Whatever may follow: here two bytes that could complete a character, and one that cannot.
            for more in ([], [tokenizer.encode("a")[0]]):
                assert tokenizer.decode(ids[:count] + more).startswith(text)
        assert text + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", [(), ("never \ufffd\ufffd", FLAG)])
def test_each_id_is_decoded_once(tokenizer: Counting, stop: tuple[str, ...]) -> None:
    rng = random.Random(1)
    ids = [id for _ in range(1000) for id in random_ids(tokenizer, rng)][:4000]
    completion, tokenizer.decoded, shown = TextCompletion(tokenizer, stop), 0, []
    for start in range(0, len(ids), 8):
        ended = completion.add(ids[start : start + 8], [0.0] * 8, None)
        shown.append(completion.take())
        if ended:
            break
    assert tokenizer.decoded <= start + 8
    assert ended == bool(stop) and "".join(shown) == completion.text


class Pieces:
    """A tokenizer whose ids are indices of these texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.vocab_size = texts, len(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.texts[id] for id in ids)

    def byte(self, id: int) -> None:
        return None


@pytest.mark.parametrize("text", ["oSTOPs", "SSTOP", "STSTOPP"])
def test_a_stop_text_is_found_however_tokens_divide_it(text: str) -> None:
    """All ways to cut the text into tokens, which come one at a time or together."""
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        ends = [place for place, cut in enumerate(cuts, 1) if cut] + [len(text)]
        tokens = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        before = text[: text.index("STOP")]
        needed = next(n for n in range(len(tokens) + 1) if len("".join(tokens[:n])) >= len(before))
        for stride in (1, len(tokens)):
            tokenizer = cast(Tokenizer, Pieces(tokens))
            completion, shown, ended = TextCompletion(tokenizer, ["STOP", "none"]), "", False
            for start in range(0, len(tokens), stride):
                ids = range(start, min(start + stride, len(tokens)))
                top = [[(id, 0.0)] for id in ids]
                ended = ended or completion.add(list(ids), [float(id) for id in ids], None, top)
                shown += completion.take()
            assert ended and shown == completion.text == before
            kept = list(range(needed))
            assert completion.token_ids == completion.log_probs == kept
            assert completion.top_log_probs == [[(id, 0.0)] for id in kept]


def test_a_stop_text_cuts_at_its_first_place_and_keeps_the_tokens_before_it(tokenizer: Tokenizer) -> None:
    """Whatever tokens it begins and ends in, and however many of them come at a time."""
    rng = random.Random(2)
    for _ in range(2000):
        ids = random_ids(tokenizer, rng)
        whole = tokenizer.decode(ids)
        at = rng.randrange(len(whole) or 1)
        stop = whole[at : at + rng.randrange(1, 5)] or "x"
        for stride in (1, 3, 100):
            completion, shown, ended = TextCompletion(tokenizer, [stop, "never there"]), "", False
            for start in range(0, len(ids), stride):
                new = ids[start : start + stride]
                ended = completion.add(
                    new, [0.0] * len(new), "length" if start + stride >= len(ids) else None
                )
                shown += completion.take()
                if ended:
                    break
            assert shown == completion.text
            if ended:
                assert completion.text == whole[: whole.index(stop)] and completion.finish_reason == "stop"
                kept = completion.token_ids
                assert kept == ids[: len(kept)] and len(completion.log_probs) == len(kept)
                assert tokenizer.decode(kept).startswith(completion.text)
                if kept and not completion.text.endswith("\ufffd"):  # which two tokens can settle
                    assert not tokenizer.decode(kept[:-1]).startswith(completion.text)
            else:
                detokenizer = Detokenizer(tokenizer)
                assert completion.text == whole
                assert stop not in "".join(map(detokenizer.add, ids))
