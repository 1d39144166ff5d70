"""A dialogue with a model: what it is given, what is remembered, how it ends."""

from collections.abc import Sequence
from typing import Any

import pytest

from gemma_jax import Gemma
from gemma_jax.config import PRESETS, ComputeConfig, replace
from gemma_jax.data.chat import encode_dialogue
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.testing import cpu_mesh
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

SHORT = {"max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"{a} and {b} are {a + b}\n" for a in range(40) for b in range(40)]
    return Tokenizer.train(texts, 390, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def make_gemma(tokenizer: Tokenizer, end_tokens: Sequence[int] = (1, 107)) -> Gemma:
    config = replace(PRESETS["gemma_tiny"], {"vocab_size": 390, "context_length": 128})
    spec = ModelSpec(config, ComputeConfig(), cpu_mesh(1))
    return Gemma(spec, spec.init(0), tokenizer, end_tokens)


@pytest.fixture(scope="module")
def gemma(tokenizer: Tokenizer) -> Gemma:
    return make_gemma(tokenizer)


def test_an_answer_continues_the_whole_dialogue(gemma: Gemma) -> None:
    chat = gemma.chat(**SHORT)
    first = chat.send("1 and 2")
    second = chat.send(" 3 and 4\n", seed=5)
    assert chat.history == [
        {"role": "user", "content": "1 and 2"},
        {"role": "model", "content": first},
        {"role": "user", "content": " 3 and 4\n"},
        {"role": "model", "content": second},
    ]
    prompt = encode_dialogue(gemma.tokenizer, chat.history[:-1], answer=True)
    assert second == gemma.generate([prompt], **SHORT, seed=5)[0].text
    prompt = encode_dialogue(gemma.tokenizer, chat.history[:1], answer=True)
    assert first == gemma.generate([prompt], **SHORT)[0].text
    # Each answer draws with a seed of its own, the chat's and the number of the turn.
    answers = [gemma.chat(history=chat.history[:2], **SHORT, seed=seed).send("1") for seed in (7, 7, 8)]
    turns = [*chat.history[:2], {"role": "user", "content": "1"}]
    prompt = encode_dialogue(gemma.tokenizer, turns, answer=True)
    assert answers[0] == answers[1] == gemma.generate([prompt], **SHORT, seed=8)[0].text != answers[2]


def test_a_turn_computes_only_what_is_new(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second prompt, everything up to the first answer's beginning is in the cache already."""
    starts, generator, prefill = [], gemma._generator, gemma._generator.prefill

    def spy(params: Any, tokens: Any, start: int, *rest: Any, **sizes: Any) -> Any:
        starts.append(start)
        return prefill(params, tokens, start, *rest, **sizes)

    monkeypatch.setattr(generator, "prefill", spy)
    chat = gemma.chat(**SHORT)
    chat.send(" and ".join(map(str, range(10, 25))))
    first = encode_dialogue(gemma.tokenizer, chat.history[:1], answer=True)
    chat.send("3 and 4")
    assert starts[0] == 0 and starts[1] >= len(first)
    fresh = gemma.chat(**SHORT, history=chat.history[:2])
    generator.kept = None
    assert fresh.send("3 and 4") == chat.history[-1]["content"]


def test_streamed_pieces_are_the_answer(gemma: Gemma) -> None:
    chat = gemma.chat(**SHORT)
    pieces = list(chat.stream("1 and 2"))
    assert len(pieces) > 1 and "" not in pieces
    assert "".join(pieces) == chat.history[-1]["content"] == gemma.chat(**SHORT).send("1 and 2")
    prompt = encode_dialogue(gemma.tokenizer, chat.history[:1], answer=True)
    assert chat.finish_reason == gemma.generate([prompt], **SHORT)[0].finish_reason


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_was_made(gemma: Gemma) -> None:
    chat = gemma.chat(max_new_tokens=16, temperature=1.0)
    piece = next(answer := chat.stream("1 and 2"))
    answer.close()  # a generator, which is what a `for` that breaks closes
    assert chat.history[-1] == {"role": "model", "content": piece}
    assert chat.finish_reason is None
    assert chat.send("on") and len(chat.history) == 4


def test_end_of_turn_ends_an_answer_even_an_empty_one(tokenizer: Tokenizer, gemma: Gemma) -> None:
    prompt = encode_dialogue(tokenizer, [{"role": "user", "content": "1"}], answer=True)
    [generation] = gemma.generate([prompt], max_new_tokens=8)
    third = generation.token_ids[0]
    # Whatever the model says first ends its turn, as <end_of_turn> would.
    chat = make_gemma(tokenizer, [1, 107, third]).chat(max_new_tokens=8)
    assert chat.send("1") == "" and chat.finish_reason == "stop"
    assert [message["role"] for message in chat.history] == ["user", "model"]
    assert generation.finish_reason == "length" and len(generation.token_ids) == 8


def test_a_full_context_is_told_and_a_reset_helps(gemma: Gemma) -> None:
    chat = gemma.chat(max_new_tokens=500)
    chat.send("1 and 2")
    assert chat.finish_reason == "context"  # 128 tokens in all
    before = list(chat.history)
    with pytest.raises(UserError, match=naming("tokens", 128, "reset")):
        chat.send("and now?")
    assert chat.history == before
    chat.reset()
    assert chat.history == [] and chat.finish_reason is None
    assert chat.send("1 and 2") == before[1]["content"]


def test_a_system_instruction_is_part_of_the_first_turn(gemma: Gemma) -> None:
    chat = gemma.chat(system="Be brief.", **SHORT)
    answer = chat.send("1 and 2")
    assert answer == gemma.chat(**SHORT).send("Be brief.\n\n1 and 2")
    assert chat.history[0] == {"role": "user", "content": "1 and 2"}
    chat.reset()
    assert chat.send("1 and 2") == answer


def test_what_cannot_chat_says_why(tokenizer: Tokenizer, gemma: Gemma) -> None:
    base = make_gemma(tokenizer, [1])
    assert not base.instruction_tuned and gemma.instruction_tuned
    with pytest.raises(UserError, match=naming("generation_config.json", "--instruction_tuned yes")):
        base.chat()
    with pytest.raises(UserError, match="tokenizer.model"):
        Gemma.from_pretrained("random:gemma_tiny", instruction_tuned=True).chat()
    with pytest.raises(UserError, match="turn 1"):
        gemma.chat(history=[{"role": "model", "content": "a"}]).send("1")
