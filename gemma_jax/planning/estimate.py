"""Converts cycles to seconds, utilisation, days and cost: a model, whose assumptions are in ASSUMPTIONS."""

import dataclasses
import math

from gemma_jax.planning.analysis import Analysis
from gemma_jax.planning.topology import Topology

# The compiler reports no cycles for Pallas kernels. The time of an attention kernel is its floating-point
# operations at this fraction of the device's peak; that of any other kernel is its stated operations at the
# full peak.
ATTENTION_UTILISATION = 0.5

ASSUMPTIONS = (
    "seconds are the compiler's own estimate for each instruction, times loop rounds, over the clock",
    f"attention kernels run at {ATTENTION_UTILISATION:.0%} of peak, and causality saves half of their work",
    "the kernels of decoding, which state no work, take the time of reading the whole cache",
    "collectives that the compiler runs during computation cost nothing; neither do input and checkpoints",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated time of a step and figures derived from it. None means unknown."""

    calibrated: bool  # False if the clock is not published
    compiled_seconds: float  # without Pallas kernels
    kernel_seconds: float
    unknown_kernels: int  # number of kernels that state no FLOPs; they are left out, except in decoding
    utilisation: float | None  # model FLOPs as a fraction of peak; causal attention counts half
    tokens_per_second: float  # of all chips together
    link_seconds: dict[str, float]  # minimum time to send the bytes of a step, by network
    read_seconds: float  # of decoding: minimum time to read the weights and the cache
    call_seconds: float  # of decoding: what a call takes beside its steps

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return max(self.compiled_seconds + self.kernel_seconds, self.read_seconds)


def estimate(
    analysis: Analysis,
    topology: Topology,
    peak_flops: float,
    devices: int,
    tokens: int,
    model_flops: float | None,
    cache_bytes: int | None = None,
) -> Estimate:
    """Estimate the time of a step.

    Args:
      analysis: The analysis of the program.
      topology: The topology that the program runs on.
      peak_flops: Dense bfloat16 FLOP/s of all devices together.
      devices: The number of devices.
      tokens: The number of tokens that a step processes.
      model_flops: The floating-point operations of the model in a step, or None if unknown.
      cache_bytes: The bytes of keys and values on one device, of which a step of decoding reads all. None if
        the program is not one of decoding, which makes any number of steps in a loop.
    """
    generation = topology.generation
    peak = peak_flops / devices
    kernel_seconds = sum(
        kernel.flops / peak / (ATTENTION_UTILISATION if kernel.attention else 1)
        for kernel in analysis.kernels
    )
    devices_a_chip = devices / topology.chips
    read_seconds = call_seconds = 0.0
    unknown = sum(not kernel.flops for kernel in analysis.kernels)
    if cache_bytes is not None:
        speed = generation.hbm_bytes_a_second / devices_a_chip
        read_seconds = (analysis.memory["parameters"] + cache_bytes) / speed
        call_seconds = analysis.cycles_outside / generation.clock
        kernel_seconds += cache_bytes / speed if unknown else 0
    compiled_seconds = analysis.cycles / generation.clock - call_seconds
    traffic = {"ici": 0.0, "dcn": 0.0}
    for collective in analysis.collectives:
        traffic["dcn" if "slice" in collective.axis else "ici"] += collective.bytes
    speeds = {"ici": generation.ici_bytes_a_second, "dcn": generation.dcn_bytes_a_second}
    link_seconds = {
        name: traffic[name] * devices_a_chip / speed
        for name, speed in speeds.items()
        if speed and traffic[name]
    }
    found = Estimate(
        calibrated=generation.clock_is_published,
        compiled_seconds=compiled_seconds,
        kernel_seconds=kernel_seconds,
        unknown_kernels=unknown,
        utilisation=None,
        tokens_per_second=math.inf,
        link_seconds=link_seconds,
        read_seconds=read_seconds,
        call_seconds=call_seconds,
    )
    if not (seconds := found.seconds):
        return found
    utilisation = model_flops / (seconds * peak_flops) if model_flops is not None else None
    return dataclasses.replace(found, utilisation=utilisation, tokens_per_second=tokens / seconds)


@dataclasses.dataclass(frozen=True)
class Budget:
    """The time and cost of a whole run."""

    tokens: float
    days: float
    chip_hours: float
    cost: float | None  # in the currency of the price


def budget(tokens: float, tokens_per_second: float, chips: int, price: float) -> Budget:
    """Computes the time and cost of processing `tokens`; `price` is per chip-hour, 0 if unknown."""
    seconds = tokens / tokens_per_second
    chip_hours = seconds / 3600 * chips
    return Budget(tokens, seconds / 86_400, chip_hours, chip_hours * price if price else None)
