"""Measures what a compiled program needs: memory, cycles, kernels, and bytes sent between devices."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from gemma_jax.planning.collectives import Collective, collectives
from gemma_jax.planning.compiler import Compiled
from gemma_jax.planning.gpu import Chip
from gemma_jax.planning.hlo import ITEM_BYTES, Array, Execution, Module, executions, parse
from gemma_jax.planning.roofline import with_times

# Number of matmuls in each of splash attention's kernels, by a part of the kernel's name. The forward kernel
# computes scores and output; the dq kernel computes scores and the gradients of the attention weights and the
# queries; the dkv kernel computes scores and the gradients of the attention weights, keys and values. If the
# backward pass is fused into one kernel, dkv does the work of dq too.
SPLASH_PRODUCTS = {"_fwd": 2, "_dq": 3, "_dkv": 4}
FUSED_BACKWARD_PRODUCTS = 5
# The same for jax's Triton kernels. The backward one computes scores and gradients of the weights twice.
TRITON_PRODUCTS = {"mha_forward": 2, "mha_backward": 7}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel with all its executions in a step. The compiler estimates no cycles for it."""

    name: str
    attention: bool
    count: int  # executions per step
    flops: float  # per step; for causal attention, half of the full matmuls; 0 if unknown


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cycles of a step that come from one place in the code."""

    op_name: str  # jax's name for the operation
    source: str  # FILE:LINE, innermost first
    cycles: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The analysis of a compiled program. All figures are for one device and one step."""

    memory: dict[str, int]  # bytes by purpose; their sum is what the program needs
    cycles: int  # the compiler's estimates, with loop iterations but without Pallas kernels
    cycles_outside: int  # of these, those outside loops of unknown length
    uncounted_loops: int  # loops counted once, because the program does not state their trip count
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    costs: tuple[Cost, ...]  # most cycles first


def analyse(
    compiled: Compiled,
    argument_bytes: Mapping[str, int],
    mesh_shape: Mapping[str, int],
    chip: Chip | None = None,
) -> Analysis:
    """Analyse a compiled program.

    Args:
      compiled: The program.
      argument_bytes: Bytes of its arguments by purpose, computed from their shapes.
      mesh_shape: Sizes of the mesh axes, in the order that defines the device indices.
      chip: The GPU that the program is for, whose cycles are modelled nanoseconds; None for TPU.
    """
    memory = dict(argument_bytes)
    memory["padding"] = compiled.arguments - sum(memory.values())  # bytes that the layouts add to the shapes
    memory["outputs"] = compiled.outputs - compiled.aliased  # those not in the memory of arguments
    memory["temporaries"] = compiled.temporaries
    module = parse(compiled.text)
    if chip:
        module = with_times(module, chip)
    executed = list(executions(module))
    kernels = [e for e in executed if e.instruction.is_kernel]
    fused = not any("_dq" in e.instruction.name for e in kernels)
    return Analysis(
        memory,
        sum(e.instruction.cycles * e.count for e in executed),
        sum(e.instruction.cycles * e.count for e in executed if e.counted),
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
    return tuple(Cost(*place, total) for place, total in cycles.most_common())


def _kernel(executed: Execution, fused_backward: bool) -> Kernel:
    instruction = executed.instruction
    name = re.sub(r"\.\d+$", "", instruction.name)
    if on_gpu := re.search(r"\bmha_(forward|backward)\b", instruction.metadata("op_name")):
        name = on_gpu[0]
    products = next((n for part, n in SPLASH_PRODUCTS.items() if part in name), 0)
    if name in TRITON_PRODUCTS:
        # q [B, L, K, G, H] and k [B, S, K, H]
        q, k = executed.operand_arrays[:2]
        product = 2.0 * math.prod(q.shape) * k.shape[1]
        return Kernel(name, True, executed.count, TRITON_PRODUCTS[name] * product / 2 * executed.count)
    if not name.startswith("splash") or not products:
        # The author of a kernel may have stated its FLOPs (pallas.CostEstimate).
        stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
        return Kernel(name, False, executed.count, float(stated[1]) * executed.count if stated else 0.0)
    if "_dkv" in name and fused_backward:
        products = FUSED_BACKWARD_PRODUCTS
    # q [..., heads, L, H] and k [..., S, H] are the first two float operands with more than one axis.
    q, k = [array for array in executed.operand_arrays if _is_float(array) and len(array.shape) > 1][:2]
    product = 2.0 * math.prod(q.shape) * k.shape[-2]
    return Kernel(name, True, executed.count, products * product / 2 * executed.count)


def _is_float(array: Array) -> bool:
    return array.dtype in ITEM_BYTES and "f" in array.dtype
