"""One optimizer step for any objective."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from gemma_jax.model.transformer import compute_dtype
from gemma_jax.sharding import platform
from gemma_jax.training.objectives import Recipe, Sums, WeightedSum
from gemma_jax.training.optimizer import LossScaled, learning_rate_schedule
from gemma_jax.training.state import TrainState, abstract_train_state
from gemma_jax.weights import NO_CONTEXT, Context

# The mean of each sum of the objective, `grad_norm` (before clipping), `learning_rate` and `tokens` (the
# weight of what is minimised, unless the objective counts them), and `loss_scale` with float16. All are
# scalars on the device. A step whose minimised mean or gradient norm is not finite changes only the counts
# and the loss scale.
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


Found = tuple[WeightedSum, Sums, nnx.State]


def sums_and_gradients(recipe: Recipe) -> Callable[..., Found]:
    """Returns a function of all parameters, a batch, a Context and a factor of the loss. That function
    returns the sum to minimise, all sums of the objective over the global batch, and the gradient of the mean
    of the sum to minimise, times the factor, with respect to the trainable parameters.

    If the batch is processed in several parts (`optimizer.accumulation_steps`), the mean's weight is known
    only after the last part. So the gradients of the total are summed, in at least float32, and divided at
    the end.
    """
    parts = recipe.config.optimizer.accumulation_steps
    is_half = compute_dtype(recipe.config.compute, recipe.model.mesh) == jnp.float16

    def differentiate(params: nnx.State, batch: Any, context: Context, factor: Any) -> Found:
        """Returns the gradient of the mean if there is only one part, otherwise of the total."""
        frozen, trainable = recipe.split(params)

        def first_total(trainable: nnx.State) -> tuple[jax.Array, tuple[WeightedSum, Sums]]:
            model = recipe.model.merge(nnx.merge_state(frozen, trainable))
            sums = recipe.objective(model, batch, context)
            first = next(iter(sums.values()))  # selected here, before jax sorts the dictionary's keys
            return first.total, (first, sums)

        total, pull_back, (first, sums) = jax.vjp(first_total, trainable, has_aux=True)
        scale = jnp.ones_like(total) * factor
        (gradients,) = pull_back(scale / first.divisor if parts == 1 or is_half else scale)
        if parts > 1 and is_half:  # of the mean, so that a factor suits any number of tokens
            gradients = jax.tree.map(lambda x: _wide(x) * first.divisor, gradients)
        return first, sums, gradients

    def in_parts(params: nnx.State, batch: Any, context: Context, factor: Any) -> Found:
        # Part i has every parts-th row, beginning with row i, so that each device keeps its own rows.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
        keys = None if context.key is None else jax.random.split(context.key, parts)

        def body(carry: Any, scanned: tuple[Any, jax.Array | None]) -> tuple[Any, None]:
            part, key = scanned
            return jax.tree.map(
                lambda x, y: x + _wide(y), carry, differentiate(params, part, Context(key), factor)
            ), None

        first_part = jax.tree.map(lambda x: x[0], (split, keys))
        shapes = jax.eval_shape(
            lambda part, key: differentiate(params, part, Context(key), factor), *first_part
        )
        zeros = jax.tree.map(lambda x: _wide(jnp.zeros(x.shape, x.dtype)), shapes)
        (first, sums, gradients), _ = lax.scan(body, zeros, (split, keys))
        trainable = recipe.split(params)[1]
        means = jax.tree.map(lambda x, like: (x / first.divisor).astype(like.dtype), gradients, trainable)
        return first, sums, means

    def of_batch(
        params: nnx.State, batch: Any, context: Context = NO_CONTEXT, factor: jax.Array | float = 1.0
    ) -> Found:
        return (differentiate if parts == 1 else in_parts)(params, batch, context, factor)

    return of_batch


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def context_of(recipe: Recipe, done: jax.Array | int) -> Context:
    """Returns the context of the step after `done` steps, whose random key depends on it and on the seed."""
    if not recipe.random:
        return NO_CONTEXT
    return Context(jax.random.fold_in(jax.random.key(recipe.config.seed), done))


def make_train_step(recipe: Recipe) -> TrainStep:
    """Returns the compiled step: state and batch on the mesh -> new state and metrics.

    The state that is passed in is donated: its memory is reused.
    """
    config, optimizer = recipe.config, recipe.optimizer
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    differentiate = sums_and_gradients(recipe)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        context = context_of(recipe, state.step)
        scaled = state.opt_state if isinstance(state.opt_state, LossScaled) else None
        first, sums, gradients = differentiate(state.params, batch, context, scaled.scale if scaled else 1.0)
        if scaled:
            gradients = jax.tree.map(lambda x: (_wide(x) / scaled.scale).astype(x.dtype), gradients)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(first.mean) & jnp.isfinite(norm)

        def kept_if_not_finite(old: jax.Array, new: jax.Array) -> jax.Array:
            # Counts (integers) still increase, so that the learning rate is the one of the step.
            return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(finite, new, old)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            kept_if_not_finite, (state.trainable, state.opt_state), (trainable, opt_state)
        )
        if scaled:
            opt_state = opt_state.after(finite)
        metrics = {
            "tokens": first.weight,
            **{name: weighted.mean for name, weighted in sums.items()},
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step)),
        } | ({"loss_scale": scaled.scale} if scaled else {})
        return TrainState(state.step + 1, state.frozen, trainable, opt_state), metrics

    out = jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(recipe))
    compute, kind = config.compute, platform(recipe.model.mesh)
    options = {"tpu": compute.tpu_options, "gpu": compute.gpu_options}.get(kind, ())
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(out, None),
        compiler_options=dict(option.split("=", 1) for option in options) or None,
    )
