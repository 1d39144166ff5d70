"""A new run that begins where another run was: `--fork_from`."""

import os
from typing import TYPE_CHECKING, Any

from gemma_jax.commands.run_directory import open_run
from gemma_jax.config import PretrainConfig, differences, replace, to_dict, within
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from gemma_jax.checkpoint.record import RunRecord
    from gemma_jax.checkpoint.store import CheckpointStore
    from gemma_jax.training.state import TrainState

# What a fork keeps: the names and shapes of its arrays, what their numbers mean, and how many rows a step
# takes, because the position in the data goes on.
KEPT = ("model", "tokenizer", "optimizer.name", "data.batch_size")
# Of these, what changes no array: the way to a longer context.
FREE = ("model.context_length", "model.rope_base")


def resolve_fork(config: PretrainConfig, run_dir: "epath.Path") -> PretrainConfig:
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
    for name, then, now in differences(open_run(os.fspath(source))[1], config):
        if within(name, KEPT) and not within(name, FREE):
            raise UserError(
                f"{source} has {name} {then!r}, not {now!r}, and a fork keeps it; set --{name} as it was, "
                "or begin a new run."
            )
    return replace(config, {"fork_from": os.fspath(folder)})


def forked_after(config: PretrainConfig) -> int:
    """Steps that another run did before this one was forked from it; 0 for a run of its own."""
    name = config.fork_from.rpartition("/")[2]
    return int(name) if name.isdecimal() else 0


def start_fork(
    config: PretrainConfig, abstract: "TrainState", store: "CheckpointStore"
) -> "tuple[Any, Any, RunRecord]":
    """Take over what `fork_from` saved, and save it as the new run's own first checkpoint.

    So the new run needs the old one no more, whatever happens to either.

    Returns:
      What `CheckpointStore.restore` gives: parameters, optimizer state, and the record of the checkpoint.

    Raises:
      UserError: the checkpoint is damaged or belongs to another model; the new one cannot be written.
    """
    from gemma_jax.checkpoint.record import run_record
    from gemma_jax.checkpoint.restore import load_arrays

    record = run_record(config.fork_from)
    wanted = {"params": abstract.params, "opt_state": abstract.opt_state}
    loaded = load_arrays(config.fork_from, wanted, record)
    params, opt_state = loaded["params"], loaded["opt_state"]
    about = (record.rows_seen, to_dict(config), record.held_out_loss, record.history)
    store.save(record.step, params, opt_state, *about)
    store.wait()
    return params, opt_state, record
