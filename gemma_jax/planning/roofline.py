"""Models the time of each instruction of a GPU program, for which the compiler estimates none.

An instruction takes the longer of two times: its floating-point operations at the peak of their dtype, and
the bytes that it reads and writes at the bandwidth of the memory. This is the least that it can take.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from gemma_jax.planning.gpu import Chip
from gemma_jax.planning.hlo import Array, Computation, Instruction, Module

# These move no bytes, or their inner instructions or the networks' speeds count.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|partition-id|opt-barrier|"
    r"(all-|reduce-scatter|collective-|ragged-|async-|copy-done|send|recv).*"
)
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # change a part of their first operand to that operand
_PARTS = ("dynamic-slice", "slice", "gather")  # read a part of their first operand


def with_times(module: Module, chip: Chip) -> Module:
    """Returns the program with the modelled nanoseconds of each instruction in the place of cycles."""

    def timed(computation: Computation) -> Computation:
        instructions = {
            name: dataclasses.replace(i, modelled=_nanoseconds(module, computation, i, chip))
            for name, i in computation.instructions.items()
        }
        return Computation(computation.name, instructions)

    return dataclasses.replace(module, computations={n: timed(c) for n, c in module.computations.items()})


def _nanoseconds(module: Module, computation: Computation, instruction: Instruction, chip: Chip) -> int:
    if instruction.is_kernel or _FREE.fullmatch(instruction.opcode):
        return 0
    products = sum(
        _flops(one, home) / _peak(one, home, chip)
        for one, home in _with_homes(module, computation, instruction)
        if one.opcode == "dot" or "__cublas$" in one.attributes
    )
    moved = _bytes(module, computation, instruction) / chip.bandwidth
    return round(1e9 * max(products, moved))


def _with_homes(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Instruction, Computation]]:
    """Yields the instruction and those inside it, each with its computation."""
    yield instruction, computation
    for name in instruction.called("calls"):
        inner = module.computations[name]
        for one in inner.instructions.values():
            yield from _with_homes(module, inner, one)


def _operand(instruction: Instruction, computation: Computation) -> Array:
    return computation.instructions[instruction.operands[0]].arrays[0]


def _flops(product: Instruction, computation: Computation) -> float:
    """Returns the operations of a product of two matrices, of XLA or of cuBLAS."""
    found = re.search(r'lhs_contracting_dim(?:s=|ensions":)[{\[]([\d,"]*)', product.attributes)
    numbers = re.findall(r"\d+", found[1]) if found else []
    contracted = math.prod(_operand(product, computation).shape[int(n)] for n in numbers)
    return 2.0 * math.prod(product.arrays[0].shape) * contracted


def _peak(product: Instruction, computation: Computation, chip: Chip) -> float:
    dtype = _operand(product, computation).dtype
    if dtype in ("s8", "u8"):
        return 2 * chip.flops
    if dtype == "f16" or (dtype == "bf16" and chip.has_bfloat16):
        return chip.flops
    is_exact = "highest" in product.attributes.lower() or not chip.has_bfloat16
    return chip.float32_flops if is_exact else chip.flops / 2  # TensorFloat-32


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that an instruction reads and writes; of an array, only the part that it uses."""
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]].instructions
    else:
        # As if the instruction were alone in a fusion.
        inner = {one.name: dataclasses.replace(one, opcode="parameter") for one in operands}
        inner[instruction.name] = instruction
    users: dict[str, list[Instruction]] = {}
    for one in inner.values():
        for name in one.operands:
            users.setdefault(name, []).append(one)
    read = sum(_read(one, users) for one in inner.values() if one.opcode == "parameter")
    (root,) = [one for one in inner.values() if one.name not in users and one.opcode != "parameter"][-1:]
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return read + sum(_written(one, inner) for one in results)


def _written(result: Instruction, inner: Mapping[str, Instruction]) -> float:
    """Returns the bytes of a result of a fusion that are written."""
    while result.opcode == "bitcast":
        result = inner[result.operands[0]]
    at = _UPDATES.get(result.opcode)
    return sum(a.bytes for a in (result if at is None else inner[result.operands[at]]).arrays)


def _read(array: Instruction, users: dict[str, list[Instruction]]) -> float:
    """Returns the bytes of an input of a fusion that are read."""
    whole = sum(a.bytes for a in array.arrays)
    parts = 0.0
    for user in users.get(array.name, []):
        if user.opcode == "bitcast":
            parts += _read(user, users)
        elif user.opcode in _PARTS and user.operands[0] == array.name:
            parts += sum(a.bytes for a in user.arrays)
        elif user.opcode not in _UPDATES or user.operands[0] != array.name:
            return whole
    return min(whole, parts)
