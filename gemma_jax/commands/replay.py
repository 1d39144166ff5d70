"""`gemma replay RUN STEP`: prints the batch of a step in readable form, to find what made the loss jump."""

import dataclasses
from collections.abc import Sequence

from gemma_jax.config import (
    FinetuneConfig,
    MeshConfig,
    PretrainConfig,
    TrainingConfig,
    read_command,
    replace,
    validate_bounds,
    validate_on_devices,
)
from gemma_jax.config.sections import setting
from gemma_jax.errors import UserError
from gemma_jax.training.run_directory import check_data, forked_after, open_run


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """Show the batch of a step: its text, the loss of each token, and the gradient norm of each layer."""

    rows: int = setting(4, "Rows to show, of highest loss first; 0 shows all.", 0)
    json: bool = setting(False, "Print one JSON object a line and nothing else.")
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def run(arguments: Sequence[str], prog: str) -> int:
    """Print the batch of a step, or a JSON object for the step and one for each row with `--json`."""
    # The default is the run's own mesh, because the same mesh computes the same numbers.
    (name, number), options = read_command(
        arguments,
        prog,
        "RUN STEP",
        ReplayOptions(),
        validate=validate_bounds,
        load=lambda name, step: ReplayOptions(mesh=open_run(name, TrainingConfig)[1].mesh),
    )
    run_dir, config = open_run(name, TrainingConfig)
    config = replace(config, {"mesh": options.mesh, "run_dir": name})
    if not number.isdecimal() or not 1 <= int(number) <= config.steps:
        raise UserError(f"{name} has no step {number}; its steps are 1 to {config.steps}.")
    if int(number) <= forked_after(config):
        raise UserError(
            f"step {number} of {name} was done before it forked from {config.fork_from}; show it there."
        )

    from rich.console import Console

    from gemma_jax.commands import finetune, pretrain
    from gemma_jax.commands.replay_report import print_json, print_report
    from gemma_jax.sharding import make_mesh
    from gemma_jax.training.replay import replay_step

    mesh = make_mesh(config.mesh)
    validate_on_devices(config, mesh.size)
    if isinstance(config, FinetuneConfig):
        task = finetune.choose(config, mesh)
    else:
        assert isinstance(config, PretrainConfig)
        task = pretrain.choose(config, mesh)
    check_data(run_dir, task.dataset)
    shown = replay_step(task, int(number))
    if options.json:
        print_json(shown, task.dataset.train, task.tokenizer, options.rows)
    else:
        print_report(shown, task.dataset.train, task.tokenizer, options.rows, Console(highlight=False))
    return 0
