"""A model without its numbers."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.config import ComputeConfig, TransformerConfig
from gemma_jax.memory import require_memory
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import with_shardings
from gemma_jax.weights import Dense, Kind, Weight


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a model is, how it is computed, where, and what its weights are made of."""

    config: TransformerConfig
    compute: ComputeConfig
    mesh: Mesh
    kind: Kind = Dense

    def _create(self, key: jax.Array | int) -> Transformer:
        return Transformer(self.config, self.compute, self.mesh, nnx.Rngs(key), self.kind)

    @functools.cached_property
    def _abstract(self) -> tuple[nnx.GraphDef[Transformer], nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self._create(0)), nnx.Param)

    @property
    def graphdef(self) -> nnx.GraphDef[Transformer]:
        """The structure of the model."""
        return self._abstract[0]

    @functools.cached_property
    def params(self) -> nnx.State:
        """Shapes, dtypes and shardings of the parameters.

        Raises:
          UserError: the mesh does not divide a parameter.
        """
        return with_shardings(self._abstract[1], self.mesh)

    def merge(self, params: nnx.State) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)

    def weight(self, name: str) -> Weight | nnx.Param[Any]:
        """The weight of a name in the table of parameters, all layers stacked, without numbers; or the scale
        of a norm."""
        found: Any = self.merge(self.params)
        for attribute in name.split("."):
            found = getattr(found, attribute)
        return found

    def create(self, key: jax.Array) -> nnx.State:
        """Random parameters, to be called under jit with the shardings of `params` for the result."""
        return nnx.state(self._create(key), nnx.Param)

    def init(self, seed: int) -> nnx.State:
        """Random parameters, each made in place on the mesh: no device or host ever holds the whole model.

        Raises:
          UserError: they do not fit into memory.
        """
        require_memory(self.params, "the model")
        out = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        return jax.jit(self.create, out_shardings=out)(jax.random.key(seed))
