"""Runs the compilers for TPU and GPU without either: makes the devices of a topology, compiles for them."""

import dataclasses
import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_jax.errors import UserError
from gemma_jax.planning.gpu import GpuTopology
from gemma_jax.planning.topology import AnyTopology

if TYPE_CHECKING:
    import jax

# Without these, libtpu would wait for the metadata server of a TPU machine, which does not exist here, and
# would take a lock that is meant for the owner of a real TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# jax hides GPUs from the plugin whose compiler is used here, if there are any.
GPU_PACKAGES = (
    ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"),
    ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
)
GPU_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1"}
# The compiler cannot time kernels without a GPU, so it takes those that it expects to be fast.
GPU_OPTIONS = {"xla_gpu_autotune_level": "0"}


def compiler_version(topology: AnyTopology) -> str:
    """Returns the versions of the compiler and jax, which determine what a program is compiled to.

    Raises:
      UserError: The compiler is not installed, or not for this jax.
    """
    if isinstance(topology, GpuTopology):
        return _gpu_compiler_version()
    given = os.environ.get("TPU_LIBRARY_PATH")  # jax looks here first, and sets it to the installed package
    places = [str(Path(given).parents[1])] if given else sys.path
    package = next(iter(importlib.metadata.distributions(name="libtpu", path=places)), None)
    if package is None and not given:
        raise UserError(
            "planning needs the TPU compiler, the package libtpu, which is not installed; "
            "install it with: pip install 'gemma_jax[tpu]' (no TPU is needed)."
        )
    library = package.version if package else f"{given} of {os.path.getsize(str(given)):,} bytes"
    return f"libtpu {library}, jax {importlib.metadata.version('jax')}"


def _gpu_compiler_version() -> str:
    wanted = importlib.metadata.version("jax")
    for packages in GPU_PACKAGES:
        found = {name: version for name in packages if (version := _version_of(name))}
        if len(found) == len(packages):
            break
    else:
        raise UserError(
            f"planning for GPUs needs the compiler, the packages {', '.join(GPU_PACKAGES[0])}, which are not "
            "all installed; install them with: pip install 'gemma_jax[gpu-compiler]' (no GPU is needed)."
        )
    plugin, version = next(iter(found.items()))
    if version != wanted:
        raise UserError(f"{plugin} is {version}, but jax is {wanted}; install {plugin}=={wanted}.")
    return ", ".join(f"{name} {version}" for name, version in [*found.items(), ("jax", wanted)][1:])


def _version_of(package: str) -> str | None:
    found = next(iter(importlib.metadata.distributions(name=package)), None)
    return found.version if found else None


def prepare(topology: AnyTopology) -> None:
    """Set up this process for compiling. Call it before jax is imported, unless jax already runs on CPU.

    Raises:
      UserError: The compiler is not installed.
    """
    compiler_version(topology)
    os.environ.update(GPU_ENVIRONMENT if isinstance(topology, GpuTopology) else ENVIRONMENT)
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"  # planning never needs an accelerator, even if there is one


def devices_of(topology: AnyTopology) -> "list[jax.Device]":
    """Returns the devices of a topology that need not exist. A device is a chip, or a TensorCore for tpu7x.

    Raises:
      UserError: The compiler knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    if isinstance(topology, GpuTopology):
        described = topologies.get_topology_desc(
            platform="cuda", target_config=topology.target, topology=topology.compiler_name
        )
        return list(described.devices)
    layout = topology.layout + (1,) * (3 - len(topology.layout))
    options: dict[str, object] = {}
    if layout[0] % 2 or layout[1] % 2:
        options["chips_per_host_bounds"] = list(layout)  # the slice is smaller than a host of four chips
    if topology.generation.name == "v4":
        # As in real jobs, both TensorCores of a chip are one device; jax can build v4 meshes only this way.
        options["chip_config_name"] = "megacore"
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.compiler_name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        raise UserError(f"the compiler refuses {topology.compiler_name}: {message}") from error
    return list(described.devices)


class OutOfMemory(Exception):
    """Raised when a program needs more memory than a device has."""

    def __init__(self, needed: int | None, available: int | None, message: str) -> None:
        super().__init__(message)
        self.needed = needed  # bytes per device; None if the compiler does not report them
        self.available = available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program; sizes are in bytes per device."""

    text: str
    arguments: int
    outputs: int
    aliased: int  # outputs that reuse the memory of arguments
    temporaries: int


def compile_lowered(lowered: "jax.stages.Lowered", options: Mapping[str, str]) -> Compiled:
    """Compile a program for the devices that it was lowered for.

    Memory sizes come from XLA's buffer assignment. `cost_analysis` is not used, because it counts the body of
    a loop only once.

    Raises:
      OutOfMemory: The program does not fit.
      UserError: The compiler does not know an option.
    """
    import jax

    # Turn off jax's cache: it could save the program but not load it again, as these devices have no client.
    keeps = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        compiled = lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message and "Shared memory" not in message:
            raise OutOfMemory(*memory_told(message), message) from error
        if "No such compile option" in message or "While setting option" in message:
            raise UserError(f"the compiler refuses an option: {message.splitlines()[0]}") from error
        raise
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", keeps)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None  # the TPU compiler returns both
    return Compiled(
        text,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def memory_told(message: str) -> tuple[int | None, int | None]:
    """Parses the needed and the available bytes from the compiler's error; None for each if not stated."""
    for form in (rf"Used {_SIZE} of {_SIZE} hbm", rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"):
        if found := re.search(form, message):
            used, used_unit, of, of_unit = found.groups()
            return int(float(used) * _UNITS[used_unit]), int(float(of) * _UNITS[of_unit])
    return None, None
