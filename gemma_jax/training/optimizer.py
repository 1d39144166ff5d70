"""Update rules and learning-rate schedules, from optax, as the config names them."""

from typing import Any

import jax
import optax
from flax import nnx

from gemma_jax.config import OptimizerConfig
from gemma_jax.sharding import logical_axes


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule that a config names, with clipping in front of it."""
    rate = learning_rate_schedule(config, steps)
    if config.name == "adamw":
        rule = optax.adamw(
            rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decays
        )
    elif config.name == "lion":
        rule = optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)
    else:
        # optax.adafactor is this chain with a weight decay that ignores the learning rate (Shazeer and
        # Stern, 2018); decay here is decoupled as in AdamW, so that one setting means one thing.
        rule = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, mask=decays),
            optax.scale_by_learning_rate(rate),
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, rule)
