"""The mask as pictures, and the blocks of `causal_attend` against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model.attention import attend, attention_mask, cache_attend, causal_attend
from gemma_jax.model.cache import KVCache, Vectors
from gemma_jax.model.paged import fits_paged, paged_attend
from gemma_jax.model.splash import fits_splash, splash_attend
from gemma_jax.model.triton import triton_attend
from gemma_jax.testing import assert_same, cpu_mesh


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


@pytest.mark.parametrize(("length", "kv_heads"), [(300, 1), (300, 4), (2500, 1)])
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
        expected = jax.jit(jax.grad(whole, (0, 1, 2)))(q, k, v)
        actual = jax.jit(jax.grad(blocks, (0, 1, 2)))(q, k, v)
        real = slice(0, length - 7)
        assert_same(
            [jax.jit(attend)(q, k, v, mask)[:, real], *(g[:, real] for g in expected)],
            [jax.jit(causal_attend)(q, k, v, positions, segments)[:, real], *(g[:, real] for g in actual)],
            1e-12,
        )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mesh"),
    [
        (4, 1, {}),
        (2, 2, {}),
        # each key head on two devices
        pytest.param(4, 2, {"devices": 8, "fsdp": 2, "tensor": 4}, marks=pytest.mark.slow),
        (4, 2, {"devices": 4, "fsdp": 2, "tensor": 2}),
    ],
    ids=["multi-query", "multi-head", "copied keys", "split"],
)
def test_splash_equals_the_reference(heads: int, kv_heads: int, mesh: dict[str, int]) -> None:
    """The TPU's kernel, interpreted: value and gradients of packed rows, in float32, head dim 256."""
    rng = np.random.default_rng(0)
    B, L, H = 2, 256, 256
    segments = np.sort(rng.integers(1, 4, (B, L)), axis=1).astype(np.int32)
    positions = np.broadcast_to(np.arange(L), (B, L))
    q, k, v = (rng.normal(size=(B, L, n, H)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    q *= H**-0.5
    mask = attention_mask(positions, segments, positions, segments)
    on_mesh = cpu_mesh(**{"devices": 1, **mesh})

    def splash(q, k, v):
        return splash_attend(q, k, v, segments, on_mesh, residuals="attended", interpret=True)

    def value_and_gradients(function):
        loss = lambda *x: jnp.sum(jnp.sin(function(*x)))  # noqa: E731
        return jax.jit(function)(q, k, v), jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    expected = value_and_gradients(lambda q, k, v: attend(q, k, v, mask))
    assert_same(value_and_gradients(splash), expected, 1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "length", "mesh"),
    [
        (4, 1, 256, 128, {}),
        (4, 2, 128, 150, {}),
        (2, 2, 64, 100, {}),
        (4, 2, 64, 70, {"devices": 8, "fsdp": 2, "tensor": 4}),
    ],
    ids=["multi-query", "grouped", "multi-head", "copied keys"],
)
def test_the_kernel_of_the_gpu_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, length: int, mesh: dict[str, int]
) -> None:
    """Interpreted: value and gradients of packed rows, in float32, also of lengths without whole blocks."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
    positions = np.broadcast_to(np.arange(length), (2, length))
    q, k, v = (rng.normal(size=(2, length, n, head_dim)) for n in (heads, kv_heads, kv_heads))
    q, k, v, weights = (x.astype(np.float32) for x in (q * head_dim**-0.5, k, v, rng.normal(size=q.shape)))
    mask = attention_mask(positions, segments, positions, segments)
    on_mesh = cpu_mesh(**{"devices": 1, **mesh})

    def value_and_gradients(function):
        loss = lambda *x: jnp.sum(function(*x) * weights)  # noqa: E731
        return jax.jit(function)(q, k, v), jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    def kernel(q, k, v):
        return triton_attend(q, k, v, segments, on_mesh, residuals="attended", interpret=True)

    expected, gradients = value_and_gradients(lambda q, k, v: attend(q, k, v, mask))
    found, found_gradients = value_and_gradients(kernel)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    for one, other in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_the_kernel_of_the_tpu_takes_no_float32_and_no_odd_shapes() -> None:
    q = jax.ShapeDtypeStruct((1, 8192, 8, 256), jnp.bfloat16)
    assert fits_splash(q)
    assert not fits_splash(q.update(dtype=jnp.float32))
    assert not fits_splash(q.update(shape=(1, 8200, 8, 256)))
    assert not fits_splash(q.update(shape=(1, 8192, 8, 64)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (4, 4)])
def test_paged_attention_equals_the_reference(heads: int, kv_heads: int) -> None:
    """The TPU's kernel for decoding, interpreted: rows of different lengths, in the second of two layers."""
    from jax.experimental.pallas import tpu

    rng, mesh, slots = np.random.default_rng(0), cpu_mesh(1), 256
    lengths = jnp.array([1, 130, 256, 77], jnp.int32)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    q, written = (
        normal(4, 1, heads, 128),
        (normal(kv_heads, 2, 4, slots, 128), normal(kv_heads, 2, 4, slots, 128)),
    )
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (4, slots))
    cache = KVCache(
        Vectors(written[0]),
        Vectors(written[1]),
        positions,
        (positions < lengths[:, None]).astype(jnp.int32),
        lengths,
    )
    newest, one = lengths[:, None] - 1, jnp.ones((4, 1), jnp.int32)
    expected = cache_attend(q, (cache.keys, cache.values), 1, newest, one, cache, mesh)
    assert fits_paged(q, written[0], mesh)
    with tpu.force_tpu_interpret_mode():
        found = jax.jit(paged_attend, static_argnums=5)(q, *written, 1, lengths, mesh)
    assert_same(found.astype(jnp.float32), expected.astype(jnp.float32), 1e-2)
