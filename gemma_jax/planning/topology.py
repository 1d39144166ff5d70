"""TPU slices and GPUs by their common names, and the published figures of TPU chips."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

from gemma_jax.errors import UserError
from gemma_jax.planning.gpu import CHIPS, GpuTopology, parse_gpus


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU generation. Figures are for one chip, from docs.cloud.google.com/tpu/docs/NAME."""

    name: str  # the name that libtpu uses
    dimensions: int  # number of dimensions of the torus of chips
    cores_a_chip: int  # TensorCores, which names count: v5p-128 has 64 chips, v5e-256 has 256
    hbm_gib: int
    hbm_bytes_a_second: float
    most_chips: int  # in one slice
    clock: float  # cycles per second of a TensorCore
    clock_is_published: bool
    # Bytes per second that a chip receives over all its ICI links, and over its share of the DCN (the
    # data-centre network).
    ici_bytes_a_second: float | None
    dcn_bytes_a_second: float | None


# The clocks marked as published are computed from the published peak, with 4 matrix units per core; for v4
# the clock itself is published too, 1.05 GHz (Jouppi et al., 2023, table 4). The documents name both 2 and 4
# matrix units for v6e, and none for tpu7x. For these two, the clock is the one at which the compiler's cycles
# (libtpu 0.0.42.1) for one large matmul, [8192, 2048] by [2048, 16384] in bfloat16, match the published peak.
# For the other generations this method results in clocks that are 2% too high (benchmarks/LOG.md).
_FLOPS_A_CYCLE = 4 * 128 * 128 * 2  # per TensorCore
GENERATIONS = {
    "v4": Generation("v4", 3, 2, 32, 1200e9, 4096, 275e12 / (2 * _FLOPS_A_CYCLE), True, None, None),
    "v5e": Generation("v5e", 2, 1, 16, 819e9, 256, 197e12 / _FLOPS_A_CYCLE, True, 200e9, 6.4e12 / 8 / 256),
    "v5p": Generation("v5p", 3, 2, 95, 2765e9, 8960, 459e12 / (2 * _FLOPS_A_CYCLE), True, 600e9, 50e9 / 8),
    "v6e": Generation("v6e", 2, 1, 32, 1638e9, 256, 2.222e9, False, 400e9, 100e9 / 8),
    "tpu7x": Generation("tpu7x", 3, 2, 192, 7380e9, 9216, 2.476e9, False, 600e9, 100e9 / 8),
}
MOST_SLICES = 256
OTHER_NAMES = {"v5litepod": "v5e", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU generation, and the number of such slices in a job."""

    generation: Generation
    layout: tuple[int, ...]  # chips along each dimension of the torus
    slices: int

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return self.slices * math.prod(self.layout)

    @property
    def memory(self) -> int:
        """Bytes that a program may take on a chip."""
        return self.generation.hbm_gib * 2**30

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a chip's memory."""
        return self.generation.hbm_bytes_a_second

    @property
    def clock(self) -> float:
        """Cycles per second of a TensorCore."""
        return self.generation.clock

    @property
    def clock_is_published(self) -> bool:
        """Whether the clock is published, or computed from what the compiler says."""
        return self.generation.clock_is_published

    @property
    def networks(self) -> dict[str, float | None]:
        """Bytes per second that a chip receives, by network; None if unknown."""
        return {"ici": self.generation.ici_bytes_a_second, "dcn": self.generation.dcn_bytes_a_second}

    def network_of(self, axes: str, mesh_shape: Mapping[str, int]) -> str:
        """Returns the network of a collective over these mesh axes, joined by ` x `."""
        return "dcn" if "slice" in axes else "ici"

    @property
    def compiler_name(self) -> str:
        """The name of a slice for libtpu, such as v5e:16x16."""
        return f"{self.generation.name}:{'x'.join(map(str, self.layout))}"

    def __str__(self) -> str:
        name = f"{self.generation.name}-{math.prod(self.layout) * self.generation.cores_a_chip}"
        return f"{self.slices} x {name}" if self.slices > 1 else name


AnyTopology = Topology | GpuTopology


def parse_topology(name: str, slices: int = 1) -> AnyTopology:
    """Returns the topology that a name stands for.

    Args:
      name: A name as in the cloud's documents, such as `v5e-256`, `v5litepod-256` or `v5p-128` (which counts
        TensorCores, so it has 64 chips), or a generation with a layout of chips, such as `v5p-4x4x8`; or of
        GPUs, such as `h100-8` or `2x h100-8`.
      slices: The number of such slices or nodes, connected by the data-centre network.

    Raises:
      UserError: There is no such chip, or it has no slice of that size, or `slices` is out of range.
    """
    if gpus := parse_gpus(name, slices):
        return gpus
    match = re.fullmatch(r"([a-z0-9]+)[-:](\d{1,18}(?:x\d{1,18})*)", name.strip().lower())
    generation = GENERATIONS.get(OTHER_NAMES.get(match[1], match[1])) if match else None
    if match is None or generation is None:
        raise UserError(
            f"topology {name!r} is not known; give a TPU ({', '.join(GENERATIONS)}) or GPU "
            f"({', '.join(CHIPS)}) and a size, such as v5e-256, v5p-4x4x8, h100-8 or 2x h100-8."
        )
    if not 1 <= slices <= MOST_SLICES:
        raise UserError(f"slices is {slices}, but must be from 1 to {MOST_SLICES}.")
    numbers = [int(number) for number in match[2].split("x")]
    by_number = len(numbers) == 1
    most = generation.most_chips * (generation.cores_a_chip if by_number else 1)
    if len(numbers) not in (1, generation.dimensions) or not 0 < math.prod(numbers) <= most:
        raise UserError(
            f"topology {name!r} does not exist: a slice of {generation.name} has {generation.dimensions} "
            f"dimensions and at most {generation.most_chips} chips."
        )
    layout = _layout(generation, numbers[0], name) if by_number else tuple(numbers)
    return Topology(generation, layout, slices)


def _layout(generation: Generation, number: int, name: str) -> tuple[int, ...]:
    """Returns the most cube-like layout of a slice that is named by a number."""
    chips, rest = divmod(number, generation.cores_a_chip)
    if rest:
        raise UserError(
            f"topology {name!r} does not exist: {generation.name} is named by its TensorCores, "
            f"{generation.cores_a_chip} a chip."
        )
    divisors = [d for d in range(1, chips + 1) if chips % d == 0]
    boxes = itertools.combinations_with_replacement(divisors, generation.dimensions)
    layouts = [layout for layout in boxes if math.prod(layout) == chips]
    if generation.dimensions == 3 and chips == 4:
        layouts = [(2, 2, 1)]  # one host
    elif generation.dimensions == 3 and chips >= 64:  # built from cubes of 4 x 4 x 4 chips
        layouts = [layout for layout in layouts if all(size % 4 == 0 for size in layout)]
    layouts = [layout for layout in layouts if max(layout) <= 2 * min(layout)]
    if not layouts:
        raise UserError(
            f"topology {name!r} does not exist: {chips} chips of {generation.name} make no slice; "
            f"give the layout itself, such as {generation.name}-{'x'.join(['4'] * generation.dimensions)}."
        )
    return min(layouts, key=lambda layout: (sum(layout), layout))
