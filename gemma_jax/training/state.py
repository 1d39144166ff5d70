"""Everything that a training step changes."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.config import TrainingConfig
from gemma_jax.model import ModelSpec
from gemma_jax.sharding import with_arrays, with_shardings
from gemma_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run: what a checkpoint holds and a step replaces."""

    step: jax.Array  # [] int32: optimizer steps done
    params: nnx.State
    opt_state: optax.OptState


def _create(config: TrainingConfig, mesh: Mesh, key: jax.Array) -> TrainState:
    spec = ModelSpec(config.model, config.compute, mesh)
    params = with_arrays(spec.params, spec.create(key))
    optimizer = make_optimizer(config.optimizer, config.steps)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_train_state(config: TrainingConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state, without values.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    abstract = jax.eval_shape(lambda key: _create(config, mesh, key), jax.random.key(0))
    # Adafactor's statistics of rows and columns are not of their parameter's axes.
    return with_shardings(abstract, mesh, copy_other_ranks=True)


def create_train_state(config: TrainingConfig, mesh: Mesh) -> TrainState:
    """The state before the first step, every array made in its place on the mesh."""
    abstract = abstract_train_state(config, mesh)
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda key: _create(config, mesh, key), out_shardings=out)(jax.random.key(config.seed))
