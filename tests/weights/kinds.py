"""Weights for tests: a dense one of one layer, and adapters that are not zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.sharding import Axes, parameter_name
from gemma_jax.weights import Adapters, Dense, Parameter, Quantization, Weight


def dense_weight(array: Any, axes: Axes, mesh: Mesh, inputs: int = 0) -> Weight:
    """A dense weight of one layer that holds an array."""
    about = Parameter("weight", tuple(map(str, axes)), array.shape, 1, inputs, 0)
    abstract = nnx.eval_shape(lambda: Dense(about, mesh, nnx.Rngs(0), jnp.dtype(array.dtype)))
    return abstract.parts()[0].weight([array])


def adapters(**settings: Any) -> Adapters:
    """The kind of a model whose projections have adapters over int8, and whose embedding is int8."""
    return Adapters(**({"rank": 4, "base": Quantization("int8")} | settings))


def is_adapter(name: str) -> bool:
    """Whether an array of a model belongs to an adapter."""
    return name.rpartition(".")[2] in ("a", "b") and name.startswith("blocks.")


def with_random_adapters(params: Any, seed: int) -> Any:
    """Parameters whose adapters do something: their second matrices are no longer zero."""
    rng = np.random.default_rng(seed)

    def changed(path: Any, x: jax.Array) -> jax.Array:
        if not parameter_name(path).endswith(".b"):
            return x
        return jax.device_put((0.05 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(changed, params)
