"""`gemma finetune CONFIG --init_from CHECKPOINT`: trains a model further, all of it or adapters."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_jax.commands.pretrain import train
from gemma_jax.config import FinetuneConfig, replace, validate
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

    from gemma_jax.pretrained.checkpoint import Checkpoint
    from gemma_jax.tokenizer import Tokenizer
    from gemma_jax.training.run import Task


def run(arguments: Sequence[str], prog: str) -> int:
    """Train to the config's last step. Returns status 75 if a signal stopped the run before it."""
    return train(arguments, prog, FinetuneConfig(), choose, _with_model)


def _with_model(config: FinetuneConfig) -> FinetuneConfig:
    """Returns the config with the model of its checkpoint, and the checkpoint's whole path."""
    from gemma_jax.pretrained.checkpoint import open_checkpoint, whole_name

    if not config.init_from:
        raise UserError("init_from is empty; name the checkpoint to begin with, such as google/gemma-2b.")
    found = open_checkpoint(config.init_from)
    config = replace(config, {"model": found.config, "init_from": whole_name(config.init_from)})
    validate(config)
    if not config.lora.rank and (config.quantization or found.quantization):
        raise UserError(
            f"the weights are {config.quantization or found.quantization}, which cannot be trained; set "
            "lora.rank to train adapters over them, or give weights that are not quantised."
        )
    if found.adapter and not config.lora.rank:
        raise UserError(
            f"{config.init_from} is an adapter; set lora.rank to train it further, or merge it first "
            "(gemma convert --merge)."
        )
    return config


def choose(config: FinetuneConfig, mesh: "Mesh") -> "Task":
    """Returns the task: train all weights or adapters on the examples of a config."""
    import dataclasses

    from gemma_jax.commands.answers import answers_to
    from gemma_jax.commands.replay_report import show_failure
    from gemma_jax.data.examples import open_example_sources
    from gemma_jax.memory import require_memory
    from gemma_jax.pretrained.adapted import base_identity, base_spec, begin_adapters, is_same_base
    from gemma_jax.pretrained.checkpoint import open_checkpoint
    from gemma_jax.training.corpus import evaluator_of, prepare_corpus
    from gemma_jax.training.finetuning import add_reference, finetuning, held_out_answers, preferences
    from gemma_jax.training.loop import EMPTY_RECORD
    from gemma_jax.training.metrics import say
    from gemma_jax.training.run import Task, choose_tokenizer
    from gemma_jax.training.state import abstract_train_state
    from gemma_jax.weights import Adapters

    found = open_checkpoint(config.init_from)
    start = found.adapter() if found.adapter else None
    tokenizer = choose_tokenizer(config, "", functools.partial(_tokenizer, found))
    sources = open_example_sources(config.data, tokenizer, pairs=config.objective == "dpo")
    dataset = prepare_corpus(config, tokenizer, sources)
    positions, segments = dataset.trained_positions, dataset.most_segments
    recipe = finetuning(config, mesh, found.kind(config.quantization), positions, segments)
    require_memory(abstract_train_state(recipe), "the state of this run")
    spec, kind = recipe.model, recipe.model.kind

    def initial() -> "nnx.State":
        params = found.params(base_spec(spec))
        if not isinstance(kind, Adapters):
            return params
        if start is not None and not is_same_base(start.identity, base_identity(spec, params)):
            raise UserError(f"{start.base} has changed since {start.name} was trained on it; restore it.")
        return begin_adapters(spec, params, config.seed, start)

    def base(frozen: "nnx.State", before: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(kind, Adapters):
            return {}
        identity = base_identity(spec, frozen)
        if before and not is_same_base(before["identity"], identity):
            raise UserError(f"{config.init_from} is not what {config.run_dir} began with; restore it.")
        name = start.base if start else config.init_from
        return {"name": name, "identity": identity, "scale": kind.scale, "rows": list(kind.rows)}

    ends = found.end_tokens()
    first = dataset.train.batch(0, 1)
    if tokenizer.end_of_turn_id in first.targets[first.loss_weights > 0]:
        ends = tuple({*ends, tokenizer.end_of_turn_id})
    if config.objective == "dpo" and not isinstance(kind, Adapters):
        say("computing the log-probabilities of all answers before training")
        add_reference(recipe, found.params(spec), dataset)
    quantization = config.quantization or found.trained_on if isinstance(kind, Adapters) else ""
    held_out = held_out_answers(config, positions)
    if config.objective == "dpo":
        held_out = preferences(config, positions, segments, "held_out_")
    return Task(
        recipe,
        dataset,
        tokenizer,
        [
            *evaluator_of(held_out, config, spec, dataset),
            *answers_to(config, spec, tokenizer, ends),
        ],
        initial,
        show_failure,
        dataclasses.replace(EMPTY_RECORD, end_tokens=ends, quantization=quantization),
        base,
    )


def _tokenizer(found: "Checkpoint") -> "Tokenizer":
    tokenizer = found.tokenizer()
    if tokenizer is None:
        raise UserError(f"{found.name} has no tokenizer.model; copy the tokenizer of its model beside it.")
    return tokenizer
