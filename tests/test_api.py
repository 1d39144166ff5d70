"""`Gemma`: text in, text out; streaming, several samples, stop texts. (tests/sampling covers token ids.)"""

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from gemma_jax import Gemma
from gemma_jax.config import PRESETS, ComputeConfig, SamplingConfig, replace
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.testing import cpu_mesh, tiny_gemma
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

HOT = {"temperature": 1.5, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Gemma:
    """A random model with a tokenizer: it talks nonsense, broken bytes included."""
    texts = [f"{a} {b} été naïve 日本 {a * b}\n" for a in range(60) for b in range(60)]
    tokenizer = Tokenizer.train(texts, 410, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    config = replace(PRESETS["gemma_tiny"], {"vocab_size": 410})
    spec = ModelSpec(config, ComputeConfig(), cpu_mesh(1))
    return Gemma(spec, spec.init(0), tokenizer)


@pytest.mark.parametrize("seed", range(5))
def test_streamed_pieces_join_to_what_generate_gives(gemma: Gemma, seed: int) -> None:
    whole = gemma.generate(["12 13"], seed=seed, **HOT)[0].text
    pieces = list(gemma.stream("12 13", seed=seed, **HOT))
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert "\ufffd" in gemma.generate(["12 13"], seed=0, **HOT)[0].text  # the held-back case does occur


def test_a_stop_text_ends_a_continuation_and_is_cut_off(gemma: Gemma) -> None:
    free = gemma.generate(["1 2"], seed=3, **HOT)[0]
    # A stop text from the middle of what would come, across token borders.
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    cut = gemma.generate(["1 2"], seed=3, stop=[stop, "never there"], **HOT)[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert gemma.tokenizer.decode(cut.token_ids).startswith(cut.text)
    assert len(cut.log_probs) == len(cut.token_ids) < len(free.token_ids)
    assert "".join(gemma.stream("1 2", seed=3, stop=[stop], **HOT)) == cut.text


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, naming("temperature", -1.0)),
    ({"top_k": 2.9}, naming("top_k", "integer", 2.9)),
    ({"samples": 10**9}, naming("1,000,000,000", "1,073,741,824", "GiB")),
    ({"samples": 10**9, "batch_size": 8}, naming("1,000,000,000", 8, "GiB")),
    ({"stop": "return"}, naming("stop", "list", "'return'")),
    ({"stop": [""]}, naming("stop", "empty")),
    ({"temprature": 1.0}, naming("'temprature'", "temperature")),
    ({"config": SamplingConfig(top_k=2.9)}, naming("top_k", "integer", 2.9)),
]


@pytest.mark.parametrize(("settings", "told"), WRONG, ids=str)
def test_wrong_settings_end_in_one_sentence(gemma: Gemma, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        gemma.generate(["1"], **settings)


def test_settings_come_as_a_config_or_as_keywords(gemma: Gemma) -> None:
    config = SamplingConfig(max_new_tokens=5, temperature=2.0, seed=np.int64(3))
    from_config = gemma.generate(["1"], config, max_new_tokens=4)
    assert from_config == gemma.generate(["1"], max_new_tokens=4, temperature=2, seed=3)
    assert "".join(gemma.stream("1", config)) == gemma.generate(["1"], config)[0].text
    others = SamplingConfig(min_p=0.05, repetition_penalty=1.5, **HOT)
    both = gemma.generate(["1", "2 3"], [config, others], logit_bias={9: 2.0}, forbidden_tokens=[5])
    alone = gemma.generate(["1", "2 3"], others, logit_bias={9: 2.0}, forbidden_tokens=[5])
    assert both[1].token_ids == alone[1].token_ids and len(both[0].token_ids) <= 5
    [first] = gemma.generate(["2 3"], others, stop=["1"], end_tokens=[7])
    assert "".join(gemma.stream("2 3", others, stop=["1"], end_tokens=[7])) == first.text


def test_mistakes_are_told(gemma: Gemma) -> None:
    for prompts, told in [(["1", b"1"], "bytes"), ("1", "list"), ([[2, None]], "integer")]:
        with pytest.raises(UserError, match=told):
            gemma.generate(prompts)
    for setting, value in {"samples": 2, "top_log_probs": 3, "prompt_log_probs": True}.items():
        with pytest.raises(UserError, match=naming(setting, value)):
            gemma.stream("1", **{setting: value})
    with pytest.raises(UserError, match="tokenizer.model"):
        tiny_gemma().generate(["text"])
    smaller = replace(gemma.config, {"vocab_size": gemma.tokenizer.vocab_size - 1})
    with pytest.raises(UserError, match=naming(410, 409)):
        Gemma(ModelSpec(smaller, gemma.compute, gemma.mesh), gemma.params, gemma.tokenizer)
    assert gemma.generate([]) == []


def test_logits_of_any_number_of_rows_on_a_mesh() -> None:
    rows = np.random.default_rng(0).integers(0, 512, (3, 7))
    on_one = tiny_gemma(cpu_mesh(1)).logits(rows)
    on_eight = tiny_gemma(cpu_mesh(8, fsdp=4, tensor=2)).logits(rows)
    assert on_one.shape == (3, 7, 512) and on_one.dtype == np.float32
    np.testing.assert_allclose(on_eight, on_one, atol=1e-5)


def test_scores_are_those_of_the_logits_for_any_lengths_on_any_mesh() -> None:
    """More rows of one length than a batch takes, in no order; and one that is as long as the context."""
    rng = np.random.default_rng(0)
    lengths = [3, 200, 1, 256, *rng.integers(2, 17, 300), 40]
    sequences = [rng.integers(0, 512, length).tolist() for length in lengths]
    padded = np.zeros((len(sequences), 256), int)
    for row, ids in enumerate(sequences):
        padded[row, : len(ids)] = ids
    logits = np.concatenate([tiny_gemma().logits(rows).astype(np.float64) for rows in np.split(padded, 5)])
    log_probs = log_softmax(logits, axis=-1)
    for mesh in (cpu_mesh(1), cpu_mesh(8, fsdp=4, tensor=2)):
        scores = tiny_gemma(mesh).score(sequences)
        for row, (ids, of_row) in enumerate(zip(sequences, scores, strict=True)):
            expected = log_probs[row, np.arange(len(ids) - 1), ids[1:]]
            np.testing.assert_allclose(of_row, expected, rtol=1e-5, atol=1e-5)


def test_scores_of_generated_tokens_and_of_texts(gemma: Gemma) -> None:
    [generation] = gemma.generate(["12 13"], seed=1, **HOT)
    prompt = [gemma.tokenizer.bos_id, *gemma.tokenizer.encode_typed("12 13")]
    [scores] = gemma.score([prompt + generation.token_ids])
    np.testing.assert_allclose(scores[len(prompt) - 1 :], generation.log_probs, rtol=1e-4, atol=1e-5)
    typed = "<eos> is no control token"
    ids = [gemma.tokenizer.bos_id, *gemma.tokenizer.encode_typed(typed)]
    of_typed, of_one = gemma.score([typed, [2]])
    np.testing.assert_allclose(of_typed, gemma.score([ids])[0], rtol=1e-4, atol=1e-5)
    assert of_one == []
    for bad, told in [
        ("text", "list"),
        ([[]], naming(0, 1, 256)),
        ([[0] * 257], naming(257, 1, 256)),
        ([[410]], naming(410, 0, 409)),
    ]:
        with pytest.raises(UserError, match=told):
            gemma.score(bad)
