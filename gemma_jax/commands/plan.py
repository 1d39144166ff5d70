"""`gemma plan CONFIG --topology v5e-256`: what a run would need on TPUs that are not here."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_jax.config import PretrainConfig, load, parse, validate, validate_on_devices
from gemma_jax.config.sections import setting
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from gemma_jax.planning.analysis import Analysis
    from gemma_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class PlanOptions(PretrainConfig):
    """Compile a config's training step for TPUs that are not here, and print what it would need."""

    topology: str = setting("", "The TPU slice: v5e-256, v5p-128 (TensorCores), or by layout, v5p-4x4x8.")
    slices: int = setting(1, "Slices, connected by the data-centre network.")
    compiler_option: tuple[str, ...] = setting((), "Options of the XLA compiler: NAME=VALUE.")
    explain: bool = setting(False, "Show where each collective comes from.")
    json: bool = setting(False, "Print one JSON object and nothing else.")
    dump_hlo: str = setting("", "A file to write the compiled program's text to.")


def run(arguments: Sequence[str], prog: str) -> int:
    """Print the plan of a config."""
    if not arguments or arguments[0].startswith("-"):
        parse(PlanOptions(), [a for a in arguments if a in ("-h", "--help")], f"{prog} CONFIG")
        raise UserError(f"name a config first: {prog} CONFIG --topology v5e-256.")
    name, *rest = arguments
    base, name = load(name, PretrainConfig)
    sections = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    options = parse(PlanOptions(**sections), rest, f"{prog} {name}")
    config = PretrainConfig(**{field: getattr(options, field) for field in sections})
    validate(config)

    from gemma_jax.planning.compiler import compiler_version, prepare
    from gemma_jax.planning.topology import parse_topology

    topology = parse_topology(options.topology, options.slices)
    prepare()

    from gemma_jax.planning.analysis import analyse
    from gemma_jax.planning.compiler import OutOfMemory, compile_lowered, devices_of
    from gemma_jax.planning.programs import pretrain_step
    from gemma_jax.sharding import make_mesh

    devices = devices_of(topology)
    validate_on_devices(config, len(devices))
    mesh = make_mesh(config.mesh, devices)
    program = pretrain_step(config, mesh)
    try:
        compiled = compile_lowered(
            program.lowered, dict(option.split("=", 1) for option in options.compiler_option)
        )
    except OutOfMemory as error:
        print(f"does not fit: needs {_gib(error.needed)} of {_gib(error.available)}")
        return 1
    if options.dump_hlo:
        with open(options.dump_hlo, "w", encoding="utf-8") as file:
            file.write(compiled.text)
    analysis = analyse(program, compiled, mesh)
    if options.json:
        print(json.dumps({"topology": str(topology), **dataclasses.asdict(analysis)}))
        return 0
    print(f"{name} on {topology}: {topology.chips} chips, {len(devices)} devices ({compiler_version()})")
    _print(analysis, topology, options.explain)
    return 0


def _print(analysis: "Analysis", topology: "Topology", explain: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=160)
    parts = ", ".join(f"{_gib(size)} {part}" for part, size in analysis.memory.items() if size)
    console.print(f"fits: {_gib(analysis.total_memory)} a device = {parts}")
    clock = topology.generation.clock
    told = f"{analysis.cycles / clock:.3f} s" if clock else f"{analysis.cycles:,} cycles (uncalibrated)"
    console.print(f"step: {told} without Pallas kernels")
    for kernel in analysis.kernels:
        console.print(f"kernel: {kernel.count} x {kernel.name} {' '.join(kernel.arrays)}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    titles = ("collective", "axis", "executions", "MiB a step", *(("arrays", "source") if explain else ()))
    for title in titles:
        table.add_column(title, overflow="fold")
    rows: dict[tuple[Any, ...], list[float]] = {}
    for c in analysis.collectives:
        key = (c.kind, c.axis, *((" ".join(c.arrays), f"{c.op_name} {c.source}") if explain else ()))
        sums = rows.setdefault(key, [0, 0])
        sums[0] += c.count
        sums[1] += c.bytes
    for (kind, axis, *more), (count, size) in sorted(rows.items(), key=lambda row: -row[1][1]):
        table.add_row(kind, axis, f"{count:,}", f"{size / 2**20:,.1f}", *more)
    console.print(table)


def _gib(size: int | None) -> str:
    return "an unknown amount" if size is None else f"{size / 2**30:.2f} GiB"
