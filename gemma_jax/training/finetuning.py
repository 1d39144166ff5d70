"""What fine-tuning trains, all weights or adapters, and minimises: cross entropy of answers, or DPO's loss.

Shape legend: B batch, L length, T positions of a row that reach the vocabulary, S segments of a row, D embed.
"""

import dataclasses
import fnmatch
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.config import FinetuneConfig
from gemma_jax.data.loader import Dataset, HeldOut
from gemma_jax.data.packing import Batch, PairBatch
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec, Transformer
from gemma_jax.model.scoring import Scores, scores_of
from gemma_jax.model.transformer import compute_dtype
from gemma_jax.sharding import local_rows, put_batch
from gemma_jax.training.loss import LossSettings, next_token_loss
from gemma_jax.training.objectives import Objective, Recipe, Sums, WeightedSum
from gemma_jax.training.optimizer import make_optimizer
from gemma_jax.weights import NO_CONTEXT, Adapters, Context, Kind, is_trained, parameter_table


def adapters_over(config: FinetuneConfig, base: Kind) -> Kind:
    """Returns the kind of weight that a config trains, over the kind of its base.

    Raises:
      UserError: A pattern of lora.targets matches nothing, a token is outside the vocabulary, or weights
        that cannot be trained have no adapters.
    """
    lora, table = config.lora, parameter_table(config.model)
    if not lora.rank:
        return base
    names = [name.removeprefix("blocks.") for name, parameter in table.items() if parameter.inputs]
    targets: set[str] = set()
    for pattern in lora.targets:
        found = {name.rpartition(".")[2] for name in names if fnmatch.fnmatch(name, pattern)}
        found |= {
            name for name in (name.rpartition(".")[2] for name in names) if fnmatch.fnmatch(name, pattern)
        }
        if not found:
            raise UserError(f"lora.targets has {pattern!r}, which matches none of {', '.join(names)}.")
        targets |= found
    if outside := [token for token in lora.embedding_rows if token >= config.model.vocab_size]:
        raise UserError(
            f"lora.embedding_rows has {outside[0]}, but the model's ids end at {config.model.vocab_size - 1}."
        )
    return Adapters(
        lora.rank,
        lora.alpha / (math.sqrt(lora.rank) if lora.rslora == "on" else lora.rank),
        lora.dropout,
        targets=tuple(sorted(targets)),
        base=base,
        rows=tuple(sorted(set(lora.embedding_rows))),
        reference=config.objective == "dpo",
    )


def finetuning(config: FinetuneConfig, mesh: Mesh, base: Kind, positions: int, segments: int) -> Recipe:
    """Returns the recipe of a config.

    Args:
      config: The config of the run, whose model is that of the checkpoint.
      mesh: The mesh.
      base: The kind of the weights that the run begins with.
      positions: T, at least the number of trained tokens of any row.
      segments: S, at least the number of segments of any row.

    Raises:
      UserError: See `adapters_over`.
    """
    kind = adapters_over(config, base)
    objective = (
        preferences(config, positions, segments) if config.objective == "dpo" else answers(config, positions)
    )
    return Recipe(
        config,
        ModelSpec(config.model, config.compute, mesh, kind),
        objective,
        make_optimizer(config.optimizer, config.steps, compute_dtype(config.compute, mesh)),
        is_trained if isinstance(kind, Adapters) else lambda name: True,
        random=config.lora.dropout > 0,
    )


def _trained(hidden: jax.Array, batch: Batch, positions: int) -> tuple[jax.Array, Batch]:
    """Returns the T positions of each row that include all those with a weight in the loss, in order."""
    if positions >= batch.tokens.shape[1]:
        return hidden, batch
    order = jnp.argsort(batch.loss_weights <= 0, axis=1, stable=True)[:, :positions]
    of_row = jax.vmap(lambda x, order: x[order])
    return of_row(hidden, order), jax.tree.map(lambda x: of_row(x, order), batch)


def _tokens(batch: Batch) -> Sums:
    return {"tokens": WeightedSum(jnp.sum(batch.segment_ids > 0, dtype=jnp.float32), jnp.float32(1))}


def answers(config: FinetuneConfig, positions: int) -> Objective:
    """Returns the objective of supervised fine-tuning: cross entropy of the trained tokens, in nats a token.

    See `finetuning` for `positions`.
    """
    compute, z_loss = config.compute, config.optimizer.z_loss
    settings = LossSettings(config.model.vocab_size, compute.loss_block, compute.loss_vocab_block, z_loss)

    def objective(model: Transformer, batch: Batch, context: Context) -> Sums:
        hidden = model(batch.tokens, batch.positions, batch.segment_ids, context)
        hidden, trained = _trained(hidden, batch, positions)
        weights = trained.loss_weights
        minimised, loss = next_token_loss(
            hidden, model.embedding, trained.targets, weights, settings, context
        )
        weight = jnp.sum(weights)
        sums = {"minimised": WeightedSum(minimised, weight), "loss": WeightedSum(loss, weight)}
        return (sums if z_loss else {"loss": sums["minimised"]}) | _tokens(batch)

    return objective


