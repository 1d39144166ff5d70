"""Rows of a table in parts: those of the whole one, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.testing import cpu_mesh
from gemma_jax.weights import NO_CONTEXT
from tests.weights.kinds import dense_weight


@pytest.mark.parametrize("mesh", [(1, 1, 8, 1), (1, 1, 4, 2), (1, 2, 1, 4), (2, 1, 2, 2)])
@pytest.mark.parametrize("rows", [1, 8])
def test_rows_and_the_gradient_of_the_table(mesh: tuple[int, int, int, int], rows: int) -> None:
    slices, data, parts, tensor = mesh
    devices = cpu_mesh(8, slices=slices, data=data, fsdp=parts, tensor=tensor)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)
    tokens = rng.integers(0, 16, (rows, 5))  # with repetitions
    cotangent = jnp.asarray(rng.normal(size=(rows, 5, 24)), jnp.float32)

    @jax.jit
    def in_parts(table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def of(table: jax.Array) -> jax.Array:
            embedding = dense_weight(table, ("vocab", "embed"), devices)
            return embedding.embedding_lookup(tokens, jnp.float32, NO_CONTEXT)

        found, pull = jax.vjp(of, table)
        return found, pull(cotangent)

    found, (gradient,) = in_parts(table)
    np.testing.assert_array_equal(found, table[tokens])
    np.testing.assert_allclose(
        gradient, jnp.zeros_like(table).at[tokens].add(cotangent), rtol=1e-5, atol=1e-5
    )
