"""`gemma plan CONFIG --topology v5e-256`: prints what a run would need on TPUs or GPUs that are not here."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_type_hints

from gemma_jax.config import (
    ComputeConfig,
    FinetuneConfig,
    PretrainConfig,
    TrainingConfig,
    load,
    read_command,
    replace,
    validate,
    validate_bounds,
    validate_on_devices,
)
from gemma_jax.config.sections import setting
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from gemma_jax.planning.planner import Plan, Planner

REMAT_POLICIES: tuple[str, ...] = get_args(get_type_hints(ComputeConfig)["remat"])


@dataclasses.dataclass(frozen=True)
class _PlanSettings:
    """The settings of a plan, beside those of the config."""

    topology: str = setting(
        "",
        "TPUs: v5e-256, v6e-8; v4-32, v5p-128 and tpu7x-64 count TensorCores; or a layout, v5p-4x4x8. GPUs: "
        "h100-8, h200-8, a100-40-1, a100-80-1, l4-1, t4-1, rtx-4090-1; 2x h100-8 is two nodes.",
    )
    slices: int = setting(1, "So many slices or nodes, connected by the data-centre network.")
    mode: Literal["pretrain", "finetune", "prefill", "decode"] = setting(
        "pretrain",
        "The step of training, as the config is; or, for data.batch_size prompts of data.sequence_length "
        "tokens, prefill or a step of decode.",
    )
    new_tokens: int = setting(128, "prefill and decode: room in the cache behind the prompts.", 1)
    quantization: str = setting(
        "",
        "The weights in prefill and decode, and the frozen ones below adapters: int8, int4, int4:BLOCK, "
        "int4:channel or nf4; empty means dense ones.",
    )
    tokens: str = setting("", "Tokens of the whole run, such as 20B or 6T; empty means those of the config.")
    price: float = setting(
        0.0, "Price of one chip for one hour, for the cost of the run; 0 leaves the cost out.", 0
    )
    explain: bool = setting(False, "Show which code and which parameter each collective is for.")
    sweep: bool = setting(False, "Try meshes, rematerialisation and rows a device, and rank what fits.")
    sweep_data: tuple[int, ...] = setting((1,), "Sizes of mesh.data to try.", 1)
    sweep_tensor: tuple[int, ...] = setting((1, 2, 4), "Sizes of mesh.tensor to try.", 1)
    sweep_remat: tuple[str, ...] = setting((), "Values of compute.remat to try; empty means all.")
    sweep_rows: tuple[int, ...] = setting((1, 2, 4), "Rows a device to try.", 1)
    json: bool = setting(False, "Print one JSON object a plan and nothing else.")
    dump_hlo: str = setting("", "A file for the text of the compiled program.")

    def config(self) -> TrainingConfig:
        """Returns the config without the planning options, with the mesh over as many slices as they set."""
        kind = FinetuneConfig if isinstance(self, FinetuneConfig) else PretrainConfig
        config = kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})
        return replace(config, {"mesh.slice": self.slices}) if config.mesh.slice == 1 else config


@dataclasses.dataclass(frozen=True)
class PlanOptions(_PlanSettings, PretrainConfig):
    """Compile a config's program for TPUs or GPUs that are not here, and print what it would need."""


@dataclasses.dataclass(frozen=True)
class FinetunePlanOptions(_PlanSettings, FinetuneConfig):
    """Compile a config's program for TPUs or GPUs that are not here, and print what it would need."""

    mode: Literal["pretrain", "finetune", "prefill", "decode"] = setting("finetune", "As for other configs.")


AnyOptions = PlanOptions | FinetunePlanOptions


def run(arguments: Sequence[str], prog: str) -> int:
    """Print the plan of a config; status 1 if it does not fit."""
    default: AnyOptions = PlanOptions()
    (name,), options = read_command(arguments, prog, "CONFIG", default, load=_load, validate=_validate)
    config = options.config()
    tokens = float(config.steps * config.data.batch_size * config.data.sequence_length)
    if options.tokens:
        tokens = token_count(options.tokens)

    from gemma_jax.planning.compiler import prepare
    from gemma_jax.planning.topology import parse_topology

    topology = parse_topology(options.topology, options.slices)
    prepare(topology)

    from gemma_jax.commands.plan_report import print_plan, print_sweep, record
    from gemma_jax.planning.cache import PlanCache
    from gemma_jax.planning.planner import Planner

    planner = Planner(topology, PlanCache(Path(config.data.cache_dir).expanduser() / "plans"))
    if options.sweep:
        found = _sweep(planner, config, options)
    else:
        dump = Path(options.dump_hlo) if options.dump_hlo else None
        plan = planner.plan(config, options.mode, options.new_tokens, dump, options.quantization)
        found = [(config, plan)]
    if options.json:
        for variant, plan in found:
            print(json.dumps(record(name, variant, plan, tokens, options.price)))
    elif options.sweep:
        print_sweep(name, found, tokens, options.price)
    else:
        print_plan(name, found[0][1], options.mode, tokens, options.price, options.explain)
    return 0 if found[0][1].analysis else 1


