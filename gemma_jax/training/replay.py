"""Recomputes the batch of a step: the loss of every token and the gradient norm of every layer."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from gemma_jax.checkpoint.folders import STEPS_FOLDER, saved_steps
from gemma_jax.checkpoint.record import DamagedCheckpoint, RunRecord, run_record
from gemma_jax.checkpoint.restore import load_arrays
from gemma_jax.config import TrainingConfig
from gemma_jax.data.loader import Dataset
from gemma_jax.data.packing import Batch, PairBatch
from gemma_jax.errors import UserError
from gemma_jax.model.scoring import token_log_probs
from gemma_jax.paths import user_path
from gemma_jax.sharding import local_rows, logical_axes, parameter_name, put_batch
from gemma_jax.training.metrics import read_metrics
from gemma_jax.training.objectives import Recipe
from gemma_jax.training.run import Task
from gemma_jax.training.sinks import Entry
from gemma_jax.training.stability import Stability
from gemma_jax.training.step import context_of, sums_and_gradients


class Replay(NamedTuple):
    """The result of recomputing a step."""

    step: int
    params_step: int  # number of steps that the parameters were trained for
    first_row: int  # index of the batch's first row in the stream of training rows
    batch: Batch  # the whole global batch
    token_losses: NDArray[np.float32]  # [B, L] in nats, also for targets whose weight is 0
    loss: float  # in nats per token, as the step computes it
    gradient_norms: dict[str, NDArray[np.float32]]  # by parameter: [layers] if it is stacked, otherwise []
    logged: Entry | None  # what the run logged at this step
    largest: NDArray[np.float32] = np.zeros(
        0, np.float32
    )  # with float16, `Transformer.largest` of the batch; otherwise empty

    def row_loss(self, row: int) -> float:
        """Returns the weighted mean loss of a row in nats, or 0 if no target has weight."""
        return mean_loss(self.token_losses[row], self.batch.loss_weights[row])

    def rows_by_loss(self, limit: int) -> list[int]:
        """Returns the indices of `limit` rows (0: all): losses that are not finite, then the highest."""
        losses = np.array([self.row_loss(row) for row in range(len(self.batch.tokens))])
        order = np.argsort(np.where(np.isfinite(losses), -losses, -np.inf), kind="stable").tolist()
        return order[: limit or None]

    @property
    def gradient_norm(self) -> float:
        """The gradient norm over all parameters together."""
        squares = [np.sum(np.square(x, dtype=np.float64)) for x in self.gradient_norms.values()]
        return float(np.sqrt(sum(squares)))


def mean_loss(losses: NDArray[np.float32], weights: NDArray[np.float32]) -> float:
    """Returns the weighted mean, or 0 if no loss has weight. A loss without weight may even be NaN."""
    counted = weights > 0
    return float(np.average(losses[counted], weights=weights[counted])) if np.any(counted) else 0.0


def replay_step(task: Task, step: int) -> Replay:
    """Recreates the batch of a step and computes it with the newest saved parameters from before that step.

    Raises:
      UserError: No such parameters are left, or the checkpoint belongs to another model.
    """
    recipe, dataset = task.recipe, task.dataset
    config = recipe.config
    checkpoints = list(_checkpoints(config))
    history = checkpoints[0][1].history if checkpoints else {}
    first_row = Stability.from_record(config.stability, history).first_row(step - 1, config.data.batch_size)
    for folder, record in checkpoints:
        if record.step < step:
            try:
                params = _params(task, folder, record)
                return replay_batch(recipe, dataset, params, step, first_row, record.step)
            except DamagedCheckpoint as error:
                print(f"{error} An older one is used here", file=sys.stderr)
    if config.fork_from:
        raise UserError(
            f"no parameters from before step {step} are left in {config.run_dir} or {config.fork_from}; "
            "show a later step."
        )
    initial = task.initial()
    params = recipe.model.init(config.seed) if initial is None else initial
    return replay_batch(recipe, dataset, params, step, first_row, 0)


def _params(task: Task, folder: epath.Path, record: RunRecord) -> nnx.State:
    """Loads what a run has trained, and what is frozen from where the run took it."""
    frozen, trainable = task.recipe.split(task.recipe.model.params)
    loaded = load_arrays(folder, {"params": trainable}, record)["params"]
    if jax.tree.leaves(frozen):
        initial = task.initial()
        assert initial is not None
        frozen = task.recipe.split(initial)[0]
    return nnx.merge_state(frozen, loaded)


def _checkpoints(config: TrainingConfig) -> Iterator[tuple[epath.Path, RunRecord]]:
    """Yields the checkpoints that a run still has, newest first, then the one that it was forked from."""
    steps_folder = user_path(config.run_dir) / STEPS_FOLDER
    folders = [steps_folder / str(step) for step in reversed(saved_steps(steps_folder.parent))]
    for folder in [*folders, *([epath.Path(config.fork_from)] if config.fork_from else [])]:
        try:
            yield folder, run_record(folder)
        except DamagedCheckpoint as error:
            print(f"{error} An older one is used here", file=sys.stderr)


def replay_batch(
    recipe: Recipe, dataset: Dataset, params: nnx.State, step: int, first_row: int, params_step: int
) -> Replay:
    """Compute the loss and gradient of a batch as a step does, and keep its losses and norms in detail.

    Args:
      recipe, dataset: The recipe and the dataset of the run.
      params: The parameters of the model, on the recipe's mesh.
      step: The step that uses the batch.
      first_row: The index of the batch's first row in the data.
      params_step: The number of steps that `params` were trained for.
    """
    config, model_spec, mesh = recipe.config, recipe.model, recipe.model.mesh
    differentiate = sums_and_gradients(recipe)

    def measure(
        params: nnx.State, fed: Batch | PairBatch
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], jax.Array]:
        model, batch = model_spec.merge(params), _rows(fed)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids)
        log_probs = token_log_probs(model, hidden, batch.targets)
        _, sums, gradients = differentiate(params, fed, context_of(recipe, step - 1))
        leaves = jax.tree_util.tree_leaves_with_path(gradients, is_leaf=lambda x: isinstance(x, nnx.Variable))
        norms = {parameter_name(path): _norm(variable) for path, variable in leaves}
        inputs = batch.tokens, batch.positions, batch.segment_ids
        largest = model.largest(*inputs) if model.dtype == jnp.float16 else jnp.zeros(0)
        return -log_probs, sums["loss"].mean, norms, largest

    size = config.data.batch_size
    fed = put_batch(dataset.train.batch(first_row, size, local_rows(size, mesh)), size, mesh)
    # Replicated on every device, so that every process of a job can read the whole result.
    losses, loss, norms, largest = jax.device_get(
        jax.jit(measure, out_shardings=NamedSharding(mesh, P()))(params, fed)
    )
    entries = read_metrics(user_path(config.run_dir))
    logged = next((entry for entry in entries if entry["step"] == step and "loss" in entry), None)
    batch = _rows(dataset.train.batch(first_row, size))
    return Replay(
        step, params_step, first_row, batch, np.asarray(losses), float(loss), norms, logged, largest
    )


def _rows(batch: Batch | PairBatch) -> Batch:
    return batch.batch if isinstance(batch, PairBatch) else batch


def _norm(gradient: nnx.Variable[Any]) -> jax.Array:
    value = gradient.get_value()
    each = [axis for axis, name in enumerate(logical_axes(gradient)) if name != "layers"]
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=each))
