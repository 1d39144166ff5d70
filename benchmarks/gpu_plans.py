"""Compiles training and sampling for GPUs that need not be here; writes the tables of docs/gpu.md.

    PYTHONPATH=.venv/gpu-compiler python benchmarks/gpu_plans.py               # a quarter of an hour
    PYTHONPATH=.venv/gpu-compiler python benchmarks/gpu_plans.py --only qlora  # commands with this in them

It also writes the comments of the configs for GPUs. It needs XLA's GPU compiler (the extra gpu-compiler, or
`make .venv/gpu-compiler/installed`) but no GPU. Programs that were compiled before are found in the cache.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
GIB = 2**30

# One row of 8,192 tokens a device, with float32 weights and Adam.
LONG = "--data.sequence_length 8192 --compute.loss_vocab_block 16000"
ROW = "--data.batch_size 1 --optimizer.accumulation_steps 1"
FULL = "--data.sequence_length 1024 --new_tokens 1024 --compute.param_dtype bfloat16"
SLOTS = f"--mode decode {FULL}"
QLORA = f"finetune_ultrachat_qlora {ROW}"
SHORT = {"LONG": LONG, "ROW": ROW, "SLOTS": FULL}  # on the page


@dataclasses.dataclass(frozen=True)
class Case:
    """A command of `gemma plan`, and the most GiB a GPU that its plan may take."""

    command: str
    topology: str
    most: float | None = None

    @property
    def whole(self) -> str:
        """The command as a user types it."""
        name, _, rest = self.command.partition(" ")
        return f"gemma plan {name} --topology {self.topology} {rest}".strip()


TRAINING = (
    Case("pretrain_2b_h100_8", "h100-8"),
    Case(f"gemma_2b {LONG} --data.batch_size 1 --compute.remat full", "h100", 40.4),
    Case(f"gemma_2b {LONG} --data.batch_size 1 --compute.remat attention", "h100", 42.3),
    Case(f"gemma_2b {LONG} --data.batch_size 1 --compute.remat projections", "h100", 42.3),
    Case(f"gemma_7b {LONG} --data.batch_size 8 --compute.remat full", "h100-8", 23.1),
    Case(f"gemma_7b {LONG} --data.batch_size 8 --compute.remat attention", "h100-8"),
    Case(f"gemma_7b {LONG} --data.batch_size 16 --compute.remat attention --mesh.slice 2", "2xh100-8"),
    Case("finetune_7b_lora_a100_80", "a100-80"),
    Case(f'{QLORA} --data.sequence_length 8192 --quantization ""', "h100", 26),
    Case(f"{QLORA} --data.sequence_length 8192", "h100", 16),
    Case("finetune_7b_qlora_24gb", "l4"),
    Case("finetune_7b_qlora_24gb", "rtx-4090"),
    Case(QLORA, "t4", 11),
    Case("finetune_quotes_t4", "t4"),
)
KINDS = ("", " --quantization int8", " --quantization int4")
SAMPLING = (
    *(Case(f"gemma_7b {SLOTS} --data.batch_size 16{kind}", "h100") for kind in KINDS),
    *(
        Case(f"gemma_7b {SLOTS} --data.batch_size 16{kind}".replace("decode", "prefill"), "h100")
        for kind in KINDS
    ),
    *(Case(f"gemma_7b {SLOTS} --data.batch_size 4{kind}", "l4") for kind in KINDS[1:]),
    *(Case(f"gemma_2b {SLOTS} --data.batch_size 64{kind}", "l4") for kind in KINDS),
    *(Case(f"gemma_2b {SLOTS} --data.batch_size 16{kind}", "t4") for kind in KINDS),
)
CHIPS = ("t4", "l4", "rtx-4090", "a100-40", "a100-80", "h100", "h200")
ONE_ROW = "--data.batch_size 1 --data.sequence_length 2048"
JOBS = {
    "sample 2B, bfloat16": f"gemma_2b {SLOTS} --data.batch_size 4",
    "sample 7B, bfloat16": f"gemma_7b {SLOTS} --data.batch_size 4",
    "sample 7B, int8": f"gemma_7b {SLOTS} --data.batch_size 4 --quantization int8",
    "sample 7B, int4": f"gemma_7b {SLOTS} --data.batch_size 4 --quantization int4",
    "LoRA 2B": f"finetune_quotes_colab {ONE_ROW}",
    "QLoRA 7B": QLORA,
    "LoRA 7B": f'{QLORA} --quantization ""',
    "train 2B": f"gemma_2b {ONE_ROW} --compute.remat full --compute.loss_vocab_block 16000",
}


def planned(case: Case) -> dict[str, Any]:
    """Returns the record that the command prints as JSON."""
    arguments = re.findall(r'"([^"]*)"|(\S+)', case.whole)
    command = [sys.executable, "-m", "gemma_jax.cli", *("".join(pair) for pair in arguments[1:]), "--json"]
    began = time.monotonic()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if result.returncode not in (0, 1):
        sys.exit(f"{case.whole}\n{result.stderr}")
    record = json.loads(result.stdout)
    print(f"{gib(record)} GiB, {time.monotonic() - began:.0f} s: {case.whole}", file=sys.stderr, flush=True)
    return record


def gib(record: dict[str, Any]) -> str:
    """Returns the memory of a plan; "" if the compiler does not say it."""
    return f"{record['needed_bytes'] / GIB:.2f}" if record["needed_bytes"] else ""


def row(case: Case, record: dict[str, Any]) -> str:
    """Returns the row of a table."""
    size, shown_command = gib(record), case.whole
    for name, options in SHORT.items():
        shown_command = shown_command.replace(options, f"${name}")
    if case.most:
        size += f" of {case.most:g}" if float(size) <= case.most else f", MORE than {case.most:g}"
    if not record["fits"]:
        return f"| `{shown_command}` | {size} | does not fit | | |"
    figures = record["estimate"]
    step, speed = figures["seconds"], figures["tokens_per_second"]
    shown = f"{step:.3f} s" if step >= 0.1 else f"{1000 * step:.1f} ms"
    used = figures["utilisation"]
    return f"| `{shown_command}` | {size} | {shown} | {speed:,.0f} | {f'{used:.0%}' if used else ''} |"


def comment(path: Path, record: dict[str, Any]) -> None:
    """Writes the plan into a config: replaces the lines `#   ...` below the one with the command."""
    figures = record["estimate"]
    said = (
        f"{gib(record)} GiB a GPU; {figures['seconds']:.3f} s a step by a roofline;",
        f"modelled utilisation {figures['utilisation']:.0%}",
        f"({record['compiler']})",
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(number for number, text in enumerate(lines) if text.startswith("# gemma plan ")) + 1
    while lines[at].startswith("#   "):
        del lines[at]
    lines[at:at] = [f"#   {text}" for text in said]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Plans the cases; writes the tables between the marks of the page, and the comments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="commands with this in them; the page is not written")
    only = parser.parse_args().only
    titles = "| command | GiB a GPU | a step | tokens/s | utilisation |\n|---|---|---|---|---|"
    tables: dict[str, str] = {}
    for name, cases in (("training", TRAINING), ("sampling", SAMPLING)):
        records = [(case, planned(case)) for case in cases if only in case.whole]
        tables[name] = "\n".join([titles, *(row(*pair) for pair in records)])
        for case, record in records:
            path = ROOT / "configs" / f"{case.command}.py"
            if path.exists() and f"--topology {case.topology}" in path.read_text(encoding="utf-8"):
                comment(path, record)
    lines = ["| | " + " | ".join(CHIPS) + " |", "|---" * (len(CHIPS) + 1) + "|"]
    for job, command in JOBS.items():
        found = [planned(case) for chip in CHIPS if only in (case := Case(command, chip)).whole]
        cells = (gib(record) if record["fits"] else f"no ({gib(record)})" for record in found)
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    tables["chips"] = "\n".join(lines)
    if only:
        print("\n\n".join(tables.values()))
        return
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(marks[0])
        text = f"{before}{marks[0]}\n{table}\n{marks[1]}{rest.partition(marks[1])[2]}"
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE} and the comments of the configs are written", file=sys.stderr)


if __name__ == "__main__":
    main()
