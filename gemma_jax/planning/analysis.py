"""What a compiled program needs: memory, cycles, kernels, bytes between devices."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from gemma_jax.planning.collectives import Collective, collectives
from gemma_jax.planning.compiler import Compiled
from gemma_jax.planning.hlo import ITEM_BYTES, Array, Execution, Module, executions, parse

# Products of two matrices that each of splash attention's kernels has, by the identifying part of its name:
# scores and values; scores, gradient of the weights, queries; those and gradients of keys and values. The
# last kernel does the work of the second too where the backward pass is fused into one.
SPLASH_PRODUCTS = {"_fwd": 2, "_dq": 3, "_dkv": 4}
FUSED_BACKWARD_PRODUCTS = 5


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel with all its executions in a step. The compiler has no cycles for it."""

    name: str
    attention: bool
    count: int  # executions a step
    flops: float  # in a step; of causal attention half of the products. 0 where it is not known


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of a step that come from one place in the code."""

    op_name: str  # jax's name of the operation
    source: str  # FILE:LINE, innermost first
    cycles: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A compiled program. Everything is of one device and one step."""

    memory: dict[str, int]  # bytes by what they are; their sum is what the program needs
    cycles: int  # the compiler's estimates, loops counted, kernels not
    uncounted_loops: int  # loops whose number of rounds is not in the program: counted once
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    costs: tuple[Cost, ...]  # most cycles first


def analyse(compiled: Compiled, argument_bytes: Mapping[str, int], mesh_shape: Mapping[str, int]) -> Analysis:
    """Read a compiled program.

    Args:
      compiled: the program.
      argument_bytes: of its arguments, by what they are, as shapes say.
      mesh_shape: sizes of the mesh axes, in the order that numbers the devices.
    """
    memory = dict(argument_bytes)
    memory["padding"] = compiled.arguments - sum(memory.values())  # what layouts add to shapes
    memory["outputs"] = compiled.outputs - compiled.aliased  # in a place of their own
    memory["temporaries"] = compiled.temporaries
    module = parse(compiled.text)
    executed = list(executions(module))
    kernels = [e for e in executed if e.instruction.is_kernel]
    fused = not any("_dq" in e.instruction.name for e in kernels)
    return Analysis(
        memory,
        sum(e.instruction.cycles * e.count for e in executed),
        sum(e.instruction.opcode == "while" and not e.counted for e in executed),
        tuple(_kernel(e, fused) for e in kernels),
        tuple(collectives(module, mesh_shape)),
        _costs(module, executed),
    )


def _costs(module: Module, executed: Sequence[Execution]) -> tuple[Cost, ...]:
    cycles: Counter[tuple[str, str]] = Counter()
    for e in executed:
        if e.instruction.cycles:
            place = (e.instruction.metadata("op_name"), module.source(e.instruction))
            cycles[place] += e.instruction.cycles * e.count
    return tuple(Cost(name, source, total) for (name, source), total in cycles.most_common())


def _kernel(executed: Execution, fused_backward: bool) -> Kernel:
    instruction = executed.instruction
    name = re.sub(r"\.\d+$", "", instruction.name)
    products = next((n for part, n in SPLASH_PRODUCTS.items() if part in name), 0)
    if not name.startswith("splash") or not products:
        # The author of a kernel may have stated its work (pallas.CostEstimate).
        stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
        return Kernel(name, False, executed.count, float(stated[1]) * executed.count if stated else 0.0)
    if "_dkv" in name and fused_backward:
        products = FUSED_BACKWARD_PRODUCTS
    # q [..., heads, L, H] and k [..., S, H] are the first two operands of a float dtype.
    q, k = [array for array in executed.operand_arrays if _is_float(array) and len(array.shape) > 1][:2]
    product = 2.0 * math.prod(q.shape) * k.shape[-2]
    return Kernel(name, True, executed.count, products * product / 2 * executed.count)


def _is_float(array: Array) -> bool:
    return array.dtype in ITEM_BYTES and "f" in array.dtype
