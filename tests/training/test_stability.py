"""Spikes, gaps in the data, and what a checkpoint remembers of both."""

import json
import math

import numpy as np
import pytest

from gemma_jax.config import StabilityConfig
from gemma_jax.errors import UserError
from gemma_jax.training.stability import Gap, RollBack, Stability
from tests.messages import naming

CONFIG = StabilityConfig(spike_threshold=6.0, spike_window=32, spike_steps=3)


def normal_losses(count: int) -> list[float]:
    return np.random.default_rng(0).normal(3.0, 0.1, count).tolist()


def spikes_at(stability: Stability, losses: list[float]) -> list[int]:
    """Returns the positions, counted from 1, of the losses at which a spike is detected."""
    found = []
    for number, loss in enumerate(losses, start=1):
        stability.record_step(loss, 1.0)
        if stability.spiking:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("after", "found"),
    [
        ([], []),
        ([9.0], []),  # a single batch is no spike
        ([9.0, 9.0], []),
        ([9.0, 9.0, 3.0, 9.0, 9.0], []),
        ([9.0, 9.0, 9.0], [203]),
        ([3.5, 3.5, 3.5], []),  # five deviations
        ([3.9, 3.9, 3.9], [203]),
        ([1.0, 1.0, 1.0], []),  # a loss that falls is welcome
    ],
)
def test_a_spike_is_so_many_high_losses_in_a_row(after: list[float], found: list[int]) -> None:
    assert spikes_at(Stability(CONFIG), [*normal_losses(200), *after]) == found


def test_no_spike_is_looked_for_by_default_nor_before_the_window_is_full() -> None:
    assert spikes_at(Stability(StabilityConfig()), [1.0] * 500 + [9.0] * 50) == []
    assert spikes_at(Stability(CONFIG), [*normal_losses(20), 9.0, 9.0, 9.0]) == []


def test_a_record_goes_on_where_it_was_made() -> None:
    """Wherever a run is interrupted, the resumed one sees the same spike at the same step."""
    losses = [*normal_losses(60), 9.0, math.nan, 9.0, 9.0]
    whole = Stability(CONFIG)
    found = spikes_at(whole, losses)
    assert found == [64]
    for cut in (10, 61, 62, 63):
        first = Stability(CONFIG)
        spikes_at(first, losses[:cut])
        record = json.loads(json.dumps(first.record()))
        second = Stability.from_record(CONFIG, record)
        assert second.record() == first.record()
        assert [cut + number for number in spikes_at(second, losses[cut:])] == found
        assert second.record() == whole.record()


def test_where_a_run_goes_back_to() -> None:
    stability = Stability(CONFIG)
    stability.gaps = (Gap(50, 100),)
    back = stability.roll_back(103, [40, 80, 100, 101, 102], 4)  # the spike is steps 101 to 103
    assert isinstance(back, RollBack) and back.to == 100
    # The next batch is the one after step 103's, whatever was passed over before.
    stability.gaps = (*stability.gaps, back.gap)
    assert stability.first_row(100, 4) == 103 * 4 + 100
    margin = Stability(StabilityConfig(**{**vars(CONFIG), "rollback_margin": 5}))
    further = margin.roll_back(103, [40, 80, 100, 101, 102], 4)
    assert further is not None and further.to == 80
    assert margin.roll_back(103, [99, 100], 4) is None


def test_too_many_spikes_end_the_run() -> None:
    stability = Stability(StabilityConfig(**{**vars(CONFIG), "max_rollbacks": 2}))
    stability.gaps = (Gap(10, 4), Gap(20, 4))
    with pytest.raises(UserError, match=naming("step 103", 2, "stability.max_rollbacks")):
        stability.roll_back(103, [100], 4)
