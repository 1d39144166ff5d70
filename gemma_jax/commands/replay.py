"""`gemma replay RUN STEP`: the batch of a step as a person would read it, to find what made the loss jump."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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
from gemma_jax.paths import user_path
from gemma_jax.training.existing import forked_after
from gemma_jax.training.run_directory import check_data, open_run

if TYPE_CHECKING:
    from etils import epath
    from flax import nnx
    from jax.sharding import Mesh

    from gemma_jax.commands.replay_report import Replay
    from gemma_jax.data.loader import Dataset
    from gemma_jax.tokenizer import Tokenizer
    from gemma_jax.training.metrics import RunLog
    from gemma_jax.training.objectives import Recipe
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
        load=lambda name, step: ReplayOptions(mesh=open_run(name, PretrainConfig)[1].mesh),
    )
    run_dir, config = open_run(name, PretrainConfig)
    config = replace(config, {"mesh": options.mesh, "run_dir": name})
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
    shown = replay_step(config, mesh, dataset, int(number))
    if options.json:
        print_json(shown, dataset.train, tokenizer, options.rows)
    else:
        print_report(shown, dataset.train, tokenizer, options.rows, Console(highlight=False))
    return 0


def show_failure(
    recipe: "Recipe", dataset: "Dataset", tokenizer: "Tokenizer", log: "RunLog"
) -> "Callable[[int, int, nnx.State], str]":
    """A function that prints the batch of a step that made a run end, and returns which gradients are not
    finite, as the rest of a sentence. A replay that fails must not hide why the run ended.

    Args:
      recipe, dataset, tokenizer, log: of the run.
    """
    from gemma_jax.commands.replay_report import not_finite, print_report

    def show(step: int, first_row: int, params: "nnx.State") -> str:
        try:
            shown = _measured(recipe, dataset, step, first_row, params, step - 1)
            print_report(shown, dataset.train, tokenizer, ReplayOptions().rows, log.console)
            return not_finite(shown)
        except UserError as error:
            print(f"the batch of step {step} cannot be shown: {error}", file=sys.stderr)
            return ""

    return show


def replay_step(config: PretrainConfig, mesh: "Mesh", dataset: "Dataset", step: int) -> "Replay":
    """The batch of a step made again, and what the newest parameters from before it make of it.

    Raises:
      UserError: the data's cache or the checkpoint belong to something else.
    """
    from gemma_jax.training.objectives import pretraining

    recipe, run_dir = pretraining(config, mesh), user_path(config.run_dir)
    params, params_step = _parameters_before(recipe, run_dir, step)
    first_row = _history(config, run_dir).first_row(step - 1, config.data.batch_size)
    return _measured(recipe, dataset, step, first_row, params, params_step)


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
    recipe: "Recipe", dataset: "Dataset", step: int, first_row: int, params: "nnx.State", params_step: int
) -> "Replay":
    from gemma_jax.commands.replay_report import Replay
    from gemma_jax.training.metrics import read_metrics
    from gemma_jax.training.replay import measure_batch

    size, run_dir = recipe.config.data.batch_size, user_path(recipe.config.run_dir)
    measures = measure_batch(recipe, params, lambda rows: dataset.train.batch(first_row, size, rows))
    logged = [entry for entry in read_metrics(run_dir) if entry["step"] == step and "loss" in entry]
    batch = dataset.train.batch(first_row, size)
    return Replay(step, params_step, first_row, batch, measures, logged[0] if logged else None)


def _parameters_before(recipe: "Recipe", run_dir: "epath.Path", step: int) -> "tuple[nnx.State, int]":
    """The newest parameters that a run still has from before a step, and after how many steps they were."""
    from etils import epath

    from gemma_jax.checkpoint.folders import STEPS_FOLDER, saved_steps
    from gemma_jax.checkpoint.record import DamagedCheckpoint, run_record
    from gemma_jax.checkpoint.restore import load_params

    config = recipe.config
    saved = [(number, run_dir / STEPS_FOLDER / str(number)) for number in saved_steps(run_dir)]
    if config.fork_from:
        saved.insert(0, (forked_after(config), epath.Path(config.fork_from)))
    for number, folder in reversed(saved):
        if number < step:
            try:
                record = run_record(folder)
                return load_params(folder, record, recipe.model), number
            except DamagedCheckpoint as error:
                print(f"{error} An older one is used here", file=sys.stderr)
    if config.fork_from:
        raise UserError(
            f"no parameters from before step {step} are left, neither in {run_dir} nor in {config.fork_from}."
        )
    # The seed decides them.
    return recipe.model.init(config.seed), 0
