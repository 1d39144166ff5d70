"""The options of sampling, alone and together, against what the model says of the same tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from gemma_jax import Gemma
from gemma_jax.config import SamplingConfig, TokenBias
from gemma_jax.errors import UserError
from gemma_jax.sampling import Completion, Generator, Request
from gemma_jax.sampling.requests import requests_of
from gemma_jax.testing import cpu_mesh, relative_difference
from tests.messages import naming
from tests.sampling.lively import NEW, PROMPTS, VOCAB, complete, generator_of, lively_gemma, logits_at, run

HOT = {"max_new_tokens": NEW, "temperature": 1.0}


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return lively_gemma(cpu_mesh(1))


@pytest.fixture(scope="module")
def generator(gemma: Gemma) -> Generator:
    return generator_of(gemma)


@pytest.fixture(scope="module")
def plain(generator: Generator) -> list[Completion]:
    """Greedy completions of PROMPTS without any option."""
    return complete(generator, PROMPTS, SamplingConfig(NEW))


def after_options(logits: np.ndarray, config: SamplingConfig, seen: Sequence[int]) -> np.ndarray:
    """Logits [V] with the biases, the penalty on what was seen, and the forbidden tokens, one by one."""
    logits = logits.copy()
    for entry in config.logit_bias:
        logits[entry.token] += entry.bias
    for token in set(seen):
        logits[token] *= config.repetition_penalty if logits[token] < 0 else 1 / config.repetition_penalty
    logits[list(config.forbidden_tokens)] = -np.inf
    return logits


@pytest.mark.parametrize("rows", [0, 2])
def test_every_request_has_options_of_its_own(
    gemma: Gemma, generator: Generator, plain: list[Completion], rows: int
) -> None:
    """In one batch, and refilled: each token is the likeliest after the row's options."""
    third, last = plain[2].token_ids, plain[3].token_ids
    alike = tuple(TokenBias(token, 100.0) for token in range(30))
    biases = (TokenBias(7, 2.0), TokenBias(7, 2.0), TokenBias(last[0], -9.0))
    configs = [
        SamplingConfig(NEW),
        SamplingConfig(NEW, repetition_penalty=1e6, forbidden_tokens=(0, 1, 3), logit_bias=alike),
        SamplingConfig(NEW, repetition_penalty=1.3, forbidden_tokens=tuple(third[-3:])),
        SamplingConfig(NEW, logit_bias=biases, forbidden_tokens=tuple(last[2:])),
    ]
    requests = [
        Request(prompt, config, (), number)
        for number, (prompt, config) in enumerate(zip(PROMPTS, configs, strict=True))
    ]
    made = run(generator, requests, rows)
    assert made[0].token_ids == plain[0].token_ids
    for prompt, config, completion, logits in zip(
        PROMPTS, configs, made, logits_at(gemma, PROMPTS, made), strict=True
    ):
        own = log_softmax(logits, axis=-1)[np.arange(NEW), completion.token_ids]
        assert relative_difference(completion.log_probs, own) < 1e-5
        for place, token in enumerate(completion.token_ids):
            seen = prompt + completion.token_ids[:place]
            assert token == after_options(logits[place], config, seen).argmax(), (config, place)
    # The penalty hides each biased token of the prompt, and each one once it was chosen.
    assert len(set(made[1].token_ids)) == NEW
    assert set(made[1].token_ids) <= set(range(30)) - {0, 1, 3, *PROMPTS[1]}


def test_a_text_is_the_same_alone_and_in_any_batch(gemma: Gemma) -> None:
    """A config for each prompt, with every option; in any order and refilled."""
    biases = (TokenBias(9, 3.0), TokenBias(11, -2.0))
    configs = [
        SamplingConfig(NEW, temperature=1.0, seed=5, min_p=0.01, end_tokens=(77, 78)),
        SamplingConfig(NEW, temperature=2.0, top_k=30, top_p=0.9, repetition_penalty=1.5, samples=3),
        SamplingConfig(NEW, temperature=1.5, logit_bias=biases, forbidden_tokens=(3, 4)),
        SamplingConfig(5, top_log_probs=3, prompt_log_probs=True),
    ]
    whole = gemma.generate(PROMPTS, configs)
    assert len(whole) == 6 and len({tuple(x.token_ids) for x in whole}) == 6
    requests = requests_of(PROMPTS, configs, gemma.end_tokens)
    made = run(gemma._generator, requests[::-1], rows=2)[::-1]
    for one, of_whole in zip(made, whole, strict=True):
        assert (one.token_ids, one.finish_reason) == (of_whole.token_ids, of_whole.finish_reason)
        assert relative_difference(one.log_probs, of_whole.log_probs) < 1e-5
    [alone] = gemma.generate(PROMPTS[:1], configs[0])
    assert alone.token_ids == whole[0].token_ids