def held_out_answers(config: FinetuneConfig, positions: int) -> Objective:
    """Returns the objective for held-out examples: nats a trained token, and how many were the likeliest."""

    def objective(model: Transformer, batch: Batch, context: Context) -> Sums:
        scores, trained = _scores(model, batch, context, positions)
        weights, total = trained.loss_weights, jnp.sum(trained.loss_weights)
        right = scores.of_targets >= scores.largest
        return {
            "held_out_loss": WeightedSum(-jnp.sum(weights * scores.log_probs), total),
            "held_out_token_accuracy": WeightedSum(jnp.sum(weights * right), total),
        }

    return objective


def _scores(model: Transformer, batch: Batch, context: Context, positions: int) -> tuple[Scores, Batch]:
    hidden = model(batch.tokens, batch.positions, batch.segment_ids, context)
    hidden, trained = _trained(hidden, batch, positions)
    block = model.compute.loss_vocab_block
    scores = scores_of(hidden, model.embedding, trained.targets, model.config.vocab_size, context, block)
    return scores, trained


def answer_log_probs(
    model: Transformer, batch: Batch, context: Context, positions: int, segments: int
) -> jax.Array:
    """Returns the log-probability of the trained tokens of each segment together, [B, S], in nats."""
    scores, trained = _scores(model, batch, context, positions)
    of_segment = jax.nn.one_hot(trained.segment_ids - 1, segments) * (trained.loss_weights > 0)[..., None]
    return jnp.einsum("bt,bts->bs", scores.log_probs, of_segment)


def add_reference(recipe: Recipe, params: nnx.State, dataset: Dataset) -> None:
    """Computes `PairBatch.reference` of every row of a dataset, with the parameters before training."""
    model, size = recipe.model, recipe.config.data.batch_size
    positions, segments = dataset.trained_positions, dataset.most_segments

    def of_batch(params: nnx.State, batch: Batch) -> jax.Array:
        return answer_log_probs(model.merge(params), batch, NO_CONTEXT, positions, segments)

    measure = jax.jit(of_batch, out_shardings=NamedSharding(model.mesh, P()))  # every process reads all of it
    for rows in dataset.rows:
        batches = HeldOut(rows).batches(size, None, local_rows(size, model.mesh))
        found = [np.asarray(measure(params, put_batch(batch, size, model.mesh))) for batch in batches]
        if found:
            rows.reference = np.concatenate(found)[: len(rows)]


def preferences(config: FinetuneConfig, positions: int, segments: int, prefix: str = "") -> Objective:
    """Returns the objective of DPO (Rafailov et al., 2023, equation 7), with label smoothing (cDPO).

    Segments 2i + 1 and 2i + 2 of a row are the chosen and the rejected answer of a pair. The reference is in
    the batch or, with adapters, the frozen copy of those that training began with.

    Args:
      config: The config of the run.
      positions, segments: As for `finetuning`.
      prefix: Precedes the names of the sums, which are those of TRL's metrics.
    """
    beta, smoothing = config.dpo.beta, config.dpo.label_smoothing

    def objective(model: Transformer, found: Batch | PairBatch, context: Context) -> Sums:
        batch = found.batch if isinstance(found, PairBatch) else found
        policy = answer_log_probs(model, batch, context, positions, segments)
        if isinstance(found, PairBatch):
            reference = jnp.asarray(found.reference)
        else:
            frozen = dataclasses.replace(context, key=None, reference=True)
            reference = jax.lax.stop_gradient(answer_log_probs(model, batch, frozen, positions, segments))
        rewards = beta * (policy - reference)
        is_there = jnp.max(batch.segment_ids, axis=1, keepdims=True) > jnp.arange(0, segments, 2)
        weights, pairs = is_there.astype(policy.dtype), jnp.sum(is_there, dtype=policy.dtype)
        margins = rewards[:, ::2] - rewards[:, 1::2]
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(margins) - smoothing * jax.nn.log_sigmoid(-margins)
        means = {
            "loss": losses,
            "rewards/chosen": rewards[:, ::2],
            "rewards/rejected": rewards[:, 1::2],
            "rewards/accuracies": margins > 0,
            "rewards/margins": margins,
            "logps/chosen": policy[:, ::2],
            "logps/rejected": policy[:, 1::2],
        }
        sums = {prefix + name: WeightedSum(jnp.sum(weights * x), pairs) for name, x in means.items()}
        return sums if prefix else sums | _tokens(batch)

    return objective
