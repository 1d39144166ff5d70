"""Low-rank adapters (LoRA) over a weight of any kind.

Shape legend: B rows of a batch, L length, C contracted axes, O output axes, A adapters, R rank.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.weights.matmul import matmul
from gemma_jax.weights.table import Parameter
from gemma_jax.weights.weight import Context, Dense, Kind, Weight

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class LowRank(Weight):
    """Another weight W, and for each adapter two thin matrices: x W + scale dropout(x) a b (Hu et al., 2021).

    Each row of a batch uses the adapter of its index in `Context.adapters`, the first one if there is no such
    context, and none if the index is negative.
    """

    def __init__(self, base: Weight, rngs: nnx.Rngs, adapters: "Adapters", dtype: jnp.dtype) -> None:
        about = base.parameter
        super().__init__(about, base.mesh)
        inward, outward = about.shape[: about.inputs], about.shape[about.inputs :]
        rank, count = adapters.rank, adapters.count
        shape_a, shape_b = (about.layers, count, *inward, rank), (about.layers, count, rank, *outward)
        bound = math.sqrt(1 / math.prod(inward))  # as PEFT: Kaiming's uniform with a = sqrt(5)
        self.base, self.scale, self.dropout = base, adapters.alpha / rank, adapters.dropout
        self.a = nnx.Param(
            jax.random.uniform(rngs.params(), shape_a, dtype, -bound, bound),
            axes=("layers", None, *about.axes[: about.inputs], None),
        )
        self.b = nnx.Param(
            jnp.zeros(shape_b, dtype), axes=("layers", None, None, *about.axes[about.inputs :])
        )

    def matmul(self, x: jax.Array, context: Context) -> jax.Array:
        """See `Weight.matmul`."""
        out, inputs = self.base.matmul(x, context), self.parameter.inputs
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        if context.key is not None and self.dropout:
            kept = jax.random.bernoulli(context.key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        with jax.named_scope(self.parameter.name):
            if context.adapters is None:
                return out + matmul(matmul(x, a[0], inputs), b[0]) * self.scale
            of_rows = jax.vmap(lambda x, a, b: matmul(matmul(x, a, inputs), b))
            added = of_rows(x, a[context.adapters], b[context.adapters]) * self.scale
            has_one = (context.adapters >= 0).reshape(-1, *[1] * (added.ndim - 1))
            return out + jnp.where(has_one, added, 0)

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """Returns the dense array of the weight below, without any adapter."""
        return self.base.dense(dtype)

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        """See `Weight.pack`. The adapters keep their initial values."""
        return {f"base.{name}".removesuffix(".array"): x for name, x in self.base.pack(array).items()}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The kind of a model that has adapters on some projections: a `Kind`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    count: int = 1
    targets: tuple[str, ...] = PROJECTIONS
    base: Kind = Dense

    def __call__(self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype) -> Weight:
        """Makes a weight; see `Kind`."""
        weight = self.base(parameter, mesh, rngs, dtype)
        if parameter.inputs and parameter.name.rpartition(".")[2] in self.targets:
            return LowRank(weight, rngs, self, jnp.dtype(jnp.float32))
        return weight
