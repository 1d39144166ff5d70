"""Update rules and learning-rate schedules, from optax, as the config names them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gemma_jax.config import OptimizerConfig, ParameterGroup, group_of_each, parameter_groups
from gemma_jax.sharding import logical_axes, named_arrays, with_arrays


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step of a run of `steps`: linear warm-up, then the named shape."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps)
    after = max(steps - warmup, 1)
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
    elif config.schedule == "linear":
        shape = optax.linear_schedule(peak, final, after)
    elif config.schedule == "constant":
        shape = optax.constant_schedule(peak)
    else:
        decay = max(round(config.decay_fraction * steps), 1)
        shape = optax.linear_schedule(peak, final, decay, transition_begin=max(after - decay, 0))
    # Step 0 already moves: the rate of step i of the warm-up is (i + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, shape], [warmup])


def decays(params: nnx.State) -> Any:
    """True for weight matrices and the embedding, False for norm scales: decay would pull the norm to 1.

    A stacked norm scale has two dimensions like a matrix, so this goes by logical axes, not by rank.
    """

    def of_variable(variable: nnx.Variable[Any]) -> Any:
        is_matrix = len(set(logical_axes(variable)) - {"layers"}) > 1
        return jax.tree.map(lambda _: is_matrix, variable)

    return jax.tree.map(of_variable, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def groups_of(params: nnx.State, config: OptimizerConfig) -> dict[str, ParameterGroup]:
    """Learning-rate factor and weight decay of each parameter by name, with what `config.groups` changes.

    Raises:
      UserError: a group that no parameter belongs to.
    """
    of_each = group_of_each(parameter_groups(config.groups), named_arrays(params))
    for name, decay in named_arrays(decays(params)).items():
        group = of_each[name]
        of_each[name] = ParameterGroup(
            name,
            1.0 if group.learning_rate_factor is None else group.learning_rate_factor,
            config.weight_decay * decay if group.weight_decay is None else group.weight_decay,
        )
    return of_each


def _by_group(
    config: OptimizerConfig, change: Callable[[ParameterGroup, jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """The part of an update rule that makes (group, update, parameter) another update."""

    def init(params: nnx.State) -> optax.EmptyState:
        groups_of(params, config)  # a mistake is told before anything is made
        return optax.EmptyState()

    def update(
        updates: nnx.State, state: optax.EmptyState, params: nnx.State | None = None
    ) -> tuple[nnx.State, optax.EmptyState]:
        assert params is not None
        groups, values = groups_of(params, config), named_arrays(params)
        changed = {name: change(groups[name], x, values[name]) for name, x in named_arrays(updates).items()}
        return with_arrays(updates, changed), state

    return optax.GradientTransformation(init, update)


def _decayed(group: ParameterGroup, update: jax.Array, parameter: jax.Array) -> jax.Array:
    return update + group.weight_decay * parameter if group.weight_decay else update


def _scaled(group: ParameterGroup, update: jax.Array, parameter: jax.Array) -> jax.Array:
    # Not a product with 0: what is frozen must survive a gradient that is not finite.
    return update * group.learning_rate_factor if group.learning_rate_factor else jnp.zeros_like(update)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule that a config names, with clipping in front of it.

    Decay is decoupled as in AdamW whatever the rule, so that one setting means one thing. (optax.adafactor
    has a decay that ignores the learning rate; the rest of it is as Shazeer and Stern, 2018, have it.)
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rules = {
        "adamw": [optax.scale_by_adam(config.b1, config.b2, config.epsilon)],
        "lion": [optax.scale_by_lion(config.b1, config.b2)],
        "adafactor": [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)],
    }
    rule = optax.chain(
        *rules[config.name],
        _by_group(config, _decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
        _by_group(config, _scaled),
    )
    return optax.chain(clip, rule)
