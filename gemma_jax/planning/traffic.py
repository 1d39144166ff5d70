"""Which parameter a collective is for, and the least that fully sharded data parallelism must send."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.planning.collectives import Collective
from gemma_jax.planning.hlo import ITEM_BYTES
from gemma_jax.sharding import RULES, logical_axes, parameter_name

# How parameters and their gradients travel; activations change places by all-to-all.
PARAMETER_KINDS = ("all-gather", "reduce-scatter", "all-reduce")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as the collectives see it."""

    name: str
    axes: tuple[str, ...]  # logical, without the layers
    shape: tuple[int, ...]  # of one layer, as a group of the fsdp axis holds it together
    layers: int  # 1 for one that is not stacked


def parameters(params: Any, mesh: Mesh) -> list[Parameter]:
    """The parameters of an abstract model with shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    found = []
    for path, variable in leaves:
        axes = [str(axis) for axis in logical_axes(variable)]
        for array in jax.tree.leaves(variable):
            layers = array.shape[axes.index("layers")] if "layers" in axes else 1
            sizes = []
            for axis, size, split in zip(axes, array.shape, array.sharding.spec, strict=True):
                if axis != "layers":
                    # What the fsdp axis splits is gathered; what another axis splits stays apart.
                    names = (split,) if isinstance(split, str) else split or ()
                    sizes.append(size // math.prod(mesh.shape[name] for name in names if name != "fsdp"))
            kept = tuple(axis for axis in axes if axis != "layers")
            found.append(Parameter(parameter_name(path), kept, tuple(sizes), layers))
    return found


def fsdp_minimum(
    params: Sequence[Parameter], parts: int, passes: int, gather_dtype: str, scatter_dtype: str
) -> float:
    """Bytes that one device must receive in a step over an fsdp axis of `parts` devices.

    Each parameter is gathered once a pass and its gradient is scattered once. A step has two passes over the
    layers, forward and backward, and one over the embedding: the loss forms its gradients in the forward
    pass, and a token's row is looked up where it lies.

    Args:
      params: of the model.
      parts: size of the axis.
      passes: over the whole model: the number of parts that a batch is computed in.
      gather_dtype: that parameters are gathered in.
      scatter_dtype: that gradients are scattered in.
    """
    total = 0.0
    for parameter in params:
        gathers = (1 if parameter.name == "embedding" else 2) * passes
        item = gathers * ITEM_BYTES[gather_dtype] + ITEM_BYTES[scatter_dtype]
        total += item * math.prod(parameter.shape) * parameter.layers
    return total * (parts - 1) / parts


def fsdp_traffic(collectives: Sequence[Collective]) -> float:
    """Bytes that one device receives over the fsdp axis in all-gathers and sums."""
    return sum(c.bytes for c in collectives if c.axis == "fsdp" and c.kind in PARAMETER_KINDS)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Why a collective is there."""

    parameters: tuple[str, ...]  # those whose shape it has; none for activations
    logical_axes: tuple[str, ...]  # of these, which the mesh axis of the collective splits
    work: str  # forward, recompute, backward or update
    source: str  # FILE:LINE in this package, innermost first


def origin(collective: Collective, params: Sequence[Parameter]) -> Origin:
    """What a collective is for, by jax's name for the operation and by the shapes of its arrays.

    The operations that read a weight are in a `jax.named_scope` with the name of its parameter.
    """
    shapes = [_shape(array) for array in collective.arrays]
    scopes = re.split(r"[/()]", collective.op_name)
    scoped = [p for p in params if any(f"{p.name}.".startswith(f"{scope}.") for scope in scopes if scope)]
    in_parts = bool(scoped) and collective.axis == "fsdp" and collective.kind in PARAMETER_KINDS
    matches = [
        p
        for p in scoped or params
        if any(_same(shape, p) or (in_parts and _stage_of(shape, p)) for shape in shapes)
    ]
    # Of several parameters of one shape, those whose axes are in this order.
    in_order = [p for p in matches if any(tuple(n for n in shape if n > 1) == p.shape for shape in shapes)]
    matches = in_order or matches
    split = {
        axis
        for axis, mesh_axes in RULES.items()
        if set(mesh_axes) & set(collective.axis.split(" x "))
        if any(axis in parameter.axes for parameter in matches)
    }
    return Origin(
        tuple(p.name for p in matches),
        tuple(sorted(split)),
        work_of(collective.op_name),
        places_of(collective.source),
    )


def work_of(op_name: str) -> str:
    """Which part of a step an operation belongs to, by jax's name for it."""
    if "rematted_computation" in op_name:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def places_of(source: str) -> str:
    """The places of a source in this package, innermost first, at most three, without those of weights/."""
    package = str(PurePath(__file__).parents[1]) + "/"
    places = [place.removeprefix(package) for place in source.split(" < ") if place.startswith(package)]
    return " < ".join(([p for p in places if not p.startswith("weights/")] or places)[:3])


def _shape(array: str) -> tuple[int, ...]:
    return tuple(int(n) for n in array[array.index("[") + 1 : -1].split(",") if n)


def _same(shape: tuple[int, ...], parameter: Parameter) -> bool:
    """Whether an array has a parameter's elements: axes may be merged or turned, and one padded a little."""
    dims = sorted(n for n in shape if n > 1)
    for layers in {1, parameter.layers}:
        wanted = sorted(n for n in (layers, *parameter.shape) if n > 1)
        if dims == wanted:
            return True
        if wanted and dims and math.prod(dims) == math.prod(wanted) and max(wanted) == max(dims):
            return True
        if len(dims) == len(wanted) and all(w <= d <= 1.05 * w for d, w in zip(dims, wanted, strict=True)):
            return len(wanted) > 1
    return False


def _stage_of(shape: tuple[int, ...], parameter: Parameter) -> bool:
    """Whether an array can be a part of a parameter on its way along one dimension of the torus."""
    parts, rest = divmod(math.prod(parameter.shape), math.prod(shape))
    return rest == 0 and parts in (2**n for n in range(9))
