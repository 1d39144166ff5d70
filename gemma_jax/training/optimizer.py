"""Update rules and learning-rate schedules, from optax, as the config names them."""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from gemma_jax.config import OptimizerConfig
from gemma_jax.errors import UserError
from gemma_jax.sharding import logical_axes, named_arrays, with_arrays


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step of a run, from 0: linear warm-up, then the named shape.

    Step i of the warm-up has the share (i + 1) / warmup_steps of the peak, so that step 0 moves; the last
    step has the final rate.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    final = peak * config.final_fraction
    # Intervals between the last step of the peak's rate and the last step of all.
    fall = max(steps - max(warmup, 1), 1)
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(peak, fall, alpha=config.final_fraction)
    elif config.schedule == "linear":
        shape = optax.linear_schedule(peak, final, fall)
    elif config.schedule == "constant":
        shape = optax.constant_schedule(peak)
    else:
        decay = min(max(round(config.decay_fraction * steps), 1), fall)
        shape = optax.linear_schedule(peak, final, decay, transition_begin=fall - decay)
    if warmup <= 1:
        return shape
    # The shape begins with the last step of the warm-up, which has the peak's rate in both.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), shape], [warmup - 1])


def decays(params: nnx.State) -> Any:
    """True for weight matrices and the embedding, False for norm scales: decay would pull the norm to 1.

    A stacked norm scale has two dimensions like a matrix, so this decides by logical axes, not by rank.
    """

    def of_variable(variable: nnx.Variable[Any]) -> Any:
        is_matrix = len(set(logical_axes(variable)) - {"layers"}) > 1
        return jax.tree.map(lambda _: is_matrix, variable)

    return jax.tree.map(of_variable, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def settings_of(params: nnx.State, config: OptimizerConfig) -> dict[str, dict[str, float]]:
    """Learning-rate factor and weight decay of each parameter by name, with what `config.groups` changes.

    Raises:
      UserError: a group that no parameter belongs to.
    """
    settings: dict[str, dict[str, float]] = {
        name: {"learning_rate_factor": 1.0, "weight_decay": config.weight_decay * decay}
        for name, decay in named_arrays(decays(params)).items()
    }
    for group in config.groups:
        matched = fnmatch.filter(settings, group.pattern)
        if not matched:
            raise UserError(
                f"optimizer.groups: no parameter is called {group.pattern!r}; "
                f"the names are {', '.join(sorted(settings))}."
            )
        own = {"learning_rate_factor": group.learning_rate_factor, "weight_decay": group.weight_decay}
        for name in matched:
            settings[name] |= {key: value for key, value in own.items() if value is not None}
    return settings


def _by_parameter(
    config: OptimizerConfig, change: Callable[[dict[str, float], jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """The part of an update rule that makes (settings, update, parameter) another update."""

    def init(params: nnx.State) -> optax.EmptyState:
        settings_of(params, config)  # a mistake is reported before anything is made
        return optax.EmptyState()

    def update(
        updates: nnx.State, state: optax.EmptyState, params: nnx.State | None = None
    ) -> tuple[nnx.State, optax.EmptyState]:
        assert params is not None
        settings, values = settings_of(params, config), named_arrays(params)
        changed = {name: change(settings[name], x, values[name]) for name, x in named_arrays(updates).items()}
        return with_arrays(updates, changed), state

    return optax.GradientTransformation(init, update)


def _decayed(settings: dict[str, float], update: jax.Array, parameter: jax.Array) -> jax.Array:
    return update + settings["weight_decay"] * parameter if settings["weight_decay"] else update


def _scaled(settings: dict[str, float], update: jax.Array, parameter: jax.Array) -> jax.Array:
    return update * settings["learning_rate_factor"]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule that a config names, with clipping in front of it.

    Decay is decoupled as in AdamW whatever the rule, so that one setting means one thing. (optax.adafactor
    has a decay that ignores the learning rate; the rest of it is as Shazeer and Stern, 2018, have it.)
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    moment = None if config.first_moment_dtype == "param" else config.first_moment_dtype
    rules = {
        "adamw": [optax.scale_by_adam(config.b1, config.b2, config.epsilon, mu_dtype=moment)],
        "lion": [optax.scale_by_lion(config.b1, config.b2, mu_dtype=moment)],
        "adafactor": [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)],
    }
    rule = optax.chain(
        *rules[config.name],
        _by_parameter(config, _decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
        _by_parameter(config, _scaled),
    )
    return optax.chain(clip, rule)
