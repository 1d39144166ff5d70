"""Compiles the shipped pretraining configs for their TPUs; writes docs/plans.md and comments in the configs.

    python benchmarks/tpu_plans.py                 # all configs: minutes each; compiled programs are cached
    python benchmarks/tpu_plans.py --only 2b_v5e   # configs with this in their name; the page lists the rest

It needs the TPU compiler (`pip install 'gemma_jax[tpu]'`) but no TPU.
"""

import argparse
import collections
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_jax.config import PretrainConfig, load, replace
from gemma_jax.planning.compiler import prepare
from gemma_jax.planning.topology import parse_topology

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "plans.md"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a topology, with changes to the config's file and the bounds that its plan should meet."""

    config: str
    topology: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    slices: int = 1
    note: str = ""
    most_gib: float | None = None  # upper bound of the memory per chip
    most_seconds: float | None = None  # upper bound of a step's time without Pallas kernels

    @property
    def title(self) -> str:
        """The name of the config, followed by its changes as options."""
        return " ".join([self.config, *(f"--{name} {value}" for name, value in self.changes.items())])


CASES = (
    Case("pretrain_7b_v5e_256", "v5e-256", note="as shipped", most_gib=15, most_seconds=3.5),
    Case(
        "pretrain_7b_v5e_256",
        "v5e-256",
        {"compute.remat": "full", "compute.scan_unroll": 1},
        note="least memory",
        most_gib=7.5,
        most_seconds=3.8,
    ),
    Case("pretrain_2b_v5e_256", "v5e-256", note="as shipped", most_gib=15, most_seconds=0.80),
    Case(
        "pretrain_2b_v5e_256",
        "v5e-256",
        {"compute.remat": "full", "compute.scan_unroll": 1},
        note="least memory",
        most_gib=3.2,
        most_seconds=0.96,
    ),
    Case("pretrain_2b_v5e_16", "v5e-16", note="as shipped", most_gib=8.5, most_seconds=0.96),
    Case("pretrain_2b_v5e_8", "v5e-8", note="as shipped"),
    Case("pretrain_2b_v5p_128", "v5p-128", note="as shipped"),
    Case("pretrain_7b_v5p_128", "v5p-128", note="as shipped"),
    Case("pretrain_2b_v6e_256", "v6e-256", note="as shipped"),
    Case("pretrain_7b_v6e_256", "v6e-256", note="as shipped"),
    Case("pretrain_7b_6t_16x_v5e_256", "v5e-256", slices=16, note="as shipped"),
)


def main() -> None:
    """Plans the cases, and writes the page and the comments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose config's name has one of these")
    chosen = parser.parse_args()
    prepare(parse_topology("v5e-1"))
    rows = []
    for case in CASES:
        if any(part in case.config for part in chosen.only):
            began = time.monotonic()
            rows.append((case, planned(case)))
            print(f"{line(*rows[-1])}  ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    PAGE.write_text(page(rows), encoding="utf-8")
    plans = {case.config: plan for case, plan in rows if not case.changes}
    for name in {case.config for case in CASES}:
        comment(ROOT / "configs" / f"{name}.py", plans.get(name))
    print(f"{PAGE} and the comments of the configs are written", file=sys.stderr)


def planned(case: Case) -> dict[str, Any]:
    """Returns the record that `gemma plan --json` prints for a case."""
    from gemma_jax.commands.plan_report import record
    from gemma_jax.planning.cache import PlanCache
    from gemma_jax.planning.planner import Planner

    config, name = load(str(ROOT / "configs" / f"{case.config}.py"), PretrainConfig)
    config = replace(config, case.changes)
    cache = PlanCache(Path(config.data.cache_dir).expanduser() / "plans")
    plan = Planner(parse_topology(case.topology, case.slices), cache).plan(config)
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    return json.loads(json.dumps(record(name, config, plan, tokens, 0.0)))


def comment(path: Path, plan: dict[str, Any] | None) -> None:
    """Writes the plan into a config's file: replaces the lines `#   ...` below the one with the command."""
    said = ["does not fit"]
    if plan is None:
        said = ["(not planned yet: python benchmarks/tpu_plans.py writes it here)"]
    elif plan["fits"]:
        figures, run = plan["estimate"], plan["run"]
        total = plan["needed_bytes"] * plan["devices"] / plan["chips"] / GIB
        said = [
            f"{total:.2f} GiB a chip; {figures['seconds']:.3f} s a step,",
            f"{figures['compiled_seconds']:.3f} of it without Pallas kernels;",
            f"modelled utilisation {figures['utilisation']:.1%};",
            f"{run['tokens']:.3g} tokens in {run['days']:,.1f} days, {run['chip_hours']:,.0f} chip-hours",
            f"({plan['compiler']}{'' if figures['calibrated'] else '; uncalibrated'})",
        ]
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(number for number, text in enumerate(lines) if text.startswith("# gemma plan ")) + 1
    while lines[at].startswith("#   "):
        del lines[at]
    lines[at:at] = [f"#   {text}" for text in said]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(case: Case, plan: dict[str, Any]) -> str:
    """Returns the row of the table for a case."""
    where = f"{case.slices} x {case.topology}" if case.slices > 1 else case.topology
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    settings = plan["settings"]
    how = f"{case.note}, {where}, {mesh}, {settings['compute']['remat']}, {settings['data']['batch_size']}"
    cells = [case.config, *how.split(", ")]
    if not plan["fits"]:
        return "| " + " | ".join([*cells, "does not fit", "", "", "", ""]) + " |"
    figures, per_chip = plan["estimate"], plan["devices"] // plan["chips"]
    total = plan["needed_bytes"] * per_chip / GIB
    fsdp = plan["fsdp_bytes"]
    cells += [
        f"{total:.2f}" + within(total, case.most_gib),
        f"{figures['compiled_seconds']:.3f}" + within(figures["compiled_seconds"], case.most_seconds),
        f"{figures['seconds']:.3f}" + ("" if figures["calibrated"] else " (uncalibrated)"),
        f"{figures['utilisation']:.1%}",
        f"{fsdp['received'] / fsdp['minimum']:.2f}" if fsdp else "",
    ]
    return "| " + " | ".join(cells) + " |"