@pytest.mark.parametrize("rows", [1, 3, 0])
def test_a_prompt_is_prefilled_once_for_all_its_samples(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Also where its samples begin at different times; and samples have the text of a prompt of their own."""
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    config = SamplingConfig(NEW, temperature=1.0, samples=3, end_tokens=tuple(range(50)))
    requests = requests_of(prompts, config, config.end_tokens)
    alone = [run(generator, [request])[0] for request in requests]
    assert len({len(completion.token_ids) for completion in alone}) > 3
    prefill, lengths = generator.prefill, []

    def counting(params: Any, tokens: Any, start: int, *rest: Any, **size: int) -> Any:
        lengths.extend(rest[0][rest[0] > 0].tolist() if start == 0 else [])
        return prefill(params, tokens, start, *rest, **size)

    monkeypatch.setattr(generator, "prefill", counting)
    made = run(generator, requests, rows)
    for actual, expected in zip(made, alone, strict=True):
        assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert relative_difference(actual.log_probs, expected.log_probs) < 1e-5
    # The third prompt is the first once more: with one slot it is gone by then, with few it may be.
    once = sorted(len(prompt) for prompt in PROMPTS[:3])
    twice = sorted([*once, len(PROMPTS[1])])
    assert sorted(lengths) in {1: [twice], 2: [once, twice], 3: [once, twice], 5: [once], 0: [once]}[rows]


def test_samples_share_a_prefill_on_a_mesh(gemma: Gemma) -> None:
    config = SamplingConfig(samples=3, repetition_penalty=1.2, logit_bias=(TokenBias(5, 1.0),), **HOT)
    spread = lively_gemma(cpu_mesh(8, fsdp=4, tensor=2))
    for actual, expected in zip(
        spread.generate(PROMPTS[:3], config, batch_size=4), gemma.generate(PROMPTS[:3], config), strict=True
    ):
        assert actual.token_ids == expected.token_ids


def test_log_probabilities_of_the_likeliest_tokens_and_of_the_prompt(gemma: Gemma) -> None:
    """For each token that is left at the end, and for those requests that ask for them."""
    counts = [3, 0, 40, VOCAB]
    configs = [SamplingConfig(top_log_probs=count, prompt_log_probs=count != 3, **HOT) for count in counts]
    made = gemma.generate(PROMPTS, configs, end_tokens=[*range(2, 60, 3)])
    assert {x.finish_reason for x in made} == {"stop", "length"}
    for count, x, logits in zip(counts, made, logits_at(gemma, PROMPTS, made), strict=True):
        expected = log_softmax(logits, axis=-1)
        assert len(x.top_log_probs) == (len(x.token_ids) if count else 0)
        for of_token, of_step in zip(x.top_log_probs, expected, strict=count > 0):
            tokens, values = zip(*of_token, strict=True)
            likeliest = np.sort(of_step)[::-1][:count]
            np.testing.assert_allclose(of_step[list(tokens)], likeliest, rtol=1e-5, atol=1e-6)
            assert len(set(tokens)) == count
            np.testing.assert_allclose(values, of_step[list(tokens)], rtol=1e-4, atol=1e-5)
    for x, of_prompt in zip(made[1:], gemma.score(PROMPTS)[1:], strict=True):
        np.testing.assert_allclose(x.prompt_log_probs, of_prompt, rtol=1e-5)
    assert made[0].prompt_log_probs == []


def test_another_value_compiles_nothing(gemma: Gemma) -> None:
    def settings(number: int) -> SamplingConfig:
        return SamplingConfig(
            1 + number, 1.0 + number, number, 0.9 / number, number, 1, (), 0, 0.1 / number, 1.0 + number,
            tuple(TokenBias(token, 1.0) for token in range(number)), (7,) * number, (8,) * number, number,
        )  # fmt: skip

    generator = generator_of(gemma)
    programs = [generator.prefill, generator.begin, generator.decode]
    complete(generator, PROMPTS, settings(1))
    before = [program._cache_size() for program in programs]
    for number in (2, 3):
        complete(generator, PROMPTS, settings(number))
    assert [program._cache_size() for program in programs] == before


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"forbidden_tokens": [3, VOCAB]}, naming("forbidden_tokens", VOCAB, 0, VOCAB - 1)),
    ({"forbidden_tokens": [-1]}, naming("forbidden_tokens", -1)),
    ({"forbidden_tokens": [*range(VOCAB)]}, naming("forbidden_tokens", VOCAB)),
    ({"end_tokens": [VOCAB]}, naming("end_tokens", VOCAB)),
    ({"logit_bias": {VOCAB: 1.0}}, naming("logit_bias", VOCAB)),
    ({"logit_bias": {3: float("inf")}}, naming("logit_bias", "inf")),
    ({"logit_bias": [{"token": 3}]}, naming("logit_bias", "bias")),
    ({"logit_bias": {"a": 1.0}}, "logit_bias.*token.*integer, not 'a'"),
    ({"top_log_probs": VOCAB + 1}, naming("top_log_probs", VOCAB + 1, VOCAB)),
    ({"min_p": 1.5}, naming("min_p", 1.5, 0, 1)),
    ({"min_p": float("nan")}, naming("min_p", "nan")),
    ({"repetition_penalty": 0.0}, naming("repetition_penalty", 0.0)),
    ({"repetition_penalty": float("inf")}, naming("repetition_penalty", "inf")),
    ({"temperature": float("inf")}, naming("temperature", "inf")),
    ({"temperature": float("nan")}, naming("temperature", "nan")),
    ({"top_p": 0.0}, naming("top_p", 0.0)),
    ({"max_new_tokens": 0}, naming("max_new_tokens", 0)),
    ({"config": [SamplingConfig()]}, naming(1, 2)),
    ({"config": [SamplingConfig(), SamplingConfig(batch_size=2)]}, naming("batch_size", 0, 2)),
]


@pytest.mark.parametrize(("settings", "told"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_options_end_in_one_sentence(gemma: Gemma, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        gemma.generate([[2], [3]], **settings)
