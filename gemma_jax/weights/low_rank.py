"""Low-rank adapters (LoRA) over a weight of any kind, and trained rows of an embedding.

Shape legend: B rows of a batch, L length, C contracted axes, O output axes, A adapters, R rank, n trained
rows of the embedding, D embed.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.weights.matmul import matmul, precision
from gemma_jax.weights.table import EMBEDDING, Parameter
from gemma_jax.weights.weight import NO_CONTEXT, Context, Dense, Kind, Weight

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def is_trained(name: str) -> bool:
    """Whether an array of a model, by its dotted name, is one of an adapter that is trained."""
    return name.rpartition(".")[2] in ("a", "b", "rows") and ".base." not in name


class _Adapted(Weight):
    """Another weight, `base`, and what the adapters change of it."""

    def __init__(self, base: Weight) -> None:
        super().__init__(base.parameter, base.mesh)
        self.base = base

    def add(self, name: str, values: jax.Array, axes: tuple[str | None, ...], adapters: "Adapters") -> None:
        """Adds an array of the adapters and, for a reference, its copy `reference_NAME`."""
        setattr(self, name, nnx.Param(values, axes=axes))
        if adapters.reference:
            setattr(self, f"reference_{name}", nnx.Param(values, axes=axes))

    def of(self, name: str, context: Context) -> jax.Array:
        """Returns the array of the adapters, or its copy if the context asks for the reference."""
        return context.pick(getattr(self, f"reference_{name}" if context.reference else name)[...])

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """Returns the dense array of the weight below, without any adapter."""
        return self.base.dense(dtype)

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        """See `Weight.pack`. The arrays of the adapters are left out."""
        return {f"base.{name}".removesuffix(".array"): x for name, x in self.base.pack(array).items()}


class LowRank(_Adapted):
    """Another weight W, and for each adapter two thin matrices: x W + scale dropout(x) a b (Hu et al., 2021).

    Each row of a batch uses the adapter of its index in `Context.adapters`, the first one if there is no such
    context, and none if the index is negative.
    """

    def __init__(self, base: Weight, rngs: nnx.Rngs, adapters: "Adapters", dtype: jnp.dtype) -> None:
        super().__init__(base)
        about, rank, count = base.parameter, adapters.rank, adapters.count
        inward, outward = about.shape[: about.inputs], about.shape[about.inputs :]
        shape_a, shape_b = (about.layers, count, *inward, rank), (about.layers, count, rank, *outward)
        bound = math.sqrt(1 / math.prod(inward))  # as PEFT: Kaiming's uniform with a = sqrt(5)
        self.scale, self.dropout = adapters.scale, adapters.dropout
        a = jax.random.uniform(rngs.params(), shape_a, dtype, -bound, bound)
        self.add("a", a, ("layers", None, *about.axes[: about.inputs], None), adapters)
        b = jnp.zeros(shape_b, dtype)
        self.add("b", b, ("layers", None, None, *about.axes[about.inputs :]), adapters)

    def matmul(self, x: jax.Array, context: Context) -> jax.Array:
        """See `Weight.matmul`."""
        out, inputs = self.base.matmul(x, context), self.parameter.inputs
        a, b = self.of("a", context).astype(x.dtype), self.of("b", context).astype(x.dtype)
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


class TrainedRows(_Adapted):
    """An embedding in which each adapter has rows of its own for some tokens.

    Adapters are chosen as in `LowRank`.
    """

    def __init__(self, base: Weight, adapters: "Adapters", dtype: jnp.dtype) -> None:
        super().__init__(base)
        self.ids = adapters.rows
        shape = (adapters.count, len(self.ids), base.parameter.shape[1])
        self.add("rows", jnp.zeros(shape, dtype), (None, None, None), adapters)

    @property
    def table(self) -> Weight:
        """See `Weight.table`."""
        return self.base

    def _rows(self, context: Context) -> jax.Array:
        """Returns the rows of each row of the batch, [B, n, D], or [1, n, D] if all have the same."""
        rows = self.of("rows", context)
        if context.adapters is None:
            return rows[:1]
        ids = jnp.asarray(self.ids)[None]
        without = self.base.embedding_lookup(ids, rows.dtype, NO_CONTEXT)  # [1, n, D], for an index of -1
        return jnp.concatenate([rows, without])[context.adapters]

    def embedding_lookup(
        self, tokens: jax.Array | np.ndarray, dtype: jax.typing.DTypeLike, context: Context
    ) -> jax.Array:
        """See `Weight.embedding_lookup`."""
        found = self.base.embedding_lookup(tokens, dtype, context)
        same = jnp.asarray(tokens)[..., None] == jnp.asarray(self.ids)  # [B, L, n]
        rows = self._rows(context).astype(dtype)
        rows = jnp.broadcast_to(rows, (len(found), *rows.shape[1:]))
        picked = jnp.take_along_axis(rows, jnp.argmax(same, axis=-1)[..., None], axis=1)
        return jnp.where(jnp.any(same, axis=-1, keepdims=True), picked, found)

    def replaced_logits(
        self, x: jax.Array, dtype: jax.typing.DTypeLike, context: Context
    ) -> tuple[tuple[int, ...], jax.Array]:
        """See `Weight.replaced_logits`."""
        rows = self._rows(context).astype(x.dtype)
        rows = jnp.broadcast_to(rows, (len(x), *rows.shape[1:]))
        exact = precision(x.dtype)
        return self.ids, jnp.einsum(
            "b...d,bnd->b...n", x, rows, precision=exact, preferred_element_type=dtype
        )

    def unembed(self, x: jax.Array, dtype: jax.typing.DTypeLike, context: Context) -> jax.Array:
        """See `Weight.unembed`. The first axis of `x` is B."""
        ids, logits = self.replaced_logits(x, dtype, context)
        return self.base.unembed(x, dtype, context).at[..., jnp.asarray(ids)].set(logits)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The kind of a model that has adapters on some projections: a `Kind`."""

    rank: int
    scale: float = 1.0  # what an adapter adds is multiplied by this
    dropout: float = 0.0
    count: int = 1
    targets: tuple[str, ...] = PROJECTIONS
    base: Kind = Dense
    rows: tuple[int, ...] = ()  # token ids whose rows of the embedding each adapter has, too
    reference: bool = False  # whether there is a copy of the adapters, which `Context.reference` selects

    def adapts(self, parameter: Parameter) -> bool:
        """Whether the weight of a parameter has adapters."""
        if parameter.name == EMBEDDING:
            return bool(self.rows)
        return bool(parameter.inputs) and parameter.name.rpartition(".")[2] in self.targets

    def __call__(self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype) -> Weight:
        """Makes a weight; see `Kind`. The adapters are float32."""
        weight = self.base(parameter, mesh, rngs, dtype)
        if not self.adapts(parameter):
            return weight
        own = jnp.dtype(jnp.float32)
        return LowRank(weight, rngs, self, own) if parameter.inputs else TrainedRows(weight, self, own)
