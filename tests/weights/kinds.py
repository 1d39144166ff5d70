"""Kinds of weight that the package does not have: whatever works with these works with any kind.

Shape legend: C contracted axes, O output axes, A adapters, R rank, B rows of a batch.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.sharding import Axes, parameter_name
from gemma_jax.weights import Context, Dense, Parameter, Weight, matmul


def dense_weight(array: Any, axes: Axes, mesh: Mesh, inputs: int = 0) -> Weight:
    """A dense weight of one layer that holds an array."""
    about = Parameter("weight", tuple(map(str, axes)), array.shape, 1, inputs, 0)
    abstract = nnx.eval_shape(lambda: Dense(about, mesh, nnx.Rngs(0), jnp.dtype(array.dtype)))
    return abstract.parts()[0].weight([array])


class Int8(Weight):
    """IntArray with one scale for each output channel, or for each row of the embedding."""

    def __init__(self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        super().__init__(parameter, mesh)
        values = Dense(parameter, mesh, rngs, dtype).dense()
        stack = 1 if parameter.layers else 0
        over = tuple(range(stack, values.ndim)[: parameter.inputs or 1]) if parameter.inputs else (1,)
        packed = self._packed(values, over)
        layers = ("layers",) * stack
        kept = [a if i + stack not in over else None for i, a in enumerate(parameter.axes)]
        self.codes = nnx.Param(packed["codes"], axes=(*layers, *parameter.axes))
        self.scale = nnx.Param(packed["scale"], axes=(*layers, *kept))

    @staticmethod
    def _packed(values: jax.Array, over: tuple[int, ...]) -> dict[str, jax.Array]:
        scale = jnp.max(jnp.abs(values), axis=over, keepdims=True).astype(jnp.float32) / 127
        scale = jnp.where(scale == 0, 1, scale)
        return {"codes": jnp.round(values / scale).astype(jnp.int8), "scale": scale}

    def dense(self, dtype: Any = None) -> jax.Array:
        return (self.codes[...].astype(jnp.float32) * self.scale[...]).astype(dtype or jnp.float32)

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        return self._packed(array.astype(jnp.float32), tuple(range(self.parameter.inputs)) or (1,))


class LowRank(Weight):
    """Another weight, and for each adapter a pair of thin matrices beside it: x W + dropout(x) a b."""

    def __init__(self, base: Weight, rngs: nnx.Rngs, rank: int, adapters: int, dropout: float) -> None:
        about = base.parameter
        super().__init__(about, base.mesh)
        inward, outward = about.shape[: about.inputs], about.shape[about.inputs :]
        shape_a, shape_b = (about.layers, adapters, *inward, rank), (about.layers, adapters, rank, *outward)
        a = jax.random.normal(rngs.params(), shape_a) / math.sqrt(math.prod(inward))
        self.base = base
        self.a = nnx.Param(a, axes=("layers", None, *about.axes[: about.inputs], None))
        self.b = nnx.Param(jnp.zeros(shape_b), axes=("layers", None, None, *about.axes[about.inputs :]))
        self.dropout = dropout

    def matmul(self, x: jax.Array, context: Context) -> jax.Array:
        out = self.base.matmul(x, context)
        if context.key is not None:
            kept = jax.random.bernoulli(context.key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        adapters = jnp.zeros(len(x), jnp.int32) if context.adapters is None else context.adapters

        def of_row(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return matmul(matmul(x, a, self.parameter.inputs), b)

        return out + jax.vmap(of_row)(x, self.a[...][adapters], self.b[...][adapters]).astype(out.dtype)

    def dense(self, dtype: Any = None) -> jax.Array:
        return self.base.dense(dtype)

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        return {f"base.{name}".removesuffix(".array"): x for name, x in self.base.pack(array).items()}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The kind of a model whose projections have adapters over int8, and whose embedding is int8."""

    rank: int = 4
    adapters: int = 1
    dropout: float = 0.0
    base: Any = Int8

    def __call__(self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype) -> Weight:
        weight: Weight = self.base(parameter, mesh, rngs, dtype)
        if not parameter.inputs:
            return weight
        return LowRank(weight, rngs, self.rank, self.adapters, self.dropout)


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
