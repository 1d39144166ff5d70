"""`gemma pretrain CONFIG`: trains a model from random weights, or resumes a run."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gemma_jax.config import PretrainConfig, read_command, replace, validate
from gemma_jax.errors import UserError
from gemma_jax.training.run_directory import Config, as_existing, load_config

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gemma_jax.training.run import Task


def run(arguments: Sequence[str], prog: str) -> int:
    """Train to the config's last step. Returns status 75 if a signal stopped the run before it."""
    return train(arguments, prog, PretrainConfig(), choose)


def train(
    arguments: Sequence[str],
    prog: str,
    default: Config,
    choose: "Callable[[Config, Mesh], Task]",
    complete: Callable[[Config], Config] = lambda config: config,
) -> int:
    """Runs a command that trains.

    Args:
      arguments, prog: As for `run`.
      default: The config whose fields are the options.
      choose: As for `run_training`.
      complete: Returns the config with what does not stand in it, before the run directory is looked at.
    """

    def load(name: str) -> Config:
        config, experiment = load_config(name, type(default))
        return replace(config, {"run_dir": config.run_dir or f"runs/{experiment}"})

    _, config = read_command(arguments, prog, "CONFIG", default, load=load, validate=validate)
    if not config.run_dir:
        raise UserError("run_dir is empty; name the directory of the run.")

    started = time.monotonic()
    from gemma_jax.data.documents import check_source
    from gemma_jax.training.interruption import EndSignals

    with EndSignals():
        for source in config.data.sources:
            check_source(source)
        config = as_existing(complete(config))

        # This imports jax, so it comes after all checks that do not need jax.
        from gemma_jax.training.run import run_training

        return run_training(config, choose, started)


def choose(config: PretrainConfig, mesh: "Mesh") -> "Task":
    """Returns the task: train all parameters from random values to predict the next token of documents."""
    from gemma_jax.commands.replay_report import show_failure
    from gemma_jax.memory import require_memory
    from gemma_jax.training.corpus import corpus_tokenizer, held_out_evaluators, prepare_corpus
    from gemma_jax.training.objectives import pretraining
    from gemma_jax.training.run import Task, choose_tokenizer
    from gemma_jax.training.state import abstract_train_state

    recipe = pretraining(config, mesh)
    require_memory(abstract_train_state(recipe), "the state of this run")
    path, megabytes = config.tokenizer.path, config.tokenizer.train_megabytes
    tokenizer = choose_tokenizer(config, path, lambda: corpus_tokenizer(config, megabytes))
    dataset = prepare_corpus(config, tokenizer)
    return Task(
        recipe,
        dataset,
        tokenizer,
        held_out_evaluators(config, mesh, dataset, tokenizer),
        show_failure=show_failure,
    )