def _load(name: str) -> AnyOptions:
    base, _ = load(name, TrainingConfig)
    kind = FinetunePlanOptions if isinstance(base, FinetuneConfig) else PlanOptions
    return kind(**{field.name: getattr(base, field.name) for field in dataclasses.fields(base)})


def _validate(options: AnyOptions) -> None:
    validate_bounds(options)
    validate(options.config())
    if options.mode == ("pretrain" if isinstance(options, FinetuneConfig) else "finetune"):
        raise UserError(f"mode is {options.mode}, which is not what this config trains; leave it out.")
    if options.quantization and options.mode == "pretrain":
        raise UserError(
            f"quantization is {options.quantization}, but weights are trained dense; add --mode decode or "
            "prefill."
        )
    if not options.topology:
        raise UserError("topology is empty; name what to plan for, such as --topology v5e-256 or h100-8.")


def token_count(text: str) -> float:
    """Parses a number such as 20B (20,000,000,000); K, M, B, T: thousands, millions, billions, trillions.

    Raises:
      UserError: The text is not such a number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper().replace(",", "").replace("_", ""))
    if match is None or not float(match[1]):
        raise UserError(f"tokens is {text!r}, but must be a number such as 500M, 20B or 6T.")
    return float(match[1]) * 1000 ** " KMBT".index(match[2] or " ")


def variants(config: TrainingConfig, devices: int, options: AnyOptions) -> Iterator[TrainingConfig]:
    """Yields the valid configs of a sweep. For each mesh and policy, those with fewest rows come first."""
    remat = options.sweep_remat or REMAT_POLICIES
    rows = sorted(options.sweep_rows)
    for data, tensor, policy, row in itertools.product(options.sweep_data, options.sweep_tensor, remat, rows):
        if devices % (data * tensor):
            continue
        changes = {
            "mesh.data": data,
            "mesh.fsdp": devices // (data * tensor),
            "mesh.tensor": tensor,
            "compute.remat": policy,
            "data.batch_size": row * devices // tensor * config.optimizer.accumulation_steps,
        }
        try:
            variant = replace(config, changes)
            validate(variant)
            validate_on_devices(variant, devices)
        except UserError:
            continue  # this combination is invalid; others may be valid
        yield variant


def _sweep(
    planner: "Planner", config: TrainingConfig, options: AnyOptions
) -> "list[tuple[TrainingConfig, Plan]]":
    from gemma_jax.commands.plan_report import summary

    unknown = set(options.sweep_remat) - set(REMAT_POLICIES)
    if unknown:
        raise UserError(f"sweep_remat has {unknown.pop()!r}; the policies are {', '.join(REMAT_POLICIES)}.")
    to_try = list(variants(config, len(planner.devices), options))
    if not to_try:
        raise UserError("no combination of the sweep is possible for this model on this topology.")
    found: list[tuple[TrainingConfig, Plan]] = []
    too_large: dict[tuple[object, str], int] = {}
    for number, variant in enumerate(to_try, 1):
        kind = (variant.mesh, variant.compute.remat)
        rows = variant.data.batch_size
        if rows >= too_large.get(kind, rows + 1):
            continue  # fewer rows with the same mesh and policy did not fit
        plan = planner.plan(variant, options.mode)
        if plan.analysis is None:
            too_large[kind] = rows
        found.append((variant, plan))
        print(f"{number} of {len(to_try)}: {summary(variant, plan)}", file=sys.stderr, flush=True)
    # The fastest plan (most tokens per second) comes first; plans that do not fit come last.
    return sorted(found, key=lambda item: -item[1].estimate.tokens_per_second if item[1].estimate else 0)
