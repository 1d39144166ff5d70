"""Choosing a token, by answers that are forced and by frequencies that are known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gemma_jax.sampling.select import keep_top_k, keep_top_p, select

# Probabilities that float32 sums exactly, in no order. The likeliest is token 3, the next 1, then 5.
PROBABILITIES = np.array([1 / 32, 1 / 4, 1 / 16, 1 / 2, 1 / 32, 1 / 8])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 20_000

compiled = jax.jit(select)


def draw(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Tokens of many rows with the same logits and settings, each with a key of its own."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    settings = (jnp.full(DRAWS, temperature), jnp.full(DRAWS, top_k), jnp.full(DRAWS, top_p))
    tokens, _ = compiled(rows, keys, *settings)
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
        "all": ({"temperature": 2.0, "top_k": 4, "top_p": 0.8}, PROBABILITIES**0.5 * [0, 1, 0, 1, 0, 1]),
    }
    for name, (settings, shares) in cases.items():
        counts = np.bincount(draw(LOGITS, **settings), minlength=6)
        expected = DRAWS * shares / shares.sum()
        assert (counts[expected == 0] == 0).all(), name
        used = expected > 0
        p_value = stats.chisquare(counts[used], expected[used]).pvalue
        assert p_value > 0.01, f"{name}: {counts} instead of {expected} (p {p_value:.2g})"


def test_what_may_not_be_chosen_never_is() -> None:
    """Rows that pad the vocabulary are -inf, and a high temperature must not raise them."""
    logits = np.array([-np.inf, 0.0, -np.inf, 0.5, -np.inf], np.float32)
    wide: list[dict[str, Any]] = [{}, {"temperature": 3e38}, {"top_k": 4}, {"top_p": 0.9999999}]
    for settings in [*wide, {"top_k": 5, "top_p": 0.99}]:
        assert set(draw(logits, **settings).tolist()) == {1, 3}, settings
    assert set(draw(np.array([-np.inf, -5.0, -np.inf]), temperature=0.0).tolist()) == {1}


def test_equal_tokens_stay_together() -> None:
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    for cut in (keep_top_k(logits, jnp.array([1])), keep_top_p(logits, jnp.array([0.01]))):
        assert np.flatnonzero(np.isfinite(cut[0])).tolist() == [1, 2]


def test_every_row_has_settings_of_its_own() -> None:
    temperature = jnp.array([0.0, 1.0, 1.0, 1.0, 2.0])
    top_k, top_p = jnp.array([0, 1, 0, 2, 0]), jnp.array([1.0, 1.0, 0.1, 1.0, 1.0])
    rows = jnp.broadcast_to(LOGITS, (5, 6))
    chosen = [
        np.asarray(compiled(rows, jax.random.split(jax.random.key(seed), 5), temperature, top_k, top_p)[0])
        for seed in range(60)
    ]
    seen = [set(column) for column in np.stack(chosen, axis=1).tolist()]
    assert seen[:4] == [{3}, {3}, {3}, {3, 1}]
    assert len(seen[4]) >= 5
