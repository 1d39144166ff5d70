"""Objectives that a step minimises or an evaluation measures: named weighted sums over a batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.config import TrainingConfig
from gemma_jax.data.packing import Batch
from gemma_jax.model import ModelSpec, Transformer
from gemma_jax.model.scoring import token_log_probs
from gemma_jax.model.transformer import compute_dtype
from gemma_jax.sharding import parameter_name
from gemma_jax.training.loss import LossSettings, next_token_loss
from gemma_jax.training.optimizer import make_optimizer
from gemma_jax.weights import Context


class WeightedSum(NamedTuple):
    """A weighted sum over tokens or examples, and the sum of their weights. Over the global batch,
    total / weight is the mean, which is the same on any mesh and for any number of accumulation steps."""

    total: jax.Array
    weight: jax.Array

    @property
    def divisor(self) -> jax.Array:
        """The weight, or 1 if the weight is 0."""
        return jnp.where(self.weight == 0, 1, self.weight)

    @property
    def mean(self) -> jax.Array:
        """The weighted mean, or 0 if the weight is 0."""
        return self.total / self.divisor


Sums = dict[str, WeightedSum]

# Takes the model, a batch (a tree of arrays whose first axis is the batch axis) and a Context. Training
# minimises the mean of the first sum; a run reports the mean of `loss` and checks it for spikes.
Objective = Callable[[Transformer, Any, Context], Sums]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained and how. The train step, the train state and a plan are made from this."""

    config: TrainingConfig
    model: ModelSpec
    objective: Objective
    optimizer: optax.GradientTransformation
    trainable: Callable[[str], bool] = lambda name: True
    """Whether the parameter of a dotted name is trained. All others are frozen: they have no gradient and no
    optimizer state, and checkpoints do not contain them."""
    random: bool = False
    """Whether the objective's Context has a random key, which is derived from the seed and the step."""

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """Splits the parameters into the frozen and the trainable part, in this order."""
        trainable, frozen = nnx.split_state(params, lambda path, _: self.trainable(parameter_name(path)), ...)
        return frozen, trainable


def pretraining(config: TrainingConfig, mesh: Mesh) -> Recipe:
    """Returns the recipe that trains all parameters to predict the next token of documents."""
    return Recipe(
        config,
        ModelSpec(config.model, config.compute, mesh),
        next_token(config),
        make_optimizer(config.optimizer, config.steps, compute_dtype(config.compute, mesh)),
    )


def next_token(config: TrainingConfig) -> Objective:
    """Returns the objective of pretraining: cross entropy of a `Batch`, in nats per token, with z-loss.

    If the config has a z-loss, `minimised` includes it and `loss` is the cross entropy alone.
    """
    compute, z_loss = config.compute, config.optimizer.z_loss
    settings = LossSettings(config.model.vocab_size, compute.loss_block, compute.loss_vocab_block, z_loss)

    def objective(model: Transformer, batch: Batch, context: Context) -> Sums:
        hidden = model(batch.tokens, batch.positions, batch.segment_ids, context)
        minimised, cross_entropy = next_token_loss(
            hidden, model.embedding, batch.targets, batch.loss_weights, settings
        )
        weight = jnp.sum(batch.loss_weights)
        sums = {"minimised": WeightedSum(minimised, weight), "loss": WeightedSum(cross_entropy, weight)}
        return sums if z_loss else {"loss": sums["minimised"]}

    return objective


def held_out_loss(token_bytes: jax.typing.ArrayLike) -> Objective:
    """Returns the objective for held-out documents: nats per token, and bits per byte of their text.

    Args:
      token_bytes: [vocab_size] number of UTF-8 bytes in each token's text.
    """

    def objective(model: Transformer, batch: Batch, context: Context) -> Sums:
        hidden = model(batch.tokens, batch.positions, batch.segment_ids, context)
        weights = batch.loss_weights
        nats = -jnp.sum(weights * token_log_probs(model, hidden, batch.targets))
        text = jnp.sum(weights * jnp.take(jnp.asarray(token_bytes), batch.targets))
        return {
            "held_out_loss": WeightedSum(nats, jnp.sum(weights)),
            "held_out_bits_per_byte": WeightedSum(nats / math.log(2), text),
        }

    return objective
