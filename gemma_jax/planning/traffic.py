"""Finds the parameter behind each collective, and the minimum traffic of fully sharded data parallelism."""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from pathlib import PurePath
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.memory import stored_bytes
from gemma_jax.planning.collectives import Collective
from gemma_jax.planning.hlo import ITEM_BYTES
from gemma_jax.sharding import RULES, logical_axes, parameter_name
from gemma_jax.weights import EMBEDDING

# The collectives that move parameters and their gradients; activations move by all-to-all.
PARAMETER_KINDS = ("all-gather", "reduce-scatter", "all-reduce")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter, with the shape that it has in collectives."""

    name: str
    axes: tuple[str, ...]  # logical axes, without `layers`
    shape: tuple[int, ...]  # of one layer, gathered over the fsdp axis
    layers: int  # number of stacked layers; 1 if not stacked
    item_bytes: float = ITEM_BYTES["bf16"]  # of an element while devices exchange it
    trained: bool = True


def parameters(params: Any, mesh: Mesh, frozen: Collection[str] = ()) -> list[Parameter]:
    """Returns the parameters of an abstract model with shardings; `frozen` names the frozen ones."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    found = []
    for path, variable in leaves:
        axes = [str(axis) for axis in logical_axes(variable)]
        for array in jax.tree.leaves(variable):
            layers = array.shape[axes.index("layers")] if "layers" in axes else 1
            sizes = []
            for axis, size, split in zip(axes, array.shape, array.sharding.spec, strict=True):
                if axis != "layers":
                    # Splits over the fsdp axis are gathered; splits over other axes remain.
                    names = (split,) if isinstance(split, str) else split or ()
                    sizes.append(size // math.prod(mesh.shape[name] for name in names if name != "fsdp"))
            kept = tuple(axis for axis in axes if axis != "layers")
            name = parameter_name(path)
            # Dense weights are exchanged in the dtype of the activations, other arrays as they are stored.
            is_dense = name.endswith(".base") or name not in frozen
            size = ITEM_BYTES["bf16"] if is_dense else stored_bytes((2,), array.dtype) / 2
            found.append(Parameter(name, kept, tuple(sizes), layers, size, name not in frozen))
    return found


def fsdp_minimum(params: Sequence[Parameter], parts: int, passes: int) -> float:
    """Returns the bytes that one device must receive per step over an fsdp axis.

    Each parameter is gathered once for each use, and its gradient, if it has one, is scattered once. For each
    part of the batch, the layers are used twice, forward and backward. The embedding is used once: the loss
    computes its gradients in the forward pass, and a token's row is looked up on the device that holds it.

    Args:
      params: The parameters of the model.
      parts: The size of the fsdp axis, in devices.
      passes: The number of parts that a batch is computed in.
    """
    total = 0.0
    for parameter in params:
        uses = (1 if parameter.name.startswith(EMBEDDING) else 2) * passes + parameter.trained
        total += parameter.item_bytes * uses * math.prod(parameter.shape) * parameter.layers
    return total * (parts - 1) / parts


def fsdp_traffic(collectives: Sequence[Collective]) -> float:
    """Returns the bytes that one device receives over the fsdp axis in all-gathers and reductions."""
    return sum(c.bytes for c in collectives if c.axis == "fsdp" and c.kind in PARAMETER_KINDS)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The reason for a collective."""

    parameters: tuple[str, ...]  # the parameters that match its shape; empty for activations
    logical_axes: tuple[str, ...]  # those axes of the parameters that the collective's mesh axes split
    work: str  # the part of the step: forward, recompute, backward or update
    source: str  # FILE:LINE in this package, innermost first


def origin(collective: Collective, params: Sequence[Parameter]) -> Origin:
    """Finds the reason for a collective from jax's name for the operation and the shapes of its arrays.

    The operations that read a weight are in a `jax.named_scope` with the name of its parameter.
    """
    shapes = [_shape(array) for array in collective.arrays]
    scopes = re.split(r"[/()]", collective.op_name)
    scoped = [p for p in params if any(f"{p.name}.".startswith(f"{scope}.") for scope in scopes if scope)]
    in_parts = collective.axis == "fsdp" and collective.kind in PARAMETER_KINDS
    if scoped:
        matches = [p for p in scoped if any(_has_elements_of(shape, p, in_parts) for shape in shapes)]
    else:
        matches = [p for p in params if any(_has_sides_of(shape, p) for shape in shapes)]
    mesh_axes = set(collective.axis.split(" x "))
    held = {axis for parameter in matches for axis in parameter.axes}
    split = sorted(axis for axis in held if mesh_axes.intersection(RULES.get(axis, ())))
    names, source = tuple(p.name for p in matches), places_of(collective.source)
    return Origin(names, tuple(split), work_of(collective.op_name), source)


def work_of(op_name: str) -> str:
    """Returns the part of a step that an operation belongs to, from jax's name for it."""
    if "rematted_computation" in op_name:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def places_of(source: str) -> str:
    """Returns up to three places of a source in this package, innermost first, preferably not in weights/."""
    package = str(PurePath(__file__).parents[1]) + "/"
    places = [place.removeprefix(package) for place in source.split(" < ") if place.startswith(package)]
    return " < ".join(([p for p in places if not p.startswith("weights/")] or places)[:3])


def _shape(array: str) -> tuple[int, ...]:
    return tuple(int(n) for n in array[array.index("[") + 1 : -1].split(",") if n)


def _has_sides_of(shape: tuple[int, ...], parameter: Parameter) -> bool:
    """Whether an array has the shape of a parameter, in one layer or all, with its axes in any order."""
    sides, wanted = (sorted(n for n in sizes if n > 1) for sizes in (shape, parameter.shape))
    return sides in (wanted, sorted([*wanted, parameter.layers]))


def _has_elements_of(shape: tuple[int, ...], parameter: Parameter, in_parts: bool) -> bool:
    """Whether an array has the size of a parameter (plus up to 5% padding) or of a part of it in transit."""
    size, whole = math.prod(shape), math.prod(parameter.shape)
    if any(whole * layers <= size <= 1.05 * whole * layers for layers in (1, parameter.layers)):
        return True
    return in_parts and whole % size == 0 and whole // size in (2**n for n in range(9))
