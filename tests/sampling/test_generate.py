"""Generation against what the model itself says of the same tokens."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.config import PRESETS, ComputeConfig, SamplingConfig
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.sampling import Completion, Generator, batch, complete_requests
from gemma_jax.sampling.decode import Said
from gemma_jax.sampling.requests import Request, Widths, padded, requests_of, slot_settings
from gemma_jax.testing import cpu_mesh, relative_difference
from tests.messages import naming
from tests.sampling.lively import NEW, PROMPTS, VOCAB, complete, generator_of, lively_gemma, predictions, run
from tests.weights.kinds import adapters, with_random_adapters


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return lively_gemma(cpu_mesh(1))


@pytest.fixture(scope="module")
def generator(gemma: Gemma) -> Generator:
    return generator_of(gemma)


@pytest.fixture(scope="module")
def greedy(generator: Generator) -> list[Completion]:
    """Returns greedy completions of PROMPTS, without stop tokens."""
    return complete(generator, PROMPTS, SamplingConfig(NEW))


def test_greedy_takes_the_likeliest_token_at_every_step(gemma: Gemma, greedy: list[Completion]) -> None:
    assert len({token for completion in greedy for token in completion.token_ids}) > 2 * NEW
    for completion, expected in zip(greedy, predictions(gemma, PROMPTS, greedy), strict=True):
        assert completion.token_ids == expected.argmax(axis=-1).tolist()
        assert (len(completion.token_ids), completion.finish_reason) == (NEW, "length")


@pytest.mark.parametrize("settings", [
    SamplingConfig(NEW),
    SamplingConfig(NEW, temperature=1.0, seed=3),
    SamplingConfig(NEW, temperature=3.0, top_k=40, top_p=0.9, seed=4),
])  # fmt: skip
def test_log_probs_are_those_of_the_logits(
    gemma: Gemma, generator: Generator, settings: SamplingConfig
) -> None:
    """Of the model's own distribution: neither temperature nor cuts change them."""
    completions = complete(generator, PROMPTS, settings)
    for completion, expected in zip(completions, predictions(gemma, PROMPTS, completions), strict=True):
        of_chosen = expected[np.arange(NEW), completion.token_ids]
        assert relative_difference(completion.log_probs, of_chosen) < 1e-5


def test_seeds_decide_the_samples(generator: Generator) -> None:
    def sample(seed: int) -> list[list[int]]:
        settings = SamplingConfig(NEW, temperature=1.0, seed=seed)
        return [c.token_ids for c in complete(generator, [[2, 3]] * 4, settings)]

    first = sample(0)
    assert sample(0) == first
    assert len({tuple(row) for row in [*first, *sample(1)]}) == 8  # rows and seeds all differ
    assert max(max(row) for row in first) < VOCAB
    # Every step draws anew: where all tokens are equally likely, a row repeats hardly any.
    even = complete(generator, PROMPTS, SamplingConfig(NEW, temperature=1e6))
    assert all(len(set(completion.token_ids)) >= NEW - 2 for completion in even)


def test_an_end_token_ends_its_own_row_and_is_left_out(
    generator: Generator, greedy: list[Completion]
) -> None:
    end = greedy[1].token_ids[4]
    for ended, whole in zip(complete(generator, PROMPTS, SamplingConfig(NEW), [end]), greedy, strict=True):
        if end in whole.token_ids:
            at = whole.token_ids.index(end)
            assert (ended.token_ids, ended.finish_reason) == (whole.token_ids[:at], "stop")
            assert len(ended.log_probs) == at
        else:
            assert ended == whole
    first = [completion.token_ids[0] for completion in greedy]
    assert complete(generator, PROMPTS, SamplingConfig(NEW), first) == [Completion([], [], "stop")] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_made_does_not_depend_on_how_often_it_is_looked_at(
    generator: Generator, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "LOOK_SECONDS", 0)
    config = SamplingConfig(NEW, temperature=temperature, seed=2)
    requests, completions = requests_of(PROMPTS, config, []), [Completion() for _ in PROMPTS]
    looks = [
        len(completions[0].token_ids)
        for _ in complete_requests(generator, requests, completions, watched=True)
    ]
    assert sorted({*looks}) == [*range(NEW + 1)]
    assert completions == complete(generator, PROMPTS, config)


