"""Choosing a token, by answers that are forced and by frequencies that are known."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax

from gemma_jax.sampling.select import Options, keep_likeliest, likeliest, restricted, select
from gemma_jax.sampling.select import draw as draw_tokens

# Probabilities that float32 sums exactly, in no order. The likeliest is token 3, the next 1, then 5.
PROBABILITIES = np.array([1 / 32, 1 / 4, 1 / 16, 1 / 2, 1 / 32, 1 / 8])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 20_000

compiled = jax.jit(select)


def options(rows: int, **settings: Any) -> Options:
    """The same settings for all rows, except those that are arrays of one value for each row."""
    ids = {"top_k", "bias_tokens"}
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0} | settings

    def column(name: str) -> jax.Array:
        array = jnp.asarray(plain[name], jnp.int32 if name in ids else jnp.float32)
        return jnp.broadcast_to(array, (rows, *array.shape[1:]))

    return Options(**{name: column(name) for name in plain})


def draw(logits: np.ndarray, seen: Sequence[int] = (), **settings: Any) -> np.ndarray:
    """Tokens of many rows with the same logits and settings, each with a key of its own."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    marked = jnp.zeros(rows.shape, bool).at[:, list(seen)].set(True) if seen else None
    tokens, _ = compiled(rows, keys, options(DRAWS, **settings), marked)
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


@pytest.mark.parametrize(("settings", "tokens"), [
    ({"temperature": 0.0}, {3}),
    ({"temperature": 0.0, "top_k": 4, "top_p": 0.9}, {3}),
    ({"top_k": 1}, {3}),
    ({"top_p": 0.0}, {3}),  # the set is never empty
    ({"top_p": 0.5}, {3}),  # 1/2 alone holds it
    ({"top_p": 0.51}, {3, 1}),
    ({"top_p": 0.875}, {3, 1, 5}),
    ({"top_k": 2}, {3, 1}),
    ({"top_k": 2**31 - 1}, {0, 1, 2, 3, 4, 5}),
    ({}, {0, 1, 2, 3, 4, 5}),
    # Of the top 3, 4/7 and 2/7 hold 6/7 = 0.857; of all, 1/2 and 1/4 hold only 0.75.
    ({"top_k": 3, "top_p": 0.8}, {3, 1}),
    ({"top_p": 0.8}, {3, 1, 5}),
    # Temperature comes first: at 1/2 the shares are squared, and 1/4 : 1/16 hold 0.75 : 0.19 of the whole.
    ({"temperature": 0.5, "top_p": 0.7}, {3}),
    ({"temperature": 0.5, "top_p": 0.8}, {3, 1}),
    ({"temperature": 3e38}, {0, 1, 2, 3, 4, 5}),
    # Shares of the likeliest one: 1, 1/2, 1/4, 1/8, 1/16, 1/16. At temperature 1/2 they are squared.
    ({"min_p": 0.24}, {3, 1, 5}),
    ({"min_p": 0.26}, {3, 1}),
    ({"min_p": 1.0}, {3}),
    ({"min_p": 0.24, "temperature": 0.5}, {3, 1}),
    ({"min_p": 0.24, "top_k": 2}, {3, 1}),
    # 1/2, 1/4 and 1/8 hold 0.875 of all, but all of what min-p 0.2 leaves: top p comes first.
    ({"min_p": 0.2, "top_p": 0.8}, {3, 1, 5}),
    ({"min_p": 0.2, "top_p": 0.88}, {3, 1, 5}),
    # A token that is forbidden, and one that a bias of ln(16) makes as likely as the likeliest.
    ({"temperature": 0.0, "bias_tokens": [[3, 9]], "biases": [[-np.inf, 0]]}, {1}),
    ({"min_p": 0.9, "bias_tokens": [[4, 9]], "biases": [[np.log(16), 0]]}, {3, 4}),
    ({"bias_tokens": [[3, 4, 1]], "biases": [[-np.inf, -np.inf, -np.inf]]}, {0, 2, 5}),
    # The logits are negative, so the penalty multiplies them: (1/2)**2 = 1/4 is what token 1 has.
    ({"temperature": 0.0, "penalty": 2.01, "seen": [3]}, {1}),
    ({"temperature": 0.0, "penalty": 1.99, "seen": [3]}, {3}),
    ({"temperature": 0.0, "penalty": 9.0, "seen": [3, 1]}, {5}),
    # The bias comes before the penalty: ln(1/2) + 2 is positive and divided, 1.3 / 20 is above ln(1/4) + 1.
    ({"temperature": 0.0, "penalty": 20, "seen": [3], "bias_tokens": [[3]], "biases": [[2.0]]}, {3}),
])  # fmt: skip
def test_the_tokens_that_can_be_chosen(settings: dict[str, Any], tokens: set[int]) -> None:
    assert set(draw(LOGITS, **settings).tolist()) == tokens


