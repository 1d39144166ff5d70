"""Parses the text of an optimised XLA program into computations, instructions and loops.

The format is that of `jax.stages.Compiled.as_text()`. An instruction is a line

    %name = TYPE opcode(%operand, ...), attribute=value, ..., metadata={...}, backend_config={...}
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bytes per element; predicates take a byte, 4-bit numbers half a byte.
ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
    "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8, "c128": 16,
}  # fmt: skip
# A Pallas kernel on TPU; on GPU, one of attention: what other kernels do there is modelled by their bytes.
_KERNEL = re.compile(
    r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton".*\bmha_(forward|backward)\b)'
)
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
# Strings in attributes may contain line breaks, so an instruction can have several lines.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ", re.M)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}$", re.M | re.S)
_OPCODE = re.compile(r"([\w\-]+)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype and shape of an array in a program."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Size in bytes without the padding of a layout."""
        return ITEM_BYTES.get(self.dtype, 0) * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]  # names
    attributes: str  # the text after the operands
    arguments: str  # the text between the parentheses; for a constant, its value
    modelled: int | None = None  # cycles, where the compiler estimates none (roofline.py)

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Arrays of the result, in order; only one unless its type is a tuple: `(f32[2,3]{1,0}, s32[])`."""
        # Layouts, such as {1,0:T(8,128)S(1)}, contain nothing that matches an array.
        return tuple(
            Array(m[1], tuple(int(n) for n in m[2].split(",") if n))
            for m in _ARRAY.finditer(self.type)
            if m[1] in ITEM_BYTES
        )

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one execution, or the modelled one; 0 if it has none."""
        if self.modelled is not None:
            return self.modelled
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @property
    def is_kernel(self) -> bool:
        """Whether this is a Pallas kernel, for which the compiler estimates no cycles."""
        return self.opcode == "custom-call" and _KERNEL.search(self.attributes) is not None

    def called(self, attribute: str) -> list[str]:
        """Names of the computations in an attribute such as `calls`, `body` or `branch_computations`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    def metadata(self, key: str) -> str:
        """Returns the value of a key such as `op_name` or `stack_frame_id`; empty if it is missing."""
        found = re.search(rf'(?<!\w)metadata=\{{[^}}]*?\b{key}=("(?:[^"\\]|\\.)*"|\d+)', self.attributes)
        return found[1].strip('"') if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of a program; its instructions are in the order of execution."""

    name: str
    instructions: dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, ...]]  # by frame id: FILE:LINE of it and its callers, innermost first

    def source(self, instruction: Instruction) -> str:
        """Returns FILE:LINE of an instruction's code and of the callers of that code, innermost first."""
        return " < ".join(self.frames.get(int(instruction.metadata("stack_frame_id") or 0), ()))