def test_a_row_that_its_caller_ends_gets_no_further_token(
    generator: Generator, greedy: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "LOOK_SECONDS", 0)

    class Short(Completion):
        def add(self, *new: Any) -> bool:
            super().add(*new)
            return len(self.token_ids) >= 4

    completions = [Completion(), Completion(), Short(), Completion()]
    for _ in complete_requests(
        generator, requests_of(PROMPTS, SamplingConfig(NEW), []), completions, watched=True
    ):
        pass
    assert [len(completion.token_ids) for completion in completions] == [NEW, NEW, 4, NEW]
    for completion, whole in zip(completions, greedy, strict=True):
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]


@pytest.mark.parametrize("rows", [1, 3])
def test_refilled_slots_make_what_fresh_ones_make(generator: Generator, rows: int) -> None:
    """Rows with limits, end tokens, seeds and settings of their own, in more requests than slots.

    Also with the requests in reverse: neither the others nor the order of the work change a row.
    """
    configs = [
        SamplingConfig(5, temperature=1.0, seed=1),
        SamplingConfig(NEW),
        SamplingConfig(1),
        SamplingConfig(NEW, temperature=2.0, top_k=7, top_p=0.9, seed=2),
    ]
    ends = [[], complete(generator, PROMPTS[1:2], SamplingConfig(NEW))[0].token_ids[4:6], [3], [1, 2, 4]]
    requests = [
        Request(prompt, config, end, prompt=number, sample=sample)
        for number, (prompt, config, end) in enumerate(zip(PROMPTS, configs, ends, strict=True))
        for sample in range(2)
    ]

    alone = [run(generator, [request])[0] for request in requests]
    assert {completion.finish_reason for completion in alone} == {"stop", "length"}
    assert alone[0] != alone[1]
    for order in (1, -1):
        for actual, expected in zip(run(generator, requests[::order], rows)[::order], alone, strict=True):
            assert (actual.token_ids, actual.finish_reason) == (expected.token_ids, expected.finish_reason)
            assert relative_difference(actual.log_probs, expected.log_probs) < 1e-5


@pytest.mark.parametrize("mesh", [{}, {"devices": 8, "fsdp": 4, "tensor": 2}], ids=["one", "eight"])
def test_what_prompts_begin_with_together_is_computed_once(mesh: dict[str, int]) -> None:
    """The tokens that all prompts share are not in the chunks of the single prompts, and nothing changes."""
    generator = generator_of(lively_gemma(cpu_mesh(**{"devices": 1, **mesh})))
    rng = np.random.default_rng(3)
    shared = rng.integers(0, VOCAB, 50).tolist()
    prompts = [shared + rng.integers(0, VOCAB, length).tolist() for length in (3, 9, 20)]
    config = SamplingConfig(NEW, temperature=1.0)
    requests = requests_of(prompts, config, [])
    alone = [run(generator, [request])[0] for request in requests]
    starts, prefill = [], generator.prefill

    def spy(params: Any, tokens: Any, start: int, *rest: Any, **sizes: Any) -> Any:
        starts.append((start, tokens.shape[1]))
        return prefill(params, tokens, start, *rest, **sizes)

    generator.prefill = spy
    together = run(generator, requests)
    assert starts == [(0, 64), (50, 32)]
    for actual, expected in zip(together, alone, strict=True):
        assert actual.token_ids == expected.token_ids
        assert relative_difference(actual.log_probs, expected.log_probs) < 1e-5


@pytest.mark.parametrize("length", [700, pytest.param(8192, marks=pytest.mark.slow)])
def test_a_cache_grows_with_its_text(length: int) -> None:
    """Up to the whole context, in which every token is that of one forward pass."""
    gemma = lively_gemma(cpu_mesh(1), context_length=length)
    prompts = [[2, 17, 300], [2] + [5, 9] * 30]
    completions = complete(generator_of(gemma), prompts, SamplingConfig(length))
    assert [completion.finish_reason for completion in completions] == ["context", "context"]
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(prompt) + len(completion.token_ids) == length
        new = len(completion.token_ids)
        expected = predictions(gemma, [prompt], [completion], length)
        assert completion.token_ids == next(iter(expected))[:new].argmax(axis=-1).tolist()