def test_a_temperature_next_to_zero_takes_the_likeliest_token() -> None:
    """Positive logits divided by it would all be infinite, and the first of them chosen."""
    assert set(draw(LOGITS + 20, temperature=2e-38).tolist()) == {3}


def test_frequencies_are_those_of_the_distribution_that_is_left() -> None:
    """Pearson's chi-square; with the seed fixed the outcome is too, and a wrong share of 2% would show."""
    cases: dict[str, tuple[dict[str, Any], np.ndarray]] = {
        "model": ({}, PROBABILITIES),
        "temperature": ({"temperature": 2.0}, PROBABILITIES**0.5),
        "top k": ({"top_k": 3}, PROBABILITIES * [0, 1, 0, 1, 0, 1]),
        "penalty": ({"penalty": 2.0, "seen": [1, 3]}, PROBABILITIES ** np.array([1, 2, 1, 2, 1, 1])),
        "all": ({"temperature": 2.0, "top_k": 4, "top_p": 0.8}, PROBABILITIES**0.5 * [0, 1, 0, 1, 0, 1]),
    }
    for name, (settings, shares) in cases.items():
        counts = np.bincount(draw(LOGITS, **settings), minlength=6)
        expected = DRAWS * shares / shares.sum()
        assert (counts[expected == 0] == 0).all(), name
        used = expected > 0
        p_value = stats.chisquare(counts[used], expected[used]).pvalue
        assert p_value > 0.01, f"{name}: {counts} instead of {expected} (p {p_value:.2g})"


