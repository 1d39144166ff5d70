"""NVIDIA GPUs by their common names, the published figures of their chips, and their description for XLA."""

import dataclasses
import math
import re
from collections.abc import Mapping

from gemma_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU. The numbers of operations and bytes are those of NVIDIA's data sheets, without sparsity.

    The rest describes the chip to the compiler: CUDA C++ Programming Guide, technical specifications for each
    compute capability; for A100, H100 and H200 as in XLA's own specifications of them
    (openxla/xla, xla/backends/gpu/target_config/specs).
    """

    title: str  # as the driver calls it, which is jax.Device.device_kind
    capability: tuple[int, int]
    memory: int  # bytes that the driver reports
    bandwidth: float  # bytes per second of its memory
    flops: float  # a second, of bfloat16 or float16; int8 has twice as many
    float32_flops: float  # a second, outside the tensor cores
    link: float  # bytes a second that a GPU receives from the others of its node: NVLink, or PCIe
    network: float | None  # bytes a second that a GPU receives from other nodes, in NVIDIA's DGX
    cores: int  # streaming multiprocessors
    l2_mib: int  # of the cache
    clock_ghz: float

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bfloat16, as GPUs do from Ampere on."""
        return self.capability >= (8, 0)


_MIB = 2**20
CHIPS = {
    "a100-40": Chip(
        "NVIDIA A100-SXM4-40GB", (8, 0), 42331013120, 1555e9, 312e12, 19.5e12, 300e9, 25e9, 108, 40, 1.41
    ),
    "a100-80": Chip(
        "NVIDIA A100-SXM4-80GB", (8, 0), 85100068864, 2039e9, 312e12, 19.5e12, 300e9, 25e9, 108, 40, 1.41
    ),
    "h100": Chip(
        "NVIDIA H100 80GB HBM3", (9, 0), 84942979072, 3352e9, 989e12, 66.9e12, 450e9, 50e9, 132, 50, 1.98
    ),
    "h200": Chip("NVIDIA H200", (9, 0), 150754820096, 4800e9, 989e12, 66.9e12, 450e9, 50e9, 132, 50, 1.98),
    "l4": Chip("NVIDIA L4", (8, 9), 23034 * _MIB, 300e9, 121e12, 30.3e12, 32e9, None, 58, 48, 2.04),
    "t4": Chip("Tesla T4", (7, 5), 15360 * _MIB, 320e9, 65e12, 8.1e12, 16e9, None, 40, 4, 1.59),
    "rtx-4090": Chip(
        "NVIDIA GeForce RTX 4090", (8, 9), 24564 * _MIB, 1008e9, 165e12, 82.6e12, 32e9, None, 128, 72, 2.52
    ),
}
# By compute capability: bytes of shared memory of a multiprocessor, threads and float32 units in it. A block
# of threads may have all of this memory but 1 KiB.
_OF_CAPABILITY = {
    (7, 5): (65536 + 1024, 1024, 64),
    (8, 0): (167936, 2048, 64),
    (8, 9): (102400, 1536, 128),
    (9, 0): (233472, 2048, 128),
}
MOST_GPUS, MOST_NODES = 16, 256  # of a node, and of a job
USABLE = 0.9  # of the memory: the rest is for CUDA itself, NCCL, and holes between arrays


@dataclasses.dataclass(frozen=True)
class GpuTopology:
    """Nodes of GPUs of one kind."""

    name: str  # of CHIPS
    gpus: int  # of a node
    slices: int  # nodes
    clock = 1e9  # the roofline counts in nanoseconds
    clock_is_published = True

    @property
    def chip(self) -> Chip:
        """The kind of GPU."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """The number of GPUs in all nodes."""
        return self.slices * self.gpus

    @property
    def memory(self) -> int:
        """Bytes that a program may take on a GPU."""
        return int(USABLE * self.chip.memory)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a GPU's memory."""
        return self.chip.bandwidth

    @property
    def networks(self) -> dict[str, float | None]:
        """Bytes per second that a GPU receives, by network; None if unknown."""
        return {"node": self.chip.link, "network": self.chip.network}

    def network_of(self, axes: str, mesh_shape: Mapping[str, int]) -> str:
        """Returns the network of a collective over these mesh axes, joined by ` x `.

        The devices of a mesh are in order, so that the last axes are within a node.
        """
        names = list(mesh_shape)
        first = min(names.index(axis) for axis in axes.split(" x "))
        span = math.prod(mesh_shape[name] for name in names[first:])
        return "node" if self.gpus % span == 0 else "network"

    @property
    def compiler_name(self) -> str:
        """The nodes, the hosts of each and the GPUs of each host, as XLA names them."""
        return f"{self.slices}x1x{self.gpus}"

    @property
    def target(self) -> str:
        """The description of the GPU for XLA: a GpuTargetConfigProto in text form."""
        chip = self.chip
        shared, threads, units = _OF_CAPABILITY[chip.capability]
        major, minor = chip.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared - 1024}
              shared_memory_per_core: {shared}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              core_count: {chip.cores} fpus_per_core: {units} clock_rate_ghz: {chip.clock_ghz}
              memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {chip.l2_mib * _MIB}
              device_memory_size: {chip.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{chip.title}"
        """

    def __str__(self) -> str:
        name = f"{self.name}-{self.gpus}"
        return f"{self.slices} x {name}" if self.slices > 1 else name


def parse_gpus(name: str, slices: int = 1) -> GpuTopology | None:
    """Returns the GPUs that a name stands for, such as `h100-8`, `l4`, `a100-80-4` or `2x h100-8`.

    Args:
      name: The name; `2x` in front stands for two nodes.
      slices: The number of nodes, if the name does not have it.

    Returns:
      The topology, or None if the name is of no known GPU.

    Raises:
      UserError: There is no such number of GPUs or nodes.
    """
    match = re.fullmatch(rf"(?:(\d{{1,9}}) ?x ?)?({'|'.join(CHIPS)})(?:-(\d{{1,9}}))?", name.strip().lower())
    if match is None:
        return None
    nodes, gpus = int(match[1] or slices), int(match[3] or 1)
    if not 1 <= gpus <= MOST_GPUS or not 1 <= nodes <= MOST_NODES:
        raise UserError(
            f"topology {name!r} is of {nodes} nodes of {gpus} GPUs, but a node has from 1 to {MOST_GPUS} of "
            f"them and a job at most {MOST_NODES} nodes; several nodes are written 2x {match[2]}-8."
        )
    if match[1] and slices not in (1, nodes):
        raise UserError(f"topology {name!r} is of {nodes} nodes, but slices is {slices}; leave slices out.")
    return GpuTopology(match[2], gpus, nodes)