def within(value: float, most: float | None) -> str:
    """Returns text that compares a figure with its upper bound; "" if it has none."""
    return "" if most is None else f" of {most:g}" if value <= most else f", MORE than {most:g}"


def page(rows: Sequence[tuple[Case, dict[str, Any]]]) -> str:
    """Returns the text of docs/plans.md."""
    titles = (
        "config", "", "TPUs", "mesh", "remat", "batch", "GiB a chip", "s without Pallas", "s a step",
        "utilisation", "fsdp bytes / least",
    )  # fmt: skip
    text = [
        "# Plans of the shipped configs",
        "",
        f"Written by `python benchmarks/tpu_plans.py` with {rows[0][1]['compiler']}. Nothing here was run:",
        "the real TPU compiler compiled each step; [sharding.md](sharding.md) says how its output is read.",
        "`X of Y` is a figure beside the most that it may be.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *(line(case, plan) for case, plan in rows),
        "",
        "Assumed: " + "; ".join(rows[0][1].get("assumptions", ())) + ".",
    ]
    left = sorted({case.config for case in CASES} - {case.config for case, _ in rows})
    if left:
        text += ["", f"Not planned with this state of the code: {', '.join(left)}."]
    for case, plan in rows:
        text += ["", f"## {case.title}", ""]
        text += details(case, plan)
    return "\n".join(text) + "\n"


def details(case: Case, plan: dict[str, Any]) -> list[str]:
    """Returns lines on the memory, collectives and whole run of one case."""
    command = f"gemma plan {case.title} --topology {case.topology}"
    text = [f"`{command}{f' --slices {case.slices}' if case.slices > 1 else ''}`", ""]
    if not plan["fits"]:
        return [*text, "Does not fit."]
    per_chip = plan["devices"] // plan["chips"]
    parts = ", ".join(
        f"{part} {size * per_chip / GIB:.2f}" for part, size in plan["memory_bytes"].items() if size
    )
    run, figures = plan["run"], plan["estimate"]
    counts = collections.Counter()
    for kernel in plan["kernels"]:
        counts[kernel["name"]] += kernel["count"]
    kernels = [f"{name} x {count}" for name, count in sorted(counts.items())]
    text += [
        f"GiB a chip: {parts}. Pallas kernels: {', '.join(kernels) or 'none'}; "
        f"{figures['kernel_seconds']:.3f} s.",
        f"{figures['tokens_per_second'] / plan['chips']:,.0f} tokens/s a chip; {run['tokens']:.3g} tokens in "
        f"{run['days']:,.1f} days, {run['chip_hours']:,.0f} chip-hours.",
        "",
        "| collective | mesh axis | a step | GiB a device receives |",
        "|---|---|---|---|",
    ]
    sums: dict[tuple[str, str], list[float]] = {}
    for c in plan["collectives"]:
        total = sums.setdefault((c["kind"], c["axis"]), [0, 0])
        total[0] += c["count"]
        total[1] += c["bytes"]
    for (kind, axis), (count, size) in sorted(sums.items(), key=lambda item: -item[1][1]):
        text.append(f"| {kind} | {axis} | {count:,.0f} | {size / GIB:.3f} |")
    return text


if __name__ == "__main__":
    main()
