"""What a step minimises and an evaluation measures: named weighted sums of a model and a batch."""

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
from gemma_jax.sharding import parameter_name
from gemma_jax.training.loss import LossSettings, next_token_loss
from gemma_jax.training.optimizer import make_optimizer
from gemma_jax.weights import Context


class WeightedSum(NamedTuple):
    """A sum over tokens or examples, and the sum of their weights. The quotient of both over the global
    batch is the mean, which is the same on any mesh and in any number of accumulation parts."""

    total: jax.Array
    weight: jax.Array

    @property
    def divisor(self) -> jax.Array:
        """The weight, or 1 where nothing has weight."""
        return jnp.where(self.weight == 0, 1, self.weight)

    @property
    def mean(self) -> jax.Array:
        """0 where nothing has weight."""
        return self.total / self.divisor


Sums = dict[str, WeightedSum]

# The model, a batch (a tree of arrays whose first axis is rows) and a Context. The mean of the first sum is
# minimised; that of `loss` is what a run shows and watches for spikes.
Objective = Callable[[Transformer, Any, Context], Sums]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained and how: a step, its state and a plan are made from this."""

    config: TrainingConfig
    model: ModelSpec
    objective: Objective
    optimizer: optax.GradientTransformation
    trainable: Callable[[str], bool] = lambda name: True
    """By dotted name. All other parameters are frozen: they have no gradient, no state of the optimizer, and
    no copy in a checkpoint."""
    random: bool = False
    """Whether the objective's Context has a random key, which the seed and the step decide."""

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """The frozen and the trainable part of the parameters."""
        trainable, frozen = nnx.split_state(params, lambda path, _: self.trainable(parameter_name(path)), ...)
        return frozen, trainable


def pretraining(config: TrainingConfig, mesh: Mesh) -> Recipe:
    """All parameters, towards the next token of documents."""
    return Recipe(
        config,
        ModelSpec(config.model, config.compute, mesh),
        next_token(config),
        make_optimizer(config.optimizer, config.steps),
    )


def next_token(config: TrainingConfig) -> Objective:
    """Cross entropy of the targets of a `Batch`, in nats a token, with the z-loss of the config.

    Where there is a z-loss, it is part of `minimised`, and `loss` is the cross entropy alone.
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
    """What documents held out are measured by: nats a token, and bits a byte of their text.

    Args:
      token_bytes: [vocab_size]: UTF-8 bytes of each token's text.
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
