"""What of a weight is static: enough to put it together again from its arrays, whole or in parts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.sharding import Axes, partition_spec
from gemma_jax.weights import fsdp
from gemma_jax.weights.table import Parameter


@dataclasses.dataclass(frozen=True)
class Structure:
    """A weight of one layer without its arrays."""

    parameter: Parameter
    mesh: Mesh
    differentiable: bool
    graphdef: nnx.GraphDef[Any]
    treedef: Any
    axes: tuple[Axes, ...]  # logical, of each array

    @property
    def dense_spec(self) -> list[Any]:
        """Mesh axes of each dimension of the dense array."""
        about = self.parameter
        return list(partition_spec(about.axes, about.shape, self.mesh, about.name))

    def specs(self, arrays: Sequence[jax.Array]) -> list[P]:
        """How each array is split over the mesh."""
        name = self.parameter.name
        return [partition_spec(a, x.shape, self.mesh, name) for a, x in zip(self.axes, arrays, strict=True)]

    def weight(self, arrays: Sequence[jax.Array]) -> Any:
        """The weight with these arrays, whole ones or a device's parts."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, arrays))

    def gather(self, parts: Sequence[jax.Array], specs: Sequence[P]) -> list[jax.Array]:
        """Inside a `shard_map`: the arrays whose parts are on the devices of the fsdp axis."""
        stages = fsdp.stages(self.mesh)
        return [
            fsdp.gather(part, list(spec).index(fsdp.AXIS), stages) if fsdp.AXIS in spec else part
            for part, spec in zip(parts, specs, strict=True)
        ]
