"""One optimizer step, and the loss on held-out rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from gemma_jax.config import TrainingConfig
from gemma_jax.data.packing import Batch
from gemma_jax.model import ModelSpec
from gemma_jax.model.scoring import token_log_probs
from gemma_jax.sharding import platform
from gemma_jax.training.loss import LossSettings, next_token_loss
from gemma_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gemma_jax.training.state import TrainState, abstract_train_state


class StepMetrics(NamedTuple):
    """What a step tells; all scalars on the device. A step whose loss or gradient norm is not finite
    changed nothing but counts.
    """

    loss: jax.Array  # cross entropy, nats a token
    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    tokens: jax.Array  # targets with weight


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def model_spec(config: TrainingConfig, mesh: Mesh) -> ModelSpec:
    """The model that a config describes, on a mesh."""
    return ModelSpec(config.model, config.compute, mesh)


def loss_settings(config: TrainingConfig) -> LossSettings:
    """The loss as the config describes it."""
    return LossSettings(
        config.model.vocab_size,
        config.compute.loss_block,
        config.compute.loss_vocab_block,
        config.optimizer.z_loss,
    )


def loss_and_gradients(
    config: TrainingConfig, mesh: Mesh
) -> Callable[[nnx.State, Batch], tuple[jax.Array, nnx.State]]:
    """A function of parameters and a batch: mean cross entropy over all weighted targets, and its gradient.

    The mean is a global weighted sum over a global sum of weights, so it is the same number on any mesh
    and in any number of accumulation parts.
    """
    spec, settings = model_spec(config, mesh), loss_settings(config)
    parts = config.optimizer.accumulation_steps

    def objective(params: nnx.State, batch: Batch, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = spec.merge(params)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids)
        minimised, reported = next_token_loss(
            hidden, model.embedding, batch.targets, batch.loss_weights, settings
        )
        return minimised / total, reported / total

    gradient = jax.value_and_grad(objective, has_aux=True)

    def whole(params: nnx.State, batch: Batch) -> tuple[jax.Array, nnx.State]:
        total = jnp.maximum(jnp.sum(batch.loss_weights), 1)
        if parts == 1:
            (_, loss), grads = gradient(params, batch, total)
            return loss, grads
        # Part i takes every parts-th row from row i on: each device then keeps its own rows.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

        def wide(x: jax.Array) -> jax.Array:
            return x.astype(jnp.promote_types(x.dtype, jnp.float32))

        def body(sums: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], None]:
            (_, loss), grads = gradient(params, part, total)
            return jax.tree.map(lambda total, x: total + wide(x), sums, (loss, grads)), None

        first = jax.tree.map(lambda x: x[0], split)
        (_, loss), grads = jax.eval_shape(gradient, params, first, total)
        zeros = jax.tree.map(lambda x: wide(jnp.zeros(x.shape, x.dtype)), (loss, grads))
        (loss, grads), _ = lax.scan(body, zeros, split)
        return loss, jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)

    return whole


def make_train_step(config: TrainingConfig, mesh: Mesh) -> TrainStep:
    """The compiled step: state and batch [B, L] on the mesh -> new state and metrics.

    The state that is passed in is donated: its memory is used again.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    differentiate = loss_and_gradients(config, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        loss, grads = differentiate(state.params, batch)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def kept_if_not_finite(old: jax.Array, new: jax.Array) -> jax.Array:
            # Counts go on, so that the learning rate stays that of the step.
            return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(finite, new, old)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            kept_if_not_finite, (state.params, state.opt_state), (params, opt_state)
        )
        metrics = StepMetrics(loss, norm, jnp.asarray(schedule(state.step)), jnp.sum(batch.loss_weights))
        return TrainState(state.step + 1, params, opt_state), metrics

    out = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(config, mesh))
    options = dict(option.split("=", 1) for option in config.compute.tpu_options)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(out, None),
        compiler_options=options if platform(mesh) == "tpu" else None,
    )


class HeldOutSums(NamedTuple):
    """Sums over rows, to be added up and divided on the host."""

    nats: jax.Array
    tokens: jax.Array
    bytes: jax.Array


def make_evaluation_step(config: TrainingConfig, mesh: Mesh) -> Callable[..., HeldOutSums]:
    """The compiled held-out loss: (params, batch, bytes of each token id [vocab_size]) -> sums."""
    spec = model_spec(config, mesh)

    def evaluate(params: nnx.State, batch: Batch, token_bytes: jax.Array) -> HeldOutSums:
        model = spec.merge(params)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids)
        log_probs = token_log_probs(model, hidden, batch.targets)
        weights = batch.loss_weights
        return HeldOutSums(
            -jnp.sum(weights * log_probs),
            jnp.sum(weights),
            jnp.sum(weights * jnp.take(token_bytes, batch.targets)),
        )

    return jax.jit(evaluate)
