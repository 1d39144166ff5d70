"""A batch looked at closely: the loss of every token, and the gradient norm of every layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from gemma_jax.data.packing import Batch
from gemma_jax.model.scoring import token_log_probs
from gemma_jax.sharding import local_rows, logical_axes, parameter_name, put_batch
from gemma_jax.training.objectives import Recipe
from gemma_jax.training.step import sums_and_gradients


class BatchMeasures(NamedTuple):
    """What some parameters make of a batch."""

    token_losses: NDArray[np.float32]  # [B, L] nats, of weighted and other targets alike
    loss: float  # nats a token, as the step computes it
    gradient_norms: dict[str, NDArray[np.float32]]  # by parameter: [layers] where it is stacked, else []


def measure_batch(recipe: Recipe, params: nnx.State, read: Callable[[list[int]], Batch]) -> BatchMeasures:
    """Compute the loss and gradient of a batch of documents as a step does, and keep their parts.

    Args:
      recipe: of the run.
      params: of the model, on the recipe's mesh.
      read: returns the rows of these numbers of the batch; called with those that this process feeds.
    """
    model_spec, mesh, size = recipe.model, recipe.model.mesh, recipe.config.data.batch_size
    differentiate = sums_and_gradients(recipe)

    def measure(params: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        model = model_spec.merge(params)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids)
        log_probs = token_log_probs(model, hidden, batch.targets)
        _, sums, gradients = differentiate(params, batch)
        leaves = jax.tree_util.tree_leaves_with_path(gradients, is_leaf=lambda x: isinstance(x, nnx.Variable))
        norms = {parameter_name(path): _norm(variable) for path, variable in leaves}
        return -log_probs, sums["loss"].mean, norms

    batch = put_batch(read(local_rows(size, mesh)), size, mesh)
    # A copy on every device, so that every process of a job can read all of it.
    losses, loss, norms = jax.device_get(
        jax.jit(measure, out_shardings=NamedSharding(mesh, P()))(params, batch)
    )
    return BatchMeasures(np.asarray(losses), float(loss), norms)


def _norm(gradient: nnx.Variable[Any]) -> jax.Array:
    value = gradient.get_value()
    each = [axis for axis, name in enumerate(logical_axes(gradient)) if name != "layers"]
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=each))
