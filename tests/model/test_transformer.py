"""The decoder as a whole: parity, cache, packing, causality, scan."""

import math
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax.config import PRESETS, ComputeConfig, TransformerConfig, replace
from gemma_jax.model import KVCache, ModelSpec
from gemma_jax.sharding import named_arrays, with_arrays
from gemma_jax.testing import assert_same, cpu_mesh, relative_difference
from tests import reference

TINY = PRESETS["gemma_tiny"]
FLOAT32 = ComputeConfig()
FLOAT64 = ComputeConfig(dtype="float64", param_dtype="float64")
# multi-query like the 2B, and multi-head with heads * head_dim unlike embed_dim like the 7B
MULTI_QUERY = replace(TINY, {"num_kv_heads": 1})
MULTI_HEAD = replace(TINY, {"num_kv_heads": 4, "embed_dim": 48})


def random_params(config: TransformerConfig, compute: ComputeConfig = FLOAT32, seed: int = 0) -> nnx.State:
    """Parameters with norm scales that are not zero, so that a wrong norm shows."""
    params = ModelSpec(config, compute, cpu_mesh(1)).init(seed)
    rng = np.random.default_rng(seed)
    arrays = named_arrays(params)
    for name, value in arrays.items():
        if name.endswith("norm"):
            arrays[name] = jnp.asarray(rng.normal(0, 0.3, value.shape), value.dtype)
    return with_arrays(params, arrays)


def forward(config: TransformerConfig, compute: ComputeConfig = FLOAT32):
    """(params, tokens, positions, segments) -> logits."""
    spec = ModelSpec(config, compute, cpu_mesh(1))

    def run(params, tokens, positions, segments):
        model = spec.merge(params)
        return model.logits(model(tokens, positions, segments))

    return jax.jit(run)


