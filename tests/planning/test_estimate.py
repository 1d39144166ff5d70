"""Seconds, utilisation, days and money, by hand."""

import dataclasses

import pytest

from gemma_jax.planning.analysis import Analysis, Kernel
from gemma_jax.planning.collectives import Collective
from gemma_jax.planning.estimate import ATTENTION_UTILISATION, budget, estimate
from gemma_jax.planning.topology import parse_topology


def analysis(*kernels: Kernel, collectives: tuple[Collective, ...] = ()) -> Analysis:
    return Analysis(
        {"parameters": 819_000_000_000}, 3_006_000_000, 1_503_000_000, 0, kernels, collectives, ()
    )


def test_seconds_of_a_step() -> None:
    v5e = parse_topology("v5e-4")
    peak = 4 * 197e12
    attention = Kernel("splash_mha_fwd", True, 18, 197e12)
    stated = Kernel("own", False, 1, 197e11)
    silent = Kernel("silent", False, 1, 0.0)
    figures = estimate(analysis(attention, stated, silent), v5e, peak, {"fsdp": 4}, 1000, peak)
    assert figures.compiled_seconds == pytest.approx(2, rel=1e-3)  # the published clock
    assert figures.kernel_seconds == pytest.approx(1 / ATTENTION_UTILISATION + 0.1)
    assert figures.unknown_kernels == 1 and figures.calibrated
    assert figures.utilisation == pytest.approx(1 / figures.seconds)
    assert figures.tokens_per_second == pytest.approx(1000 / figures.seconds)


@pytest.mark.parametrize(("cache", "seconds"), [(0.5, 1.5), (4.0, 5.0)])
def test_a_step_of_decoding_reads_the_weights_and_the_cache(cache: float, seconds: float) -> None:
    """What a call does beside its steps is not part of a step; the weights take one second to be read."""
    size = int(cache * 819e9)
    kernel = Kernel("paged", False, 1, 0.0)
    figures = estimate(analysis(kernel), parse_topology("v5e-1"), 197e12, {"fsdp": 1}, 8, None, size)
    assert figures.call_seconds == pytest.approx(1, rel=1e-3)
    assert figures.read_seconds == pytest.approx(1 + cache, rel=1e-3)
    assert figures.seconds == pytest.approx(seconds, rel=1e-3)
    without = estimate(analysis(), parse_topology("v5e-1"), 197e12, {"fsdp": 1}, 8, None, size)
    assert without.kernel_seconds == 0 and without.seconds == pytest.approx(1 + cache, rel=1e-3)


def test_a_clock_that_nobody_publishes_is_said_to_be_uncalibrated() -> None:
    figures = estimate(analysis(), parse_topology("v6e-4"), 4 * 918e12, {"fsdp": 4}, 1000, None)
    assert not figures.calibrated and figures.utilisation is None


@pytest.mark.parametrize(("name", "clock"), [("v4-8", 1.05e9), ("v5e-1", 1.503e9), ("v5p-8", 1.75e9)])
def test_clocks_are_those_known(name: str, clock: float) -> None:
    assert parse_topology(name).generation.clock == pytest.approx(clock, rel=2e-3)


def test_least_time_on_each_network() -> None:
    """Bytes are of a device, speeds of a chip: two devices of a chip share its links."""
    over_links = Collective("all-gather", "fsdp", (), 1, 6e9, "", "")
    between = dataclasses.replace(over_links, axis="slice", bytes=1.25e9)
    traffic = analysis(collectives=(over_links, between))
    v6e = estimate(traffic, parse_topology("v6e-4", 2), 1.0, {"fsdp": 8}, 1, None)
    assert v6e.link_seconds == {"ici": pytest.approx(6 / 400), "dcn": pytest.approx(0.1)}
    tpu7x = estimate(traffic, parse_topology("tpu7x-8", 2), 1.0, {"fsdp": 16}, 1, None)
    assert tpu7x.link_seconds["ici"] == pytest.approx(2 * 6 / 600)
    # Nothing is published for v4.
    assert estimate(traffic, parse_topology("v4-8", 2), 1.0, {"fsdp": 8}, 1, None).link_seconds == {}


def test_a_whole_run() -> None:
    run = budget(20e9, 1e6, 256, 1.2)
    assert run.days == pytest.approx(20_000 / 86_400)
    assert run.chip_hours == pytest.approx(20_000 / 3600 * 256)
    assert run.cost == pytest.approx(1.2 * run.chip_hours)
    assert budget(20e9, 1e6, 256, 0.0).cost is None
