"""The pure functions, beside the same by jax."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model.ops import gated_gelu, unfused


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_gated_gelu_and_its_gradients_are_those_of_jax() -> None:
    gate = jnp.concatenate([jnp.linspace(-30, 30, 601), jnp.asarray([-1e4, -1e2, 0.0, 1e2, 1e4])])
    up, cotangent = jnp.cos(gate), jnp.sin(3 * gate)

    def plain(gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.gelu(gate, approximate=True) * up

    wanted, wanted_pull = jax.vjp(plain, gate, up)
    found, pull = jax.vjp(gated_gelu, gate, up)
    np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-13)
    for gradient, other in zip(pull(cotangent), wanted_pull(cotangent), strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_only_the_result_is_rounded() -> None:
    gate = jnp.linspace(-4, 4, 999).astype(jnp.bfloat16)
    exact = gated_gelu(gate.astype(jnp.float64), jnp.ones_like(gate, jnp.float64))
    np.testing.assert_array_equal(gated_gelu(gate, jnp.ones_like(gate)), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("remat", [False, True])
def test_what_is_kept_apart_and_its_gradient_are_as_they_were(remat: bool) -> None:
    x, cotangent = jnp.linspace(-2, 2, 12).reshape(3, 4), jnp.arange(12.0).reshape(3, 4)

    def layers(x: jax.Array, keep: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + jnp.tanh(keep(jnp.sin(x))), None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, length=3)[0]

    wanted, wanted_pull = jax.vjp(lambda x: layers(x, lambda y: y), x)
    found, pull = jax.vjp(lambda x: layers(x, unfused), x)
    np.testing.assert_allclose(found, wanted, rtol=1e-14)
    np.testing.assert_allclose(pull(cotangent)[0], wanted_pull(cotangent)[0], rtol=1e-14)
