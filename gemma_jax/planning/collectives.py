"""Lists the collectives of a program: their kind, their mesh axis, and the bytes per step."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from gemma_jax.planning.hlo import Array, Instruction, Module, descend, executions

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, with all its executions in a step."""

    kind: str
    axis: str  # the mesh axes that its groups span, joined by ` x `
    arrays: tuple[str, ...]  # full arrays: the result of an all-gather, the operand of a reduce-scatter
    count: int  # executions per step
    bytes: float  # received by one device per step
    source: str  # the code that caused it, innermost first
    op_name: str  # jax's name for the operation


def collectives(module: Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Returns all collectives that a step executes.

    Their bytes are those that one device receives under the bandwidth-optimal algorithm. In a group of n
    devices these are (n - 1) / n of the result of an all-gather or of the operand of a reduce-scatter or
    all-to-all, twice that fraction for an all-reduce, and the whole array for a permute.

    Args:
      module: The optimised program.
      mesh_shape: Sizes of the mesh axes, in the order that defines the device indices.
    """
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for executed in executions(module):
        for instruction, kind in _inside(module, executed.instruction):
            # The compiler can spread a collective over a chain of fusions, each with a copy of it. The copies
            # count as one. (channel_id does not identify it: all collectives of a shard_map can share one.)
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            key = (executed.computation.name, chain[0] if chain else instruction.name)
            if key in seen:
                continue
            seen.add(key)
            if instruction.opcode == "recv":
                axis, size = "slice", mesh_shape.get("slice", 1)
            else:
                groups = _groups(instruction.attributes) or [list(range(math.prod(mesh_shape.values())))]
                axis, size = _axis(groups, mesh_shape), len(groups[0])
            if size < 2:
                continue
            arrays = _whole_arrays(instruction, kind, size)
            rest = (size - 1) / size
            share = {"all-reduce": 2 * rest, "collective-permute": 1.0}.get(kind, rest)
            received = share * sum(array.bytes for array in arrays) * executed.count
            of = instruction if instruction.metadata("op_name") else executed.instruction
            about = (executed.count, received, module.source(of), of.metadata("op_name"))
            found.append(Collective(kind, axis, tuple(map(str, arrays)), *about))
    return found


def _inside(module: Module, instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
    """Yields the collectives in an instruction, each with its kind."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode == "recv" and transfer:
        # Between slices, a collective is a transfer through the hosts: a pair of send and recv.
        yield instruction, transfer[1].lower().replace("_", "-")
    inner = descend(module, instruction) if instruction.opcode == "fusion" else [instruction]
    for one in inner:
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # A reduce-scatter can appear as a fusion of an all-reduce and a slice.
        scatters = kind == "all-reduce" and "all-reduce-scatter" in "".join(instruction.called("calls"))
        yield one, "reduce-scatter" if scatters else kind


def _whole_arrays(instruction: Instruction, kind: str, size: int) -> tuple[Array, ...]:
    arrays = instruction.arrays
    if instruction.opcode == "recv":
        return arrays[:1]  # the received array; a counter follows
    if instruction.opcode.endswith("-start") and len(arrays) > (count := len(instruction.operands)):
        # The type is (operands, results, and counters for a permute); take the whole ones.
        return arrays[:count] if kind == "reduce-scatter" else arrays[count : 2 * count]
    if instruction.opcode == "reduce-scatter":
        return tuple(Array(a.dtype, (size, *a.shape)) for a in arrays)
    return arrays


def _groups(attributes: str) -> list[list[int]]:
    """Parses groups of device indices, all of one size; a permute has pairs. No groups means all devices."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(found[2]).reshape(_numbers(found[1])[0], -1).tolist()
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(?(\[[\d,]+\](?:T\([\d,]+\))?)\)?)? \{([^}]*)\}",
        attributes,
    )
    if found is None:
        return []
    # In mesh['a'=4,'b'=2] {'b'} the groups run along the named axes; 'a':(2)2 is a part of an axis.
    axes = [(name, int(size)) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", found[1])]
    sizes: list[int] = []
    along: list[int] = []
    for name, size in axes:
        part = re.search(rf"'?\b{name}\b'?(?::\((\d+)\)(\d+))?", found[3])
        before, width = (int(part[1]), int(part[2])) if part and part[1] else (1, size)
        if part:
            along.append(len(sizes) + 1)
        sizes += [before, width, size // (before * width)]
    ids = _iota(found[2]) if found[2] else np.arange(math.prod(sizes))
    across = [axis for axis in range(len(sizes)) if axis not in along]
    width = math.prod(sizes[axis] for axis in along)
    return ids.reshape(sizes).transpose(across + along).reshape(-1, width).tolist()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """Parses `[2,4]T(1,0)`: the integers from 0 in that shape, then transposed."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"device numbers {text} are in a form that is not known")
    shape = _numbers(found[1])
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(found[2])) if found[2] else ids


def _axis(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> str:
    """Returns the mesh axes along which the members of a group differ."""
    places = np.unravel_index(np.array(groups), tuple(mesh_shape.values()))
    by_axis = zip(mesh_shape, places, strict=True)
    return " x ".join(name for name, along in by_axis if (along != along[:, :1]).any())
