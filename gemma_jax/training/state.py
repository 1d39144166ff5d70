"""Everything that a training step changes, and what it leaves as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gemma_jax.sharding import with_shardings
from gemma_jax.training.objectives import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run. A step replaces all of it but the frozen parameters."""

    step: jax.Array  # [] int32: optimizer steps done
    frozen: nnx.State  # parameters without gradient and moments, in no checkpoint
    trainable: nnx.State
    opt_state: optax.OptState  # of the trainable parameters alone

    @property
    def params(self) -> nnx.State:
        """All parameters of the model."""
        return nnx.merge_state(self.frozen, self.trainable)

    @property
    def parts(self) -> dict[str, nnx.State | optax.OptState]:
        """What a checkpoint holds."""
        return {"params": self.trainable, "opt_state": self.opt_state}


def abstract_train_state(recipe: Recipe) -> TrainState:
    """Shapes, dtypes and shardings of a run's state, without values.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    frozen, trainable = recipe.split(recipe.model.params)
    made = jax.eval_shape(lambda params: (jnp.zeros((), jnp.int32), recipe.optimizer.init(params)), trainable)
    # Adafactor's statistics of rows and columns are not of their parameter's axes.
    step, opt_state = with_shardings(made, recipe.model.mesh, copy_other_ranks=True)
    return TrainState(step, frozen, trainable, opt_state)


def create_train_state(recipe: Recipe, params: nnx.State | None = None) -> TrainState:
    """The state before the first step, every array made in its place on the mesh.

    Args:
      recipe: what is trained.
      params: to begin with; random ones of the config's seed if None.
    """
    abstract = abstract_train_state(recipe)
    frozen, trainable = recipe.split(recipe.model.init(recipe.config.seed) if params is None else params)
    where = jax.tree.map(lambda leaf: leaf.sharding, (abstract.step, abstract.opt_state))
    create = jax.jit(
        lambda params: (jnp.zeros((), jnp.int32), recipe.optimizer.init(params)), out_shardings=where
    )
    step, opt_state = create(trainable)
    return TrainState(step, frozen, trainable, opt_state)