def parse(text: str) -> Module:
    """Parse a program.

    Raises:
      ValueError: It has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    for is_entry, name, body in _COMPUTATION.findall(text):
        parts = _INSTRUCTION.split(body)[1:]  # names and what follows them, in turn
        definitions = zip(parts[::2], parts[1::2], strict=True)
        instructions = {one: _instruction(rest.rstrip("\n"), one) for one, rest in definitions}
        computations[name] = Computation(name, instructions)
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("the text of the program has no ENTRY computation")
    return Module(computations, entry, _frames(text))


def _frames(text: str) -> dict[int, tuple[str, ...]]:
    """Parses the tables of files, locations and frames before a program into call stacks by frame id."""

    def table(title: str, row: str) -> Iterator[re.Match[str]]:
        found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)
        return re.finditer(rf"^(\d+) {row}", found[1] if found else "", re.M)

    files = {int(m[1]): m[2] for m in table("FileNames", r'"([^"]*)"$')}
    locations = table("FileLocations", r"\{file_name_id=(\d+) .*?\bline=(\d+)")
    places = {int(m[1]): f"{files[int(m[2])]}:{m[3]}" for m in locations}
    callers = table("StackFrames", r"\{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    parents = {int(m[1]): (int(m[2]), int(m[3] or 0)) for m in callers}
    # The first frame has no caller. If it names itself as caller, all caller ids are printed one too high.
    shift = 1 if parents.get(1, (0, 0))[1] == 1 else 0
    frames: dict[int, tuple[str, ...]] = {}
    for frame in parents:
        stack: list[str] = []
        at = frame
        while at in parents:
            place, parent = parents[at]
            stack.append(places[place])
            at = parent - shift
        frames[frame] = tuple(stack)
    return frames


def _instruction(rest: str, name: str) -> Instruction:
    # The type of a tuple is in parentheses; any other type contains no space.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end + 1)
    if opcode is None:
        return Instruction(name, rest[end + 1 :].split(" ")[0], rest[:end], (), "", "")
    close = _closing(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode[1], rest[:end], operands, rest[close + 1 :], arguments)


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`; strings are skipped."""
    depth, quoted = 0, False
    for at in range(start, len(text)):
        letter = text[at]
        if letter == '"' and text[at - 1] != "\\":
            quoted = not quoted
        elif not quoted and letter == "(":
            depth += 1
        elif not quoted and letter == ")":
            depth -= 1
            if not depth:
                return at
    return len(text)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the body of a while loop runs; None if the text does not show it.

    For some loops the compiler states it (`known_trip_count`). Otherwise it is inferred if the condition only
    compares the counter with a constant and the counter starts from a constant. The counter is assumed to
    increase by one.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = list(descend(module, loop, "condition"))
    compares = [i for i in condition if i.opcode == "compare" and "direction=LT" in i.attributes]
    limits = [i for i in condition if i.opcode == "constant"]
    counters = [i for i in condition if i.opcode == "get-tuple-element"]
    start = computation.instructions.get(loop.operands[0])
    if not len(compares) == len(limits) == len(counters) == 1 or start is None or start.opcode != "tuple":
        return None
    index = re.search(r"index=(\d+)", counters[0].attributes)
    assert index  # every get-tuple-element has one
    first = _through_copies(computation.instructions, start.operands[int(index[1])])
    return max(int(limits[0].arguments) - int(first.arguments), 0) if first.opcode == "constant" else None


def _through_copies(instructions: dict[str, Instruction], name: str) -> Instruction:
    instruction = instructions[name]
    while instruction.opcode in ("copy", "bitcast") and instruction.operands[0] in instructions:
        instruction = instructions[instruction.operands[0]]
    return instruction


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction in its computation, and how often a step executes it."""

    instruction: Instruction
    computation: Computation
    count: int
    counted: bool  # False if a trip count (of an enclosing loop or its own) is unknown and taken as 1

    @property
    def operand_arrays(self) -> tuple[Array, ...]:
        """The arrays of all operands, in order."""
        operands = (self.computation.instructions[name] for name in self.instruction.operands)
        return tuple(array for operand in operands for array in operand.arrays)


def executions(module: Module, name: str = "", count: int = 1, counted: bool = True) -> Iterator[Execution]:
    """Yields every instruction that a run of the program executes, with its number of executions.

    Bodies of loops, calls and asynchronous calls are entered; each fusion counts as one instruction. A
    conditional is assumed to take the branch with the most cycles.

    Args:
      module: The program.
      name: The computation to start from; the program's entry if empty.
      count: The number of executions of that computation.
      counted: Whether that number is known.
    """
    computation = module.computations[name or module.entry]
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            trips = trip_count(module, computation, instruction)
            yield Execution(instruction, computation, count, trips is not None)
            (body,) = instruction.called("body")
            rounds, known = (1, False) if trips is None else (trips, counted)
            yield from executions(module, body, count * rounds, known)
            continue
        yield Execution(instruction, computation, count, counted)
        if attribute := {"call": "to_apply", "async-start": "calls"}.get(instruction.opcode):
            yield from executions(module, instruction.called(attribute)[0], count, counted)
        elif instruction.opcode == "conditional":
            attributes = ("branch_computations", "true_computation", "false_computation")
            branches = [branch for attribute in attributes for branch in instruction.called(attribute)]
            yield from max(
                (list(executions(module, branch, count, counted)) for branch in branches),
                key=lambda executed: sum(e.instruction.cycles * e.count for e in executed),
            )


def descend(module: Module, instruction: Instruction, attribute: str = "calls") -> Iterator[Instruction]:
    """Yields the instructions of the computations in an attribute, and recursively those inside fusions."""
    for name in instruction.called(attribute):
        for inner in module.computations[name].instructions.values():
            yield inner
            yield from descend(module, inner)
