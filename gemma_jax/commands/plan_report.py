"""Reports a plan as a page for people, or as a JSON record for programs."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gemma_jax.commands.tables import report_console, table
from gemma_jax.config import TrainingConfig, to_dict
from gemma_jax.planning.analysis import Analysis
from gemma_jax.planning.compiler import compiler_version
from gemma_jax.planning.estimate import ASSUMPTIONS, GPU_ASSUMPTIONS, Estimate, budget
from gemma_jax.planning.gpu import GpuTopology
from gemma_jax.planning.planner import Plan
from gemma_jax.planning.traffic import origin, places_of, work_of

GIB = 2**30
NETWORKS = {
    "ici": "links between chips",
    "dcn": "data-centre network",
    "node": "links between the GPUs of a node",
    "network": "network between nodes",
}


def record(name: str, config: TrainingConfig, plan: Plan, tokens: float, price: float) -> dict[str, Any]:
    """Returns a plan as JSON values. Memory, bytes and cycles are for one device and one step."""
    analysis, figures, topology = plan.analysis, plan.estimate, plan.topology
    told: dict[str, Any] = {
        "config": name,
        "topology": str(topology),
        "chips": topology.chips,
        "devices": plan.devices,
        "mesh": dict(plan.mesh_shape),
        "settings": to_dict(config),
        "compiler": compiler_version(topology),
        "fits": analysis is not None,
    }
    if analysis is None or figures is None:
        return told | {"needed_bytes": plan.entry.needed, "available_bytes": plan.entry.available}
    collectives = [
        dataclasses.asdict(c) | {"origin": dataclasses.asdict(origin(c, plan.program.parameters))}
        for c in analysis.collectives
    ]
    return told | {
        "memory_bytes": analysis.memory,
        "needed_bytes": sum(analysis.memory.values()),
        "cycles": analysis.cycles,
        "uncounted_loops": analysis.uncounted_loops,
        "kernels": [dataclasses.asdict(kernel) for kernel in analysis.kernels],
        "collectives": collectives,
        "fsdp_bytes": plan.fsdp and {"received": plan.fsdp[0], "minimum": plan.fsdp[1]},
        "estimate": dataclasses.asdict(figures) | {"seconds": figures.seconds},
        "run": dataclasses.asdict(budget(tokens, figures.tokens_per_second, topology.chips, price)),
        "assumptions": _assumptions(plan),
    }


def _assumptions(plan: Plan) -> tuple[str, ...]:
    return GPU_ASSUMPTIONS if isinstance(plan.topology, GpuTopology) else ASSUMPTIONS


def print_plan(name: str, plan: Plan, mode: str, tokens: float, price: float, explain: bool) -> None:
    """Print a page: whether the plan fits, its memory, traffic and time, and the cost of a whole run."""
    console = report_console()
    topology, analysis, figures = plan.topology, plan.analysis, plan.estimate
    chips = f"{topology.chips} chip" + ("s" if topology.chips > 1 else "")
    devices = f"{chips}, {plan.devices} devices" if plan.devices != topology.chips else chips
    where = f"{topology} ({devices}; mesh {_mesh(plan)}; {compiler_version(topology)})"
    console.print(f"[bold]{name}[/], {mode}, on {where}")
    if analysis is None or figures is None:
        console.print(f"[bold]does not fit[/]: {_lack(plan)}")
        return
    per_chip = plan.devices_a_chip
    total = sum(analysis.memory.values()) * per_chip
    parts = ", ".join(
        f"{part} {_size(size * per_chip)}"
        for part, size in analysis.memory.items()
        if part not in ("padding", "outputs") or size >= 0.001 * total
    )
    console.print(f"[bold]fits[/]: {_size(total)} of {topology.memory / GIB:.4g} GiB a chip ({parts})")
    console.print()
    console.print(_collectives(plan, explain))
    if plan.fsdp:
        received, least = plan.fsdp
        console.print(
            f"over fsdp {_size(received)} a device, {received / least:.2f} times the least possible: "
            "each parameter gathered once a pass and its gradient scattered once, in bfloat16"
        )
    console.print()
    if explain:
        console.print(_costs(plan))
        console.print()
    _print_time(console, plan, analysis, figures, mode)
    if mode in ("pretrain", "finetune"):
        run = budget(tokens, figures.tokens_per_second, topology.chips, price)
        cost = "" if run.cost is None else f", {run.cost:,.0f} at {price:g} per chip-hour"
        console.print(
            f"{_count(run.tokens)} tokens: {run.days:,.2f} days, {run.chip_hours:,.0f} chip-hours{cost}"
        )
    console.print(f"[dim]assumed: {'; '.join(_assumptions(plan))}[/]")


def _print_time(console: Console, plan: Plan, analysis: Analysis, figures: Estimate, mode: str) -> None:
    run = "a step" if mode in ("pretrain", "finetune", "decode") else "a batch"
    whole, compiled = _seconds(figures.seconds), _seconds(figures.compiled_seconds)
    kernels = f" + {_seconds(figures.kernel_seconds)} in Pallas kernels" if analysis.kernels else ""
    modelled = " (a roofline)" if isinstance(plan.topology, GpuTopology) else ""
    waits = f", or {_seconds(figures.wait_seconds)} of collectives" if figures.wait_seconds else ""
    console.print(f"[bold]{whole} {run}[/]{modelled} = {compiled} compiled by XLA{kernels}{waits}")
    if not figures.calibrated:
        console.print(
            f"[bold]uncalibrated[/]: no clock is published for {plan.topology}; it is taken so that the "
            "compiler's cycles for a large product give the chip's published peak"
        )
    if mode in ("pretrain", "finetune") and (loops := analysis.uncounted_loops):
        console.print(f"{loops} loops of unknown length are counted once: the step takes longer")
    if mode == "decode":
        read, call = _seconds(figures.read_seconds), _seconds(figures.call_seconds)
        console.print(
            f"a step takes at least {read}, the time of reading the weights and the whole cache; a call, "
            f"which makes many steps, takes {call} more"
        )
    elif figures.unknown_kernels:
        console.print(f"{figures.unknown_kernels} Pallas kernels state no work and are left out")
    for network, seconds in figures.link_seconds.items():
        speed = f"full speed of the {NETWORKS[network]}"
        console.print(f"the bytes above alone take {_seconds(seconds)} at {speed}")
    share = "" if figures.utilisation is None else f", modelled utilisation {figures.utilisation:.1%} of peak"
    tokens = figures.tokens_per_second
    console.print(f"{tokens:,.0f} tokens/s, {tokens / plan.topology.chips:,.0f} a chip{share}")


def _collectives(plan: Plan, explain: bool) -> Table:
    assert plan.analysis
    titles = ["collective", "mesh axis", "a step", "MiB received"]
    titles += ["array", "for", "logical axis", "in", "asked for by"] if explain else []
    shown = table(titles, right=("a step", "MiB received"))
    rows: dict[tuple[str, ...], list[float]] = {}
    for collective in plan.analysis.collectives:
        key: tuple[str, ...] = (collective.kind, collective.axis)
        if explain:
            why = origin(collective, plan.program.parameters)
            names, axes = " | ".join(why.parameters) or "activations", ", ".join(why.logical_axes)
            key += (" ".join(collective.arrays), names, axes, why.work, why.source)
        sums = rows.setdefault(key, [0, 0])
        sums[0] += collective.count
        sums[1] += collective.bytes
    for (kind, axis, *more), (count, size) in sorted(rows.items(), key=lambda row: -row[1][1]):
        shown.add_row(kind, axis, f"{count:,.0f}", f"{size / 2**20:,.1f}", *more)
    return shown


def _costs(plan: Plan) -> Table:
    """Returns a table of the places in the code that take 1% of the time or more."""
    assert plan.analysis and plan.estimate
    shown = table(["time", "share", "in", "operation", "asked for by"], right=("time", "share"))
    total = plan.analysis.cycles
    sums: Counter[tuple[str, str, str]] = Counter()
    for cost in plan.analysis.costs:
        key = (work_of(cost.op_name), cost.op_name.rsplit("/", 1)[-1], places_of(cost.source))
        sums[key] += cost.cycles
    for key, cycles in sums.most_common():
        if cycles >= 0.01 * total:
            seconds = plan.estimate.compiled_seconds * cycles / total
            shown.add_row(_seconds(seconds), f"{cycles / total:.1%}", *key)
    return shown


def print_sweep(name: str, found: Sequence[tuple[TrainingConfig, Plan]], tokens: float, price: float) -> None:
    """Print one line per plan, in the order of `found` (best first)."""
    console = report_console()
    topology = found[0][1].topology
    console.print(f"[bold]{name}[/] on {topology} ({topology.chips} chips; {compiler_version(topology)})")
    figures = ["GiB a chip", "s a step", "tokens/s a chip", "utilisation", "days"]
    shown = table(["mesh", "remat", "batch", *figures], right=figures)
    for config, plan in found:
        settings = (_mesh(plan), config.compute.remat, f"{config.data.batch_size:,}")
        if plan.analysis is None or plan.estimate is None:
            shown.add_row(*settings, "does not fit", _lack(plan))
            continue
        estimate = plan.estimate
        run = budget(tokens, estimate.tokens_per_second, plan.topology.chips, price)
        memory = _gib_a_chip(plan, sum(plan.analysis.memory.values()))
        step = f"{estimate.seconds:.3f}" + ("" if estimate.calibrated else " uncalibrated")
        speed = f"{estimate.tokens_per_second / plan.topology.chips:,.0f}"
        shown.add_row(*settings, memory, step, speed, f"{estimate.utilisation or 0:.1%}", f"{run.days:,.1f}")
    console.print(shown)


def summary(config: TrainingConfig, plan: Plan) -> str:
    """Returns a short summary of one plan of a sweep."""
    settings = f"{_mesh(plan)}, remat {config.compute.remat}, batch {config.data.batch_size}"
    if plan.analysis is None or plan.estimate is None:
        return f"{settings}: does not fit, {_lack(plan)}"
    total = _gib_a_chip(plan, sum(plan.analysis.memory.values()))
    return f"{settings}: {total} GiB a chip, {plan.estimate.seconds:.3f} s a step"


def _lack(plan: Plan) -> str:
    needed, available = plan.entry.needed, plan.entry.available
    if needed is None or available is None:
        return "the compiler does not say how much it needs"
    return f"needs {_gib_a_chip(plan, needed)} of {_gib_a_chip(plan, available)} GiB a chip"


def _gib_a_chip(plan: Plan, size: float) -> str:
    return f"{size * plan.devices_a_chip / GIB:.2f}"


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _mesh(plan: Plan) -> str:
    sizes = [f"{axis} {size}" for axis, size in plan.mesh_shape.items() if size > 1]
    return " x ".join(sizes) or "of one device"


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:.0f}"
