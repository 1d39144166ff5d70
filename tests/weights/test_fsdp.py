"""Weights in parts: gathered and summed in stages as at once, and products with them as with whole ones."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.sharding import Axes
from gemma_jax.testing import cpu_mesh
from gemma_jax.weights import NO_CONTEXT, fsdp, matmul
from tests.weights.kinds import dense_weight


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


STAGES = [(8,), (2, 4), (4, 2), (2, 2, 2)]


@pytest.mark.parametrize("sizes", STAGES)
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_parts_gathered_are_the_whole_and_scattered_sums_its_parts(
    dimension: int, sizes: tuple[int, ...]
) -> None:
    mesh = cpu_mesh(8)
    spec = P(*[fsdp.AXIS if axis == dimension else None for axis in range(3)])
    whole = np.random.default_rng(0).normal(size=(16, 24, 8)).astype(np.float32)
    part = jax.device_put(whole, NamedSharding(mesh, spec))

    def both(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        gathered = fsdp.gather(part, dimension, sizes)
        mine = gathered * (1 + jax.lax.axis_index(fsdp.AXIS))
        return gathered, fsdp.scatter_sum(mine, dimension, sizes)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=(P(), spec), check_vma=False)
    gathered, summed = jax.jit(mapped)(part)
    np.testing.assert_array_equal(gathered, whole)
    np.testing.assert_allclose(summed, whole * 36, rtol=1e-6)


@pytest.mark.parametrize(("axes", "shape", "contract"), [
    (("embed", "mlp"), (16, 8), 1),
    (("mlp", "embed"), (8, 16), 1),
    (("embed", "heads", "head_dim"), (16, 4, 6), 1),
    (("embed", "kv_heads", "head_dim"), (16, 1, 6), 1),
    (("heads", "head_dim", "embed"), (4, 6, 16), 2),
])  # fmt: skip
@pytest.mark.parametrize("mesh", [(1, 1, 8, 1), (1, 1, 4, 2), (1, 2, 4, 1), (2, 1, 2, 2)])
def test_a_product_in_parts_and_its_gradients(
    mesh: tuple[int, int, int, int],
    axes: Axes,
    shape: tuple[int, ...],
    contract: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slices, data, parts, tensor = mesh
    devices = cpu_mesh(8, slices=slices, data=data, fsdp=parts, tensor=tensor)
    monkeypatch.setattr(fsdp, "stages", lambda _: (2, parts // 2))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3, *shape[:contract])))
    weight = jnp.asarray(rng.normal(size=shape))
    wanted_output, pull = jax.vjp(functools.partial(matmul, contract=contract), x, weight)
    cotangent = jnp.asarray(rng.normal(size=wanted_output.shape))

    @jax.jit
    def in_parts(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def of(x: jax.Array, weight: jax.Array) -> jax.Array:
            return dense_weight(weight, axes, devices, contract).matmul(x, NO_CONTEXT)

        output, pull = jax.vjp(of, x, weight)
        return output, pull(cotangent)

    output, gradients = in_parts(x, weight)
    np.testing.assert_allclose(output, wanted_output, rtol=1e-12)
    for gradient, wanted in zip(gradients, pull(cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_without_coordinates_there_is_one_stage() -> None:
    assert fsdp.stages(cpu_mesh(8, fsdp=4, tensor=2)) == (4,)