@pytest.mark.parametrize("mesh", [{}, {"devices": 8, "fsdp": 4, "tensor": 2}], ids=["one", "eight"])
def test_a_cache_of_int8_grows_and_is_refilled(mesh: dict[str, int]) -> None:
    """With fewer slots than prompts: as each prompt alone on one device."""
    compute = ComputeConfig(dtype="float32", cache="int8")

    def generator(gemma: Gemma) -> Generator:
        return Generator(dataclasses.replace(gemma.spec, compute=compute), gemma.params)

    requests = requests_of(PROMPTS, SamplingConfig(140), [])
    one, spread = lively_gemma(cpu_mesh(1)), lively_gemma(cpu_mesh(**{"devices": 1, **mesh}))
    alone = [run(generator(one), [request])[0] for request in requests]
    for actual, expected in zip(run(generator(spread), requests, 2), alone, strict=True):
        assert actual.token_ids == expected.token_ids
        assert relative_difference(actual.log_probs, expected.log_probs) < 1e-3
    exact = complete(generator_of(one), PROMPTS[:1], SamplingConfig(NEW))[0]
    assert 1e-5 < relative_difference(alone[0].log_probs[:4], exact.log_probs[:4]) < 0.05


@pytest.mark.parametrize("mesh", [{}, {"devices": 8, "fsdp": 4, "tensor": 2}], ids=["one", "eight"])
def test_prefill_in_chunks_equals_one_forward_pass(mesh: dict[str, int]) -> None:
    """Prompts of one to three chunks, one of them as long as two chunks, in one batch."""
    gemma = lively_gemma(cpu_mesh(**{"devices": 1, **mesh}), context_length=2048)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (1300, 3, 1024, 700)]
    completions = complete(generator_of(gemma), prompts, SamplingConfig(4))
    for completion, expected in zip(completions, predictions(gemma, prompts, completions, 1312), strict=True):
        assert completion.token_ids == expected.argmax(axis=-1).tolist()
        of_chosen = expected[np.arange(4), completion.token_ids]
        assert relative_difference(completion.log_probs, of_chosen) < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_guesses_change_nothing(generator: Generator, temperature: float) -> None:
    """Of prompts that repeat themselves and of one that does not, with limits, end tokens and a penalty."""
    prompts = [[2, 5, 9, 7] * 5, [2, 17, 300], [2, 8, 8, 8]]
    plain = SamplingConfig(40, temperature=temperature, repetition_penalty=1.1, seed=4)
    expected = complete(generator, prompts, plain)
    ends = [expected[1].token_ids[20]]
    for end in ([], ends):
        guessed = complete(generator, prompts, dataclasses.replace(plain, prompt_lookup=3), end)
        for actual, wanted in zip(guessed, complete(generator, prompts, plain, end), strict=True):
            assert (actual.token_ids, actual.finish_reason) == (wanted.token_ids, wanted.finish_reason)
            assert relative_difference(actual.log_probs, wanted.log_probs) < 1e-5


def test_a_slot_that_is_done_writes_nothing_into_its_cache(generator: Generator) -> None:
    """Of two prompts of three tokens, one takes a single step and the other all of them."""
    requests = [Request([2, 17, 300], SamplingConfig(new), []) for new in (2, NEW)]
    settings = slot_settings(requests, 2, Widths(), generator.config.context_length)
    tokens, lengths = padded([request.token_ids for request in requests], 2, 16)
    arguments = (tokens, 0, lengths, settings.adapters, None)
    prompts = generator.prefill(generator.params, *arguments, size=32)
    slots, _ = generator.begin(generator.params, prompts, settings, Said())
    slots, _ = generator.decode(generator.params, slots, NEW)
    # The newest token of each is not in the cache yet.
    assert slots.cache.lengths.tolist() == [3 + 2 - 1, 3 + NEW - 1]


def test_samples_of_a_prompt_stand_together_and_differ(generator: Generator) -> None:
    """A further sample leaves the first one as it is, and each draws for itself."""

    def rows(samples: int) -> list[list[int]]:
        config = SamplingConfig(NEW, temperature=1.0, seed=8, samples=samples)
        return [completion.token_ids for completion in complete(generator, [[2, 3]] * 2, config)]

    three = rows(3)
    assert len(set(map(tuple, three))) == 6
    assert rows(1) == [three[0], three[3]]


