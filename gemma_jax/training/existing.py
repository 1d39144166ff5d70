"""What a config has to do with a run that is there already: going on with it, or forking another."""

import os
from typing import TYPE_CHECKING, TypeVar

from gemma_jax.config import TrainingConfig, differences, replace, within
from gemma_jax.errors import UserError
from gemma_jax.paths import user_path
from gemma_jax.training.run_directory import CONFIG_FILE, check_overwritable, open_run

if TYPE_CHECKING:
    from etils import epath

Config = TypeVar("Config", bound=TrainingConfig)

# What may differ when a run is resumed: where and how fast it runs, not what it computes.
MAY_CHANGE = (
    *("run_dir", "steps", "existing_run", "profile", "compute", "mesh", "hosts", "stability", "checkpoint"),
    *("evaluation", "logging", "data.cache_dir"),
)

# What a fork keeps: the names and shapes of its arrays, what their numbers mean, and how many rows a step
# takes, because the position in the data goes on.
KEPT = ("model", "tokenizer", "optimizer.name", "data.batch_size")
# Of these, what changes no array: the way to a longer context.
FREE = ("model.context_length", "model.rope_base")


def as_existing(config: Config) -> Config:
    """`config` as the run that is there goes on with it, if there is one, and with its fork resolved.

    Raises:
      UserError: the run that is there computes something else, what is to be overwritten is no run, or what
        is to be forked does not fit.
    """
    from gemma_jax.checkpoint.folders import saved_steps

    run_dir = user_path(config.run_dir)
    resuming = config.existing_run == "resume" and (run_dir / CONFIG_FILE).exists()
    if resuming:
        before = open_run(os.fspath(run_dir), type(config))[1]
        # What is recorded is one step; the command may name the whole run, or nothing any more.
        named = os.path.expanduser(config.fork_from).rstrip("/")
        if not named or before.fork_from.startswith(f"{named}/"):
            config = replace(config, {"fork_from": before.fork_from})
        for name, then, now in differences(before, config):
            if not within(name, MAY_CHANGE):
                raise UserError(
                    f"the run in {run_dir} has {name} {then!r}, not {now!r}; "
                    "give another --run_dir, or --existing_run overwrite to delete that run."
                )
    if config.fork_from and not (resuming and saved_steps(run_dir)):
        config = resolve_fork(config, run_dir)
    if config.existing_run == "overwrite":
        check_overwritable(run_dir)
    return config


def resolve_fork(config: Config, run_dir: "epath.Path") -> Config:
    """`config` with `fork_from` as the folder of one step, when all was checked that needs no arrays.

    Raises:
      UserError: no checkpoint there, one of this very run, one whose steps are done, or one of a run that
        differs in what a fork keeps.
    """
    from gemma_jax.checkpoint.record import run_record
    from gemma_jax.checkpoint.restore import step_folder

    folder, source = step_folder(config.fork_from)
    # Also where it lies deeper: to overwrite the directory would delete it.
    if f"{os.path.realpath(source)}/".startswith(f"{os.path.realpath(run_dir)}/"):
        raise UserError(f"fork_from, {config.fork_from}, lies in run_dir, {run_dir}; give another --run_dir.")
    step = run_record(folder).step
    if step >= config.steps:
        raise UserError(f"{folder} has done {step} of {config.steps} steps; raise --steps to go on from it.")
    for name, then, now in differences(open_run(os.fspath(source), type(config))[1], config):
        if within(name, KEPT) and not within(name, FREE):
            raise UserError(
                f"{source} has {name} {then!r}, not {now!r}, and a fork keeps it; set --{name} as it was, "
                "or begin a new run."
            )
    return replace(config, {"fork_from": os.fspath(folder)})


def forked_after(config: TrainingConfig) -> int:
    """Steps that another run did before this one was forked from it; 0 for a run of its own."""
    name = config.fork_from.rpartition("/")[2]
    return int(name) if name.isdecimal() else 0
