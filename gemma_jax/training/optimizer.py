"""Update rules and learning-rate schedules from optax, as selected by the config."""

import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gemma_jax.config import OptimizerConfig
from gemma_jax.errors import UserError
from gemma_jax.sharding import logical_axes, named_arrays, with_arrays

FIRST_SCALE, LEAST_SCALE, MOST_SCALE = 2.0**13, 2.0**-10, 2.0**24  # of the loss, with float16
GROWS_AFTER = 1000  # steps without overflow


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of each step, from step 0 on: linear warm-up, then the shape in the config.

    Step i of the warm-up has (i + 1) / warmup_steps of the peak rate, so that step 0 already changes the
    parameters. The last step has the final rate.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    final = peak * config.final_fraction
    # Intervals between the last warm-up step, which has the peak rate, and the last step of the run.
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
    # The shape begins at the last step of the warm-up; both have the peak rate there.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), shape], [warmup - 1])


def decays(params: nnx.State) -> Any:
    """Returns True for weight matrices and the embedding, and False for norm scales.

    Weight decay would pull the factor of a norm to 1. A stacked norm scale has two dimensions like a matrix,
    so this decides by logical axes, not by rank.
    """

    def of_variable(variable: nnx.Variable[Any]) -> Any:
        is_matrix = len(set(logical_axes(variable)) - {"layers"}) > 1
        return jax.tree.map(lambda _: is_matrix, variable)

    return jax.tree.map(of_variable, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def settings_of(params: nnx.State, config: OptimizerConfig) -> dict[str, dict[str, float]]:
    """Returns each parameter's learning-rate factor and weight decay by name, as changed by `config.groups`.

    Raises:
      UserError: A group matches no parameter.
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
    """Returns a transformation that replaces each update by `change(settings, update, parameter)`."""

    def init(params: nnx.State) -> optax.EmptyState:
        settings_of(params, config)  # report a mistake before any array is created
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


class LossScaled(NamedTuple):
    """The state of an optimizer, and the factor of the loss that keeps gradients within float16.

    Small gradients become 0 in float16, so the loss is multiplied by the largest factor that lets none
    overflow, and the gradients are divided by it (Micikevicius et al., 2018, Mixed Precision Training).
    """

    scale: jax.Array  # [] float32
    finite: jax.Array  # [] int32: steps since the scale changed
    inner: optax.OptState

    @classmethod
    def first(cls, inner: optax.OptState) -> "LossScaled":
        """Returns the state before the first step."""
        return cls(jnp.float32(FIRST_SCALE), jnp.int32(0), inner)

    def after(self, finite: jax.Array) -> "LossScaled":
        """Returns the state after a step: half the scale if it was not finite, twice after GROWS_AFTER."""
        count = jnp.where(finite, self.finite + 1, 0)
        grows = count >= GROWS_AFTER
        scale = self.scale * jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        scale = jnp.clip(scale, LEAST_SCALE, MOST_SCALE).astype(jnp.float32)
        return LossScaled(scale, jnp.where(grows, 0, count), self.inner)


def with_loss_scale(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the rule with `LossScaled` around its state; it takes gradients that are no longer scaled."""

    def init(params: nnx.State) -> LossScaled:
        return LossScaled.first(rule.init(params))

    def update(
        updates: nnx.State, state: LossScaled, params: nnx.State | None = None
    ) -> tuple[nnx.State, LossScaled]:
        updates, inner = rule.update(updates, state.inner, params)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, steps: int, dtype: Any = None) -> optax.GradientTransformation:
    """Returns the update rule that a config names, preceded by gradient clipping.

    With activations of the dtype float16 its state is a `LossScaled`, unless optimizer.loss_scale is off.

    Weight decay is decoupled as in AdamW for every rule, so that the setting always means the same. The decay
    of optax.adafactor ignores the learning rate and is not used; the rest of its rule is as in Shazeer and
    Stern, 2018.
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
    rule = optax.chain(clip, rule)
    return with_loss_scale(rule) if dtype == jnp.float16 and config.loss_scale == "dynamic" else rule
