"""`gemma replay RUN STEP`: the batch of a step as a person would read it, to find what made the loss jump."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_jax.commands.fork import forked_after
from gemma_jax.commands.run_directory import check_data, open_run
from gemma_jax.config import (
    MeshConfig,
    PretrainConfig,
    read_command,
    replace,
    validate_bounds,
    validate_on_devices,
)
from gemma_jax.config.sections import setting
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath
    from flax import nnx
    from jax.sharding import Mesh
    from rich.console import Console

    from gemma_jax.commands.replay_report import Replay
    from gemma_jax.data.loader import Dataset
    from gemma_jax.tokenizer import Tokenizer
    from gemma_jax.training.stability import Stability


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """Show the batch of a step: its text, the loss of each token, and the gradient norm of each layer."""

    rows: int = setting(4, "Rows to show, of highest loss first; 0 shows all.", 0)
    json: bool = setting(False, "Print one JSON object a line and nothing else.")
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def run(arguments: Sequence[str], prog: str) -> int:
    """Print the batch of a step, or a JSON object for the step and one for each row with `--json`."""
    # The run's own mesh, where it fits, makes the run's own numbers.
    (name, number), options = read_command(
        arguments,
        prog,
        "RUN STEP",
        ReplayOptions(),
        validate=validate_bounds,
        load=lambda name, step: ReplayOptions(mesh=open_run(name)[1].mesh),
    )
    run_dir, config = open_run(name)
    config = replace(config, {"mesh": options.mesh})
    if not number.isdecimal() or not 1 <= int(number) <= config.steps:
        raise UserError(f"{name} has no step {number}; its steps are 1 to {config.steps}.")
    if int(number) <= forked_after(config):
        raise UserError(
            f"step {number} of {name} was done before it forked from {config.fork_from}; show it there."
        )

    from rich.console import Console

    from gemma_jax.commands.replay_report import print_json, print_report
    from gemma_jax.data.loader import prepare
    from gemma_jax.sharding import make_mesh
    from gemma_jax.tokenizer import Tokenizer

    mesh = make_mesh(config.mesh)
    validate_on_devices(config, mesh.size)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.model")
    dataset = prepare(config.data, tokenizer, config.seed)
    check_data(run_dir, dataset)
    shown = replay_step(config, run_dir, mesh, dataset, int(number))
    if options.json:
        print_json(shown, dataset.train, tokenizer, options.rows)
    else:
        print_report(shown, dataset.train, tokenizer, options.rows, Console(highlight=False))
    return 0


def show_failure(
    config: PretrainConfig,
    run_dir: "epath.Path",
    mesh: "Mesh",
    dataset: "Dataset",
    tokenizer: "Tokenizer",
    console: "Console",
    step: int,
    first_row: int,
    params: "nnx.State",
) -> str:
    """Print the batch of a step that made a run end, and say which gradients are not finite, as the rest of a
    sentence. A replay that fails must not hide why the run ended.

    Args:
      config, run_dir, mesh, dataset, tokenizer: of the run.
      console: where to print.
      step: which failed.
      first_row: of its batch.
      params: that it began with.
    """
    from gemma_jax.commands.replay_report import not_finite, print_report

    try:
        shown = _measured(config, run_dir, mesh, dataset, step, first_row, params, step - 1)
        print_report(shown, dataset.train, tokenizer, ReplayOptions().rows, console)
        return not_finite(shown)
    except UserError as error:
        print(f"the batch of step {step} cannot be shown: {error}", file=sys.stderr)
        return ""


def replay_step(
    config: PretrainConfig, run_dir: "epath.Path", mesh: "Mesh", dataset: "Dataset", step: int
) -> "Replay":
    """The batch of a step made again, and what the newest parameters from before it make of it.

    Raises:
      UserError: the data's cache or the checkpoint belong to something else.
    """
    params, params_step = _parameters_before(config, run_dir, mesh, step)
    first_row = _history(config, run_dir).first_row(step - 1, config.data.batch_size)
    return _measured(config, run_dir, mesh, dataset, step, first_row, params, params_step)


def _history(config: PretrainConfig, run_dir: "epath.Path") -> "Stability":
    """The gaps in the data of a run, as its newest whole checkpoint has them."""
    from gemma_jax.checkpoint.folders import STEPS_FOLDER, saved_steps
    from gemma_jax.checkpoint.record import DamagedCheckpoint, run_record
    from gemma_jax.training.stability import Stability

    for saved in reversed(saved_steps(run_dir)):
        try:
            record = run_record(run_dir / STEPS_FOLDER / str(saved))
        except DamagedCheckpoint:  # told when its parameters are wanted
            continue
        return Stability.from_record(config.stability, record.history)
    return Stability(config.stability)


def _measured(
    config: PretrainConfig,
    run_dir: "epath.Path",
    mesh: "Mesh",
    dataset: "Dataset",
    step: int,
    first_row: int,
    params: "nnx.State",
    params_step: int,
) -> "Replay":
    from gemma_jax.commands.replay_report import Replay
    from gemma_jax.training.metrics import read_metrics
    from gemma_jax.training.replay import measure_batch

    size = config.data.batch_size
    measures = measure_batch(config, mesh, params, lambda rows: dataset.train.batch(first_row, size, rows))
    logged = [entry for entry in read_metrics(run_dir) if entry["step"] == step and "loss" in entry]
    return Replay(
        step,
        params_step,
        first_row,
        dataset.train.batch(first_row, size),
        measures,
        logged[0] if logged else None,
    )


def _parameters_before(
    config: PretrainConfig, run_dir: "epath.Path", mesh: "Mesh", step: int
) -> "tuple[nnx.State, int]":
    """The newest parameters that a run still has from before a step, and after how many steps they were."""
    from etils import epath

    from gemma_jax.checkpoint.folders import STEPS_FOLDER, saved_steps
    from gemma_jax.checkpoint.record import DamagedCheckpoint, run_record
    from gemma_jax.checkpoint.restore import load_params
    from gemma_jax.model import ModelSpec

    spec = ModelSpec(config.model, config.compute, mesh)
    saved = [(number, run_dir / STEPS_FOLDER / str(number)) for number in saved_steps(run_dir)]
    if config.fork_from:
        saved.insert(0, (forked_after(config), epath.Path(config.fork_from)))
    for number, folder in reversed(saved):
        if number < step:
            try:
                record = run_record(folder)
                return load_params(folder, record, spec), number
            except DamagedCheckpoint as error:
                print(f"{error} An older one is used here", file=sys.stderr)
    if config.fork_from:
        raise UserError(
            f"no parameters from before step {step} are left, neither in {run_dir} nor in {config.fork_from}."
        )
    # The seed decides them.
    return spec.init(config.seed), 0
