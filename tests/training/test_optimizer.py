"""Groups of parameters: what is frozen, slowed down or decayed otherwise, and that nothing else is."""

from typing import Any

import jax
import numpy as np
import pytest
from test_step import CONFIG, FLOAT64, B, L, packed_batch

from gemma_jax.config import ParameterGroup, PretrainConfig, replace
from gemma_jax.errors import UserError
from gemma_jax.sharding import named_arrays, put_batch
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.optimizer import settings_of
from gemma_jax.training.state import abstract_train_state, create_train_state
from gemma_jax.training.step import make_train_step
from tests.messages import naming

FIRST = replace(CONFIG, {"optimizer.warmup_steps": 0})


def moves(config: PretrainConfig, gradient: bool = True) -> dict[str, np.ndarray]:
    """How far the first step moves each parameter."""
    mesh = cpu_mesh(1)
    state = create_train_state(pretraining(config, mesh))
    before = jax.device_get(named_arrays(state.params))
    batch = packed_batch(config.model)
    if not gradient:
        batch = batch._replace(loss_weights=np.zeros((B, L), np.float32))
    after, _ = make_train_step(pretraining(config, mesh))(state, put_batch(batch, B, mesh))
    return {name: np.asarray(value) - before[name] for name, value in named_arrays(after.params).items()}


def grouped(*groups: ParameterGroup, **changes: Any) -> PretrainConfig:
    return replace(FIRST, {"optimizer.groups": groups, **changes})


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves_as_before(name: str) -> None:
    changes = {"optimizer.name": name}
    groups = (ParameterGroup("embedding", 0.0), ParameterGroup("*.feed_forward.*", 0.0))
    frozen = moves(grouped(*groups, **changes))
    free = moves(replace(FIRST, changes))
    for parameter, move in frozen.items():
        if parameter == "embedding" or ".feed_forward." in parameter:
            assert not move.any() and free[parameter].any(), parameter
        else:
            np.testing.assert_array_equal(move, free[parameter], err_msg=parameter)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_factor_scales_the_move_and_the_decay_in_it(name: str) -> None:
    changes = {"optimizer.name": name, **FLOAT64}
    with jax.enable_x64(True):
        free, slowed = (
            moves(grouped(*groups, **changes)) for groups in ((), (ParameterGroup("blocks.*", 0.25),))
        )
    for parameter, move in slowed.items():
        factor = 0.25 if parameter.startswith("blocks.") else 1.0
        np.testing.assert_allclose(move, factor * free[parameter], rtol=1e-9, atol=1e-15, err_msg=parameter)


def test_a_group_has_a_decay_of_its_own() -> None:
    """Without a gradient only decay moves; the later group has the last word, setting by setting."""
    config = grouped(
        ParameterGroup("*attention*", 0.5, 0.5),
        ParameterGroup("blocks.attention.q", weight_decay=0.0),
        ParameterGroup("embedding", weight_decay=0.0),
        **{"optimizer.weight_decay": 0.25, "optimizer.learning_rate": 0.5},
    )
    mesh = cpu_mesh(1)
    before = jax.device_get(named_arrays(create_train_state(pretraining(config, mesh)).params))
    for parameter, move in moves(config, gradient=False).items():
        decay = 0.125  # learning rate times decay
        if parameter in ("embedding", "blocks.attention.q") or parameter.endswith("norm"):
            decay = 0.0
        elif "attention" in parameter:
            decay = 0.5 * 0.5 * 0.5
        np.testing.assert_allclose(move, -decay * before[parameter], rtol=1e-5, atol=1e-8, err_msg=parameter)
    # A norm scale begins at 0 and cannot show its decay; by default it has none, and a group can give it one.
    # Stacked ones have two dimensions, like matrices: rank alone would decay them.
    params = abstract_train_state(pretraining(config, mesh)).params
    assert settings_of(params, config.optimizer)["blocks.attention_norm"]["weight_decay"] == 0.5
    plain = settings_of(params, replace(config.optimizer, {"groups": (), "weight_decay": 0.5}))
    norms = {"blocks.attention_norm", "blocks.feed_forward_norm", "final_norm"}
    assert {name for name, setting in plain.items() if not setting["weight_decay"]} == norms


def test_a_pattern_that_matches_nothing_is_told_with_the_names_there_are() -> None:
    config = grouped(ParameterGroup("embedding", weight_decay=0.0), ParameterGroup("embeding", 0.1))
    with pytest.raises(UserError, match=naming("'embeding'", "blocks.attention.q", "final_norm")):
        abstract_train_state(pretraining(config, cpu_mesh(1)))
