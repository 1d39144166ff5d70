"""What a compiled program needs: memory, cycles, bytes between devices."""

import dataclasses

from jax.sharding import Mesh

from gemma_jax.planning.collectives import Collective, collectives
from gemma_jax.planning.compiler import Compiled
from gemma_jax.planning.hlo import executions, parse
from gemma_jax.planning.programs import Program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel, for which the compiler gives no cycles."""

    name: str
    arrays: tuple[str, ...]  # operands
    count: int  # executions a step


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A program that fits. Everything is a step of one device."""

    memory: dict[str, int]  # bytes by what they are; the total is their sum
    cycles: int  # the compiler's estimate, loops counted, kernels not
    uncounted_loops: int  # loops whose number of rounds the program does not tell, counted once
    kernels: list[Kernel]
    collectives: list[Collective]

    @property
    def total_memory(self) -> int:
        """Bytes a device."""
        return sum(self.memory.values())


def analyse(program: Program, compiled: Compiled, mesh: Mesh) -> Analysis:
    """Read a compiled program: its memory is arguments, outputs in a place of their own, and temporaries."""
    memory = dict(program.argument_bytes)
    # What layouts add to shapes, and constants.
    memory["padding"] = compiled.arguments - sum(memory.values())
    memory["outputs"] = compiled.outputs - compiled.aliased
    memory["temporaries"] = compiled.temporaries
    module = parse(compiled.text)
    cycles, uncounted, kernels = 0, 0, []
    for executed in executions(module):
        instruction = executed.instruction
        cycles += instruction.cycles * executed.count
        uncounted += instruction.opcode == "while" and not executed.counted
        if instruction.is_kernel:
            arrays = tuple(map(str, executed.operand_arrays))
            kernels.append(Kernel(instruction.metadata("op_name"), arrays, executed.count))
    return Analysis(memory, cycles, uncounted, kernels, collectives(module, dict(mesh.shape)))
