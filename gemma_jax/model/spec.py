"""The description of a model, without the values of its parameters."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.config import ComputeConfig, TransformerConfig
from gemma_jax.memory import require_memory
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import Arrays, named_arrays, with_arrays, with_shardings
from gemma_jax.weights import Dense, Kind, Weight

SMALL = 2**27  # up to so many parameters are initialised in one program


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model's config, how and on which mesh it is computed, and the kind of its weights."""

    config: TransformerConfig
    compute: ComputeConfig
    mesh: Mesh
    kind: Kind = Dense

    def _create(self, key: jax.Array | int) -> Transformer:
        return Transformer(self.config, self.compute, self.mesh, nnx.Rngs(key), self.kind)

    @functools.cached_property
    def _abstract(self) -> tuple[nnx.GraphDef[Transformer], nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self._create(0)), nnx.Param)

    @functools.cached_property
    def params(self) -> nnx.State:
        """The shapes, dtypes and shardings of the parameters.

        Raises:
          UserError: a mesh axis does not divide a parameter's dimension.
        """
        return with_shardings(self._abstract[1], self.mesh)

    def merge(self, params: nnx.State) -> Transformer:
        """Returns the model with these parameters."""
        return nnx.merge(self._abstract[0], params)

    def weight(self, name: str) -> Weight | nnx.Param[Any]:
        """Returns the abstract weight (or a norm's scale) with this name in the table of parameters.

        All layers are stacked, and there are no values.
        """
        found: Any = self.merge(self.params)
        for attribute in name.split("."):
            found = getattr(found, attribute)
        return found

    def pack(self, name: str, array: jax.Array) -> Arrays:
        """Converts the dense array of one layer to the arrays that are stored for it, by their full names."""
        holder = self.weight(name)
        if not isinstance(holder, Weight):  # the scale of a norm
            return {name: array.astype(holder.dtype)}
        return {f"{name}.{key}".removesuffix(".array"): x for key, x in holder.pack(array).items()}

    def create(self, key: jax.Array, names: Collection[str] | None = None) -> Arrays:
        """Returns random values of the named arrays, or of all arrays. Call it under jit."""
        arrays = named_arrays(nnx.state(self._create(key), nnx.Param))
        return arrays if names is None else {name: arrays[name] for name in names}

    def init(self, seed: int) -> nnx.State:
        """Returns random parameters, each made in place on the mesh: no device or host holds the whole model.

        Raises:
          UserError: the parameters do not fit into memory.
        """
        require_memory(self.params, "the model")
        out = {name: x.sharding for name, x in named_arrays(self.params).items()}
        sizes = {name: x.size for name, x in named_arrays(self.params).items()}
        # One program holds the temporaries of all its arrays at once, several times the memory of a layer. So
        # a large model is made one array at a time.
        groups = [[name] for name in out] if sum(sizes.values()) > SMALL else [[*out]]
        made: Arrays = {}
        for group in groups:
            create = functools.partial(self.create, names=group)
            made |= jax.jit(create, out_shardings={name: out[name] for name in group})(jax.random.key(seed))
            jax.block_until_ready(made)
        return with_arrays(self.params, made)
