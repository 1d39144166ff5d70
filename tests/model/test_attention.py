"""The mask as pictures, and the blocks of `causal_attend` against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model.attention import attend, attention_mask, causal_attend
from gemma_jax.testing import assert_same


def picture(mask: jax.Array) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in np.asarray(mask[0])]


def test_mask_of_a_packed_row() -> None:
    positions, segments = np.array([[0, 1, 2, 0, 1, 0]]), np.array([[1, 1, 1, 2, 2, 0]])
    assert picture(attention_mask(positions, segments, positions, segments)) == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        ".....x",
    ]


def test_mask_of_a_token_against_a_cache_with_free_slots() -> None:
    keys, segments = np.array([[0, 1, 2, 3, 0, 0]]), np.array([[1, 1, 1, 1, 0, 0]])
    assert picture(attention_mask(np.array([[3]]), np.array([[1]]), keys, segments)) == ["xxxx.."]


@pytest.mark.parametrize("length", [300, 2500])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_blocks_of_queries_equal_the_whole(length: int, kv_heads: int) -> None:
    """Lengths that blocks do not divide, of 128 queries and of more; value and gradients."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(length, 5, replace=False))
    segments = np.searchsorted(cuts, np.arange(length), side="right")[None] + 1
    segments[:, -7:] = 0
    positions = np.concatenate([np.arange(n) for n in np.unique(segments, return_counts=True)[1][1:]])
    positions = np.concatenate([positions, np.zeros(7, int)])[None]
    with jax.enable_x64(True):
        q, k, v = (rng.normal(size=(1, length, n, 8)) for n in (4, kv_heads, kv_heads))
        mask = attention_mask(positions, segments, positions, segments)
        whole = lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v, mask)))  # noqa: E731
        blocks = lambda q, k, v: jnp.sum(jnp.sin(causal_attend(q, k, v, positions, segments)))  # noqa: E731
        # Padding looks only at padding, of which blocks may see less: nothing that counts depends on it.
        expected = jax.grad(whole, (0, 1, 2))(q, k, v)
        actual = jax.grad(blocks, (0, 1, 2))(q, k, v)
        real = slice(0, length - 7)
        assert_same(
            [attend(q, k, v, mask)[:, real], *(g[:, real] for g in expected)],
            [causal_attend(q, k, v, positions, segments)[:, real], *(g[:, real] for g in actual)],
            1e-12,
        )
