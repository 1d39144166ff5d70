"""The train state: everything that a training step changes, and the frozen parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gemma_jax.sharding import with_shardings
from gemma_jax.training.objectives import Recipe
from gemma_jax.training.optimizer import LossScaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run. A step replaces everything except the frozen parameters."""

    step: jax.Array  # [] int32: optimizer steps done
    frozen: nnx.State  # parameters without gradients and moments; checkpoints do not contain them
    trainable: nnx.State
    opt_state: optax.OptState  # for the trainable parameters only

    @property
    def params(self) -> nnx.State:
        """All parameters of the model."""
        return nnx.merge_state(self.frozen, self.trainable)

    @property
    def parts(self) -> dict[str, nnx.State | optax.OptState]:
        """The parts that a checkpoint holds. `loss_scale` is one only with float16."""
        if isinstance(self.opt_state, LossScaled):
            apart = {"opt_state": self.opt_state.inner, "loss_scale": self.opt_state._replace(inner=())}
            return {"params": self.trainable, **apart}
        return {"params": self.trainable, "opt_state": self.opt_state}

    def with_parts(self, step: jax.Array, frozen: nnx.State, parts: Mapping[str, Any]) -> "TrainState":
        """Returns this abstract state with values; a loss scale that is not among the parts begins anew."""
        opt_state = parts["opt_state"]
        if isinstance(self.opt_state, LossScaled):
            first = jax.tree.map(
                lambda value, like: jax.device_put(value, like.sharding),
                LossScaled.first(()),
                self.opt_state._replace(inner=()),
            )
            opt_state = parts.get("loss_scale", first)._replace(inner=opt_state)
        return TrainState(step, frozen, parts["params"], opt_state)


def abstract_train_state(recipe: Recipe) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state, without values.

    Raises:
      UserError: An axis of a parameter cannot be divided over the mesh.
    """
    frozen, trainable = recipe.split(recipe.model.params)
    made = jax.eval_shape(lambda params: (jnp.zeros((), jnp.int32), recipe.optimizer.init(params)), trainable)
    # Adafactor's statistics of rows and columns have fewer axes than their parameter, so they are replicated.
    step, opt_state = with_shardings(made, recipe.model.mesh, copy_other_ranks=True)
    return TrainState(step, frozen, trainable, opt_state)


def create_train_state(recipe: Recipe, params: nnx.State | None = None) -> TrainState:
    """Creates the state before the first step, with every array created directly in its place on the mesh.

    Args:
      recipe: What is trained and how.
      params: The initial parameters. If None, they are random, from the config's seed.
    """
    abstract = abstract_train_state(recipe)
    frozen, trainable = recipe.split(recipe.model.init(recipe.config.seed) if params is None else params)
    where = jax.tree.map(lambda leaf: leaf.sharding, (abstract.step, abstract.opt_state))
    create = jax.jit(
        lambda params: (jnp.zeros((), jnp.int32), recipe.optimizer.init(params)), out_shardings=where
    )
    step, opt_state = create(trainable)
    return TrainState(step, frozen, trainable, opt_state)
