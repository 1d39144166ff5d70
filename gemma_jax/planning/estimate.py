"""Converts cycles to seconds, utilisation, days and cost: a model, whose assumptions are in ASSUMPTIONS."""

import dataclasses
import math
from collections.abc import Mapping

from gemma_jax.planning.analysis import Analysis
from gemma_jax.planning.gpu import GpuTopology
from gemma_jax.planning.topology import AnyTopology

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
GPU_ASSUMPTIONS = (
    "seconds are a roofline: each instruction takes the longer of its operations at the chip's peak and its "
    "bytes at the memory's bandwidth",
    *ASSUMPTIONS[1:2],
    "collectives run during computation, at the full speed of their network: the longer of the two counts",
    "starting kernels, input and checkpoints cost nothing",
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
    wait_seconds: float  # on GPU: minimum time of all collectives together; for TPU it is in the cycles

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return max(self.compiled_seconds + self.kernel_seconds, self.read_seconds, self.wait_seconds)


def estimate(
    analysis: Analysis,
    topology: AnyTopology,
    peak_flops: float,
    mesh_shape: Mapping[str, int],
    tokens: int,
    model_flops: float | None,
    cache_bytes: int | None = None,
) -> Estimate:
    """Estimate the time of a step.

    Args:
      analysis: The analysis of the program.
      topology: The topology that the program runs on.
      peak_flops: Dense bfloat16 FLOP/s of all devices together.
      mesh_shape: The sizes of the mesh axes.
      tokens: The number of tokens that a step processes.
      model_flops: The floating-point operations of the model in a step, or None if unknown.
      cache_bytes: The bytes of keys and values on one device, of which a step of decoding reads all. None if
        the program is not one of decoding, which makes any number of steps in a loop.
    """
    devices = math.prod(mesh_shape.values())
    peak = peak_flops / devices
    kernel_seconds = sum(
        kernel.flops / peak / (ATTENTION_UTILISATION if kernel.attention else 1)
        for kernel in analysis.kernels
    )
    devices_a_chip = devices / topology.chips
    read_seconds = call_seconds = 0.0
    unknown = sum(not kernel.flops for kernel in analysis.kernels)
    if cache_bytes is not None:
        speed = topology.bandwidth / devices_a_chip
        read_seconds = (analysis.memory["parameters"] + cache_bytes) / speed
        call_seconds = analysis.cycles_outside / topology.clock
        kernel_seconds += cache_bytes / speed if unknown else 0
    compiled_seconds = analysis.cycles / topology.clock - call_seconds
    speeds = topology.networks
    traffic = dict.fromkeys(speeds, 0.0)
    for collective in analysis.collectives:
        traffic[topology.network_of(collective.axis, mesh_shape)] += collective.bytes
    link_seconds = {
        name: traffic[name] * devices_a_chip / speed
        for name, speed in speeds.items()
        if speed and traffic[name]
    }
    found = Estimate(
        calibrated=topology.clock_is_published,
        compiled_seconds=compiled_seconds,
        kernel_seconds=kernel_seconds,
        unknown_kernels=unknown,
        utilisation=None,
        tokens_per_second=math.inf,
        link_seconds=link_seconds,
        read_seconds=read_seconds,
        call_seconds=call_seconds,
        wait_seconds=sum(link_seconds.values()) if isinstance(topology, GpuTopology) else 0.0,
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