def test_frequencies_of_a_large_vocabulary() -> None:
    """Of several blocks, the last one incomplete. By chi-square again, over groups of 100 tokens."""
    rng, vocabulary, drawn = np.random.default_rng(0), 1200, []
    logits = rng.normal(0, 1, vocabulary).astype(np.float32)
    logits[500:520] = -np.inf
    rows, many = jnp.broadcast_to(logits - logits.max(), (1000, vocabulary)), jax.jit(draw_tokens)
    for seed in range(20):
        drawn.append(np.asarray(many(jax.random.split(jax.random.key(seed), 1000), rows)))
    counts = np.bincount(np.concatenate(drawn), minlength=vocabulary)
    assert len(counts) == vocabulary and (counts[500:520] == 0).all()
    expected = DRAWS * softmax(logits.astype(np.float64))
    for groups in (np.arange(vocabulary) // 100, rng.integers(0, 12, vocabulary)):
        observed, wanted = (np.bincount(groups, weights) for weights in (counts, expected))
        assert stats.chisquare(observed, wanted).pvalue > 0.01


def test_what_may_not_be_chosen_never_is() -> None:
    """Rows that pad the vocabulary are -inf, and a high temperature must not raise them."""
    logits = np.array([-np.inf, 0.0, -np.inf, 0.5, -np.inf], np.float32)
    wide: list[dict[str, Any]] = [{}, {"temperature": 3e38}, {"top_k": 4}, {"top_p": 0.9999999}]
    for settings in [*wide, {"top_k": 5, "top_p": 0.99}]:
        assert set(draw(logits, **settings).tolist()) == {1, 3}, settings
    assert set(draw(np.array([-np.inf, -5.0, -np.inf]), temperature=0.0).tolist()) == {1}


@pytest.mark.parametrize("limit", [1e-30, 0.3, 0.999, 1.0, np.inf])
def test_several_bits_in_one_pass_find_what_one_bit_finds(limit: float) -> None:
    """A TPU finds four at once."""
    logits = jnp.asarray(np.random.default_rng(0).integers(-40, 0, (3, 999)) / 4, jnp.float32)
    logits = logits.at[:, 0].set(0).at[1, 1:9].set(-jnp.inf)
    weights, limits = jax.nn.softmax(logits), jnp.full(3, limit, jnp.float32)
    kept = [np.isfinite(keep_likeliest(logits, weights, limits, bits)) for bits in (1, 4)]
    assert kept[0][:, 0].all()  # the likeliest
    np.testing.assert_array_equal(*kept)


def sorted_reference(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens of one row [V] are kept, by sorting in float64; ties with the last kept one are kept."""
    kept = logits >= (np.sort(logits)[::-1][min(top_k, len(logits)) - 1] if top_k else -np.inf)
    shares = np.where(kept, np.exp(logits.astype(np.float64)), 0)
    order = np.argsort(-shares, kind="stable")
    before = np.cumsum(shares[order]) - shares[order]
    held = order[(before < top_p * shares.sum()) | (before == 0)]
    if top_p < 1:
        kept &= logits >= logits[held].min()
    return kept & (np.exp(logits.astype(np.float64)) >= min_p)


@pytest.mark.parametrize("vocabulary", [7, 1000])
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_the_tokens_kept_are_those_of_sorting(vocabulary: int, spread: float) -> None:
    """Random logits with many ties, some of them -inf; each row has settings of its own."""
    rng, rows = np.random.default_rng(vocabulary), 200
    logits = np.round(rng.normal(0, spread, (rows, vocabulary)) * 4) / 4
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[:, 0] = 0
    logits = (logits - logits.max(axis=-1, keepdims=True)).astype(np.float32)
    top_k = rng.integers(0, vocabulary + 2, rows) * rng.integers(0, 2, rows)
    top_p = np.where(rng.random(rows) < 0.3, 1.0, rng.random(rows))
    min_p = np.where(rng.random(rows) < 0.5, 0.0, rng.random(rows) ** 3)
    settings = options(rows, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = np.isfinite(jax.jit(restricted)(jnp.asarray(logits), settings))
    for row, of_row in enumerate(zip(logits, top_k, top_p, min_p, strict=True)):
        expected = sorted_reference(*of_row) & np.isfinite(of_row[0])
        assert kept[row].tolist() == expected.tolist(), of_row


def test_every_row_has_settings_of_its_own() -> None:
    of_rows = options(
        6,
        temperature=[0.0, 1.0, 1.0, 1.0, 1.0, 2.0],
        top_k=[0, 1, 0, 2, 0, 0],
        top_p=[1.0, 1.0, 0.1, 1.0, 1.0, 1.0],
        min_p=[0, 0, 0, 0, 0.4, 0],
    )
    rows = jnp.broadcast_to(LOGITS, (6, 6))
    chosen = [
        np.asarray(compiled(rows, jax.random.split(jax.random.key(seed), 6), of_rows)[0])
        for seed in range(60)
    ]
    seen = [set(column) for column in np.stack(chosen, axis=1).tolist()]
    assert seen[:5] == [{3}, {3}, {3}, {3, 1}, {3, 1}]
    assert len(seen[5]) >= 5


def test_log_probabilities_are_those_before_any_option() -> None:
    settings = options(1, temperature=3.0, top_k=2, penalty=4.0, bias_tokens=[[3]], biases=[[-np.inf]])
    token, log_prob = compiled(LOGITS[None], jax.random.split(jax.random.key(0), 1), settings)
    assert token[0] != 3
    np.testing.assert_allclose(log_prob[0], LOGITS[token[0]], rtol=1e-5)
    for count in (2, 100):
        tokens, log_probs = likeliest(LOGITS[None] + 5, count)
        assert tokens[0].tolist() == [3, 1, 5, 2, 0, 4][:count]
        np.testing.assert_allclose(log_probs[0], np.sort(LOGITS)[::-1][:count], rtol=1e-5)
