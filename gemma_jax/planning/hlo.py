"""The optimised program that XLA prints, read as text: computations, instructions, loops.

The format is that of `jax.stages.Compiled.as_text()`. An instruction is a line

    %name = TYPE opcode(%operand, ...), attribute=value, ..., metadata={...}, backend_config={...}
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bytes of an element; predicates are stored as bytes, 4-bit numbers as halves.
ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
    "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"([\w\-]+)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype and shape of an array in a program."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Without the padding of a layout."""
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
    attributes: str  # what follows the operands
    arguments: str  # what stands between the parentheses: for a constant its value

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Of the result, in order; one unless its type is a tuple: `(f32[2,3]{1,0}, s32[])`."""
        # Layouts, {1,0:T(8,128)S(1)}, hold nothing that looks like an array.
        return tuple(
            Array(m[1], tuple(int(n) for n in m[2].split(",") if n))
            for m in _ARRAY.finditer(self.type)
            if m[1] in ITEM_BYTES
        )

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one execution; 0 where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel, for which the compiler has no cycles."""
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.attributes

    def called(self, attribute: str) -> list[str]:
        """Names of the computations under an attribute: `calls`, `body`, `branch_computations`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    def metadata(self, key: str) -> str:
        """`op_name` or `stack_frame_id`; empty where it is not known."""
        found = re.search(rf'(?<!\w)metadata=\{{[^}}]*?\b{key}=("(?:[^"\\]|\\.)*"|\d+)', self.attributes)
        return found[1].strip('"') if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of a program, in the order of execution."""

    name: str
    instructions: dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, ...]]  # FILE:LINE of a stack frame and of its callers, innermost first

    def source(self, instruction: Instruction) -> str:
        """FILE:LINE of the code that an instruction comes from, and of its callers, innermost first."""
        return " < ".join(self.frames.get(int(instruction.metadata("stack_frame_id") or 0), ()))


def parse(text: str) -> Module:
    """Read a program.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] = {}
    lines: list[str] = []  # of one instruction: attributes that are text may hold line breaks

    def end() -> None:
        if lines:
            text = "\n".join(lines)
            start = _INSTRUCTION.match(text)
            assert start
            current[start[1]] = _instruction(text[start.end() :], start[1])
            lines.clear()

    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = {}
            computations[header[2]] = Computation(header[2], current)
            if header[1]:
                entry = header[2]
        elif line == "}":
            end()
        elif _INSTRUCTION.match(line):
            end()
            lines.append(line)
        elif lines:
            lines.append(line)
    if not entry:
        raise ValueError("the text of the program has no ENTRY computation")
    return Module(computations, entry, _frames(text))


def _frames(text: str) -> dict[int, tuple[str, ...]]:
    """The tables in front of a program: files, functions, places in them, and who called whom."""
    files = {int(m[1]): m[2] for m in re.finditer(r'^(\d+) "([^"]*)"$', _table(text, "FileNames"), re.M)}
    places = {
        int(m[1]): f"{files[int(m[2])]}:{m[3]}"
        for m in re.finditer(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _table(text, "FileLocations"), re.M
        )
    }
    parents = {
        int(m[1]): (int(m[2]), int(m[3] or 0))
        for m in re.finditer(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _table(text, "StackFrames"), re.M
        )
    }
    # The first frame has no caller: where it names itself, all numbers of callers are printed one too high.
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


def _table(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)
    return found[1] if found else ""


def _instruction(rest: str, name: str) -> Instruction:
    # A tuple's type stands in parentheses; any other has no space.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end + 1)
    if opcode is None:
        return Instruction(name, rest[end + 1 :].split(" ")[0], rest[:end], (), "", "")
    close = _closing(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode[1], rest[:end], operands, rest[close + 1 :], arguments)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; strings are passed over."""
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
    """How often a while loop's body runs; None where the text does not say.

    The compiler writes it down (`known_trip_count`) for some loops. Else it is read from a condition that
    does nothing but compare the counter with a constant, if the counter starts from a constant; it is taken
    to rise by one.
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
    """An instruction in its place: how often a step executes it."""

    instruction: Instruction
    computation: Computation
    count: int
    counted: bool  # False where the trip count of a loop around it (of a loop: its own) is taken as 1

    @property
    def operand_arrays(self) -> tuple[Array, ...]:
        """Of all operands, in order."""
        operands = (self.computation.instructions[name] for name in self.instruction.operands)
        return tuple(array for operand in operands for array in operand.arrays)


def executions(module: Module, name: str = "", count: int = 1, counted: bool = True) -> Iterator[Execution]:
    """Every instruction that a run of the program executes, with its number of executions.

    Bodies of loops, calls and asynchronous calls are entered; fusions are one instruction each. Of a
    conditional's branches the one with most cycles is taken.

    Args:
      module: the program.
      name: of the computation to begin with; the program's entry if empty.
      count: executions of that computation.
      counted: whether this count is known.
    """
    computation = module.computations[name or module.entry]
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            trips = trip_count(module, computation, instruction)
            yield Execution(instruction, computation, count, trips is not None)
            (body,) = instruction.called("body")
            known = counted and trips is not None
            yield from executions(module, body, count * (1 if trips is None else trips), known)
            continue
        yield Execution(instruction, computation, count, counted)
        if instruction.opcode == "call":
            yield from executions(module, instruction.called("to_apply")[0], count, counted)
        elif instruction.opcode == "async-start":
            yield from executions(module, instruction.called("calls")[0], count, counted)
        elif instruction.opcode == "conditional":
            branches = instruction.called("branch_computations") or [
                *instruction.called("true_computation"),
                *instruction.called("false_computation"),
            ]
            heaviest = max(
                (list(executions(module, branch, count, counted)) for branch in branches),
                key=lambda executed: sum(e.instruction.cycles * e.count for e in executed),
            )
            yield from heaviest


def descend(module: Module, instruction: Instruction, attribute: str = "calls") -> Iterator[Instruction]:
    """The instructions of the computations under an attribute of one, and inside fusions in them."""
    for name in instruction.called(attribute):
        for inner in module.computations[name].instructions.values():
            yield inner
            yield from descend(module, inner)