def test_a_full_context_ends_a_row(gemma: Gemma, greedy: list[Completion]) -> None:
    """Rows fill a context of 14 at different steps; the last has room for all that was asked for."""
    narrow = generator_of(gemma, context_length=14)
    completions = complete(narrow, PROMPTS, SamplingConfig(NEW))
    assert [len(c.token_ids) for c in completions] == [11, 3, 7, 12]
    assert [c.finish_reason for c in completions] == ["context", "context", "context", "length"]
    for completion, whole in zip(completions, greedy, strict=True):
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]


def test_more_rows_than_the_mesh_divides(generator: Generator) -> None:
    """Five rows on four parts of the batch and two of the heads are those of one device."""
    spread = generator_of(lively_gemma(cpu_mesh(8, fsdp=4, tensor=2)))
    prompts = [*PROMPTS, [2, 44, 45]]
    for settings in (SamplingConfig(NEW), SamplingConfig(NEW, temperature=1.0, seed=5)):
        actual = complete(spread, prompts, settings)
        expected = complete(generator, prompts, settings)
        assert [c.token_ids for c in actual] == [c.token_ids for c in expected]
        assert len(actual) == 5
        for a, b in zip(actual, expected, strict=True):
            assert relative_difference(a.log_probs, b.log_probs) < 1e-5


def test_gemma_generates_from_ids_and_ends_at_eos(gemma: Gemma, greedy: list[Completion]) -> None:
    """A model without a tokenizer: ids in, ids out, text empty."""
    generations = gemma.generate(PROMPTS, max_new_tokens=NEW)
    for generation, whole in zip(generations, greedy, strict=True):
        cut = whole.token_ids.index(1) if 1 in whole.token_ids else NEW
        assert generation.token_ids == whole.token_ids[:cut]
        assert generation.finish_reason == ("stop" if cut < NEW else "length")
        assert generation.text == ""
    of_array = gemma.generate([np.array(PROMPTS[0])], max_new_tokens=NEW)
    assert [generation.token_ids for generation in of_array] == [generations[0].token_ids]
    assert gemma.generate([]) == []


BAD_PROMPTS = {
    "empty": ([], naming(0, "tokens", 1, 255)),
    "fills the context": (
        [2] * 256,
        naming(256, "tokens", 1, 255, 256),
    ),
    "beyond the vocabulary": ([2, VOCAB], naming("token", VOCAB, 0, VOCAB - 1)),
    "negative": ([2, -1], naming("token", -1, 0, VOCAB - 1)),
    "text": ("hello", naming("tokenizer.model")),
}


@pytest.mark.parametrize(("prompt", "told"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_are_told_before_anything_is_computed(gemma: Gemma, prompt: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        gemma.generate([[2], prompt])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_long_prefill(dtype: Any) -> None:
    """8,000 tokens on the 2B with two layers in bfloat16: 1 GiB of temporaries on CPU, in every chunk."""
    config = dataclasses.replace(PRESETS["gemma_2b"], num_layers=2)
    spec = ModelSpec(config, ComputeConfig(dtype=dtype, param_dtype="bfloat16"), cpu_mesh(1))
    generator = Generator(spec, spec.params)
    chunk = generator.chunk(8000)
    integers = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1, chunk), (), (1,))]
    arguments = (spec.params, *integers, jax.ShapeDtypeStruct((1,), np.int32))
    so_far = jax.eval_shape(lambda *x: generator.prefill(*x, size=8064), *arguments)
    for before, size in ((None, 8064), (so_far, 0)):
        compiled = generator.prefill.lower(*arguments, before, size=size).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_each_row_has_its_own_adapter() -> None:
    spec = dataclasses.replace(lively_gemma(cpu_mesh(1)).spec, kind=adapters(count=2))
    generator = Generator(spec, with_random_adapters(spec.init(0), 1))

    def tokens(*adapters: int) -> list[list[int]]:
        requests = [Request([2, 17], SamplingConfig(NEW), [], adapter=adapter) for adapter in adapters]
        return [completion.token_ids for completion in run(generator, requests)]

    [first], [second] = tokens(0), tokens(1)
    assert first != second and tokens(1, 0, 1) == [second, first, second]