def simple_rows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows that hold one sequence each."""
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.ones_like(tokens)


@pytest.mark.parametrize(
    "config", [MULTI_QUERY, TINY, MULTI_HEAD], ids=["one-kv-head", "grouped", "multi-head"]
)
def test_logits_equal_a_plain_numpy_gemma(config: TransformerConfig) -> None:
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 17))
    with jax.enable_x64(True):
        params = random_params(config, FLOAT64)
        actual = forward(config, FLOAT64)(params, tokens, *simple_rows(tokens))
        arrays = {name: np.asarray(value) for name, value in named_arrays(params).items()}
    for row in range(2):
        expected = reference.logits(arrays, tokens[row].tolist())
        assert relative_difference(actual[row], expected) < 1e-10


def test_float32_is_within_rounding_of_float64() -> None:
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (1, 64))
    params = random_params(TINY)
    arrays = {name: np.asarray(value) for name, value in named_arrays(params).items()}
    actual = forward(TINY)(params, tokens, *simple_rows(tokens))
    assert relative_difference(actual[0], reference.logits(arrays, tokens[0].tolist())) < 1e-5


def test_float16_computes_activations_beyond_its_range() -> None:
    """Numbers above 65,504 in the hidden layer of the feed-forward, its output, and the residual stream."""
    params = random_params(TINY)
    factors = {"gate": 300.0, "up": 300.0, "down": 10.0, "v": 100.0, "o": 100.0}
    arrays = {name: x * factors.get(name.split(".")[-1], 1) for name, x in named_arrays(params).items()}
    params = with_arrays(params, arrays)
    inputs = (tokens := np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 17)), *simple_rows(tokens))
    half = ComputeConfig(dtype="float16")
    largest = ModelSpec(TINY, half, cpu_mesh(1)).merge(params).largest(*inputs)
    assert (largest > 4 * 65_504).all()
    expected = forward(TINY)(params, *inputs)
    assert_same(forward(TINY, half)(params, *inputs), expected, 1e-2)


@pytest.mark.parametrize(("dtype", "least", "most"), [(np.float64, 0, 1e-10), (np.int8, 1e-4, 0.01)])
def test_prefill_and_decode_equal_one_forward_pass_in_a_ragged_batch(
    dtype: type, least: float, most: float
) -> None:
    """Each row has its own prompt length; every logit on the way equals that of the whole sequence.

    A cache of int8 rounds each number by at most 1/254 of the largest of its vector.
    """
    lengths, new, slots = np.array([3, 11, 7, 1]), 6, 24
    longest = int(lengths.max())
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, TINY.vocab_size, (4, longest + new))
    with jax.enable_x64(True):
        params = random_params(TINY, FLOAT64)
        whole = np.asarray(forward(TINY, FLOAT64)(params, tokens, *simple_rows(tokens)))
        mesh = cpu_mesh(1)
        spec = ModelSpec(TINY, FLOAT64, mesh)

        @jax.jit
        def extend(params, tokens, positions, segments, cache):
            model = spec.merge(params)
            hidden, cache = model.extend(cache, tokens, positions, segments)
            return model.logits(hidden), cache

        cache = KVCache.empty(TINY, 4, slots, dtype, mesh)
        positions = np.broadcast_to(np.arange(longest), (4, longest))
        segments = (positions < lengths[:, None]).astype(np.int32)
        logits, cache = extend(params, tokens[:, :longest], positions, segments, cache)
        for row, length in enumerate(lengths):
            assert relative_difference(logits[row, :length], whole[row, :length]) <= most
        for step in range(new):
            at = lengths + step
            token = tokens[np.arange(4), at][:, None]
            logits, cache = extend(params, token, at[:, None], np.ones((4, 1), np.int32), cache)
            assert least <= relative_difference(logits[:, 0], whole[np.arange(4), at]) <= most
        np.testing.assert_array_equal(cache.lengths, lengths + new)


def test_no_gradient_reaches_a_later_token_or_another_document() -> None:
    """The Jacobian of every output with respect to every input embedding, as a picture.

    A gradient that is exactly zero proves that no path exists, for any value of the weights; and one
    that is not zero proves that the path is there. This covers the mask, the positions and the scan.
    """
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 0]])
    spec, params = ModelSpec(TINY, FLOAT32, cpu_mesh(1)), random_params(TINY)

    def outputs(embeddings: jax.Array) -> jax.Array:
        # Tokens 0 to 5, each once: the gradient of a row of the table is that of its place.
        arrays = named_arrays(params)
        arrays["embedding"] = arrays["embedding"].at[:6].set(embeddings)
        model = spec.merge(with_arrays(params, arrays))
        return model(np.arange(6)[None], positions, segments)[0]

    jacobian = jax.jacrev(outputs)(named_arrays(params)["embedding"][:6])  # [output, D, input, D]
    reached = np.abs(np.asarray(jacobian)).max(axis=(1, 3)) > 0
    picture = ["".join("x" if seen else "." for seen in row) for row in reached]
    assert picture == [
        "x.....",
        "xx....",
        "xxx...",
        "...x..",
        "...xx.",
        ".....x",
    ]


POLICIES = [policy for policy in get_type_hints(ComputeConfig)["remat"].__args__ if policy != "none"]


@pytest.mark.parametrize(
    "changes",
    [{"scan_unroll": 2}, {"remat": "full", "scan_unroll": 2}, *({"remat": policy} for policy in POLICIES)],
    ids=str,
)
def test_scanned_equals_unrolled_and_rematerialised(changes: dict[str, object]) -> None:
    tokens = np.random.default_rng(4).integers(0, TINY.vocab_size, (2, 12))

    def value_and_gradient(compute: ComputeConfig):
        run = forward(TINY, compute)
        loss = lambda p: jnp.sum(jnp.sin(run(p, tokens, *simple_rows(tokens))))  # noqa: E731
        return jax.value_and_grad(loss)(random_params(TINY, FLOAT64))

    with jax.enable_x64(True):
        plain = value_and_gradient(FLOAT64)
        assert_same(value_and_gradient(replace(FLOAT64, changes)), plain, 1e-10)


def test_each_policy_keeps_less_than_the_one_before() -> None:
    """Values that the forward pass leaves for the backward pass."""
    tokens = np.zeros((2, 64), np.int32)

    def kept(policy: str) -> int:
        compute = ComputeConfig(remat=policy)
        loss = lambda p: jnp.sum(forward(TINY, compute)(p, tokens, *simple_rows(tokens)))  # noqa: E731
        residuals = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], random_params(TINY, compute))
        return sum(math.prod(value.shape) for value in jax.tree.leaves(residuals))

    memory = [kept(policy) for policy in ("none", "products", "projections", "attention", "full")]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == len(memory), memory


@pytest.mark.parametrize("policy", ["none", "products"])
def test_no_whole_weight_is_kept_for_the_backward_pass(policy: str) -> None:
    spec, tokens = ModelSpec(TINY, ComputeConfig(remat=policy), cpu_mesh(8)), np.zeros((8, 64), np.int32)
    params = spec.init(0)
    stacked = {array.shape for name, array in named_arrays(params).items() if name.count(".") == 2}

    def kept(params: nnx.State):
        loss = lambda p: jnp.sum(spec.merge(p)(tokens, *simple_rows(tokens)))  # noqa: E731
        return jax.vjp(loss, params)[1]

    weights = [array for array in jax.tree.leaves(jax.jit(kept)(params)) if array.shape in stacked]
    assert weights and not [array.shape for array in weights if array.is_fully_replicated]


def test_initialisation_is_the_same_on_every_mesh_and_never_whole_on_a_device() -> None:
    one = ModelSpec(TINY, FLOAT32, cpu_mesh(1)).init(5)
    mesh = cpu_mesh(8, fsdp=4, tensor=2)
    spread = ModelSpec(TINY, FLOAT32, mesh).init(5)
    assert_same(spread, one, 0.0)
    for name, value in named_arrays(spread).items():
        parts = 4 if name.endswith("norm") else 8
        assert {shard.data.size for shard in value.addressable_shards} == {value.size // parts}, name
    abstract = ModelSpec(PRESETS["gemma_2b"], FLOAT32, mesh).params
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
