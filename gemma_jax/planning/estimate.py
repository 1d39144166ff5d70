"""From cycles to seconds, utilisation, days and money: a model, with its assumptions stated."""

import dataclasses
import math

from gemma_jax.planning.analysis import Analysis
from gemma_jax.planning.topology import Topology

# Attention kernels have no cycles from the compiler; they are charged their floating-point operations at this
# share of the chip's peak. Other kernels are charged what they state at the whole peak.
ATTENTION_UTILISATION = 0.5

ASSUMPTIONS = (
    "seconds are the compiler's own estimate for each instruction, times loop rounds, over the clock",
    f"attention kernels run at {ATTENTION_UTILISATION:.0%} of peak, and causality saves half of their work",
    "collectives that the compiler lays beside computation cost nothing; neither do input and checkpoints",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated time and memory of a step. None where unknown."""

    calibrated: bool  # False where the clock is not published
    compiled_seconds: float  # without Pallas kernels
    kernel_seconds: float
    unknown_kernels: int  # that state no work and are left out
    utilisation: float | None  # of the peak, by what the model asks for (causal attention by half)
    tokens_per_second: float  # of all chips
    link_seconds: dict[str, float]  # least time for the bytes of a step, by network

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compiled_seconds + self.kernel_seconds


def estimate(
    analysis: Analysis,
    topology: Topology,
    peak_flops: float,
    devices: int,
    tokens: int,
    model_flops: float | None,
) -> Estimate:
    """The time of a step.

    Args:
      analysis: of the program.
      topology: what it runs on.
      peak_flops: dense bfloat16 FLOP/s of all devices together.
      devices: how many there are.
      tokens: that a step processes.
      model_flops: floating-point operations that the model asks for in a step, or None.
    """
    generation = topology.generation
    peak = peak_flops / devices
    kernel_seconds = sum(
        kernel.flops / peak / (ATTENTION_UTILISATION if kernel.attention else 1)
        for kernel in analysis.kernels
    )
    compiled_seconds = analysis.cycles / generation.clock
    seconds = compiled_seconds + kernel_seconds
    devices_a_chip = devices / topology.chips
    traffic = {"ici": 0.0, "dcn": 0.0}
    for collective in analysis.collectives:
        traffic["dcn" if "slice" in collective.axis else "ici"] += collective.bytes
    speeds = {"ici": generation.ici_bytes_a_second, "dcn": generation.dcn_bytes_a_second}
    link_seconds = {
        name: traffic[name] * devices_a_chip / speed
        for name, speed in speeds.items()
        if speed and traffic[name]
    }
    return Estimate(
        generation.clock_is_published,
        compiled_seconds,
        kernel_seconds,
        sum(not kernel.flops for kernel in analysis.kernels),
        model_flops / (seconds * peak_flops) if model_flops is not None and seconds else None,
        tokens / seconds if seconds else math.inf,
        link_seconds,
    )


@dataclasses.dataclass(frozen=True)
class Budget:
    """A whole run."""

    tokens: float
    days: float
    chip_hours: float
    cost: float | None  # in the currency of the price


def budget(tokens: float, tokens_per_second: float, chips: int, price: float) -> Budget:
    """Time and cost of so many tokens; `price` is of a chip and hour, 0 where it is not known."""
    seconds = tokens / tokens_per_second
    chip_hours = seconds / 3600 * chips
    return Budget(tokens, seconds / 86_400, chip_hours, chip_hours * price if price else None)
