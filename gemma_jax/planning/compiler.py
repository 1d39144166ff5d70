"""The TPU compiler on a machine without a TPU: topologies as devices, and programs compiled for them."""

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
from gemma_jax.planning.topology import Topology

if TYPE_CHECKING:
    import jax

# libtpu would ask the metadata server of a TPU machine, which this is not, and wait; and it takes a lock that
# is for the owner of a real TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compiler_version() -> str:
    """Of libtpu and jax, which decide what a program is compiled to.

    Raises:
      UserError: libtpu is not installed.
    """
    given = os.environ.get("TPU_LIBRARY_PATH")  # jax looks there first, and sets it to the installed package
    places = [str(Path(given).parents[1])] if given else sys.path
    package = next(iter(importlib.metadata.distributions(name="libtpu", path=places)), None)
    if package is None and not given:
        raise UserError(
            "planning needs the TPU compiler, the package libtpu, which is not installed; "
            "install it with: pip install 'gemma_jax[tpu]' (no TPU is needed)."
        )
    library = package.version if package else f"{given} of {os.path.getsize(str(given)):,} bytes"
    return f"libtpu {library}, jax {importlib.metadata.version('jax')}"


def prepare() -> None:
    """Set up this process for compiling; to be called before jax is imported, or where it runs on CPU.

    Raises:
      UserError: libtpu is not installed.
    """
    compiler_version()
    os.environ.update(ENVIRONMENT)
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"  # a plan needs no accelerator, also where there is one


def devices_of(topology: Topology) -> "list[jax.Device]":
    """The devices of slices that need not exist. A device is a chip, but of tpu7x one TensorCore.

    Raises:
      UserError: the compiler knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    layout = topology.layout + (1,) * (3 - len(topology.layout))
    host = (2, 2, 1)
    options: dict[str, object] = {}
    if any(size % along for size, along in zip(layout, host, strict=True)):
        options["chips_per_host_bounds"] = list(layout)  # smaller than a host of four chips
    if topology.generation.name == "v4":
        # As real jobs run: both TensorCores of a chip as one device. jax makes meshes of v4 only so.
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
    """A program needs more memory than a device has."""

    def __init__(self, needed: int | None, available: int | None, message: str) -> None:
        super().__init__(message)
        self.needed = needed  # bytes per device; None where the compiler does not say
        self.available = available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as the compiler made it; sizes in bytes a device."""

    text: str
    arguments: int
    outputs: int
    aliased: int  # of the outputs: those that take the place of arguments
    temporaries: int


def compile_lowered(lowered: "jax.stages.Lowered", options: Mapping[str, str]) -> Compiled:
    """Compile for the devices that a program was lowered for.

    Memory is what XLA's buffer assignment says. `cost_analysis` is not asked: it counts bodies of loops once.

    Raises:
      OutOfMemory: it does not fit.
      UserError: an option that the compiler does not know.
    """
    import jax

    # jax could keep what is compiled, but not read it again: there is no client of such devices.
    keeps = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        compiled = lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            raise OutOfMemory(*memory_told(message), message) from error
        if "No such compile option" in message:
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
    """Bytes that a program needs and that there are, from the compiler's refusal; None where it has none."""
    for form in (rf"Used {_SIZE} of {_SIZE} hbm", rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"):
        if found := re.search(form, message):
            used, used_unit, of, of_unit = found.groups()
            return int(float(used) * _UNITS[used_unit]), int(float(of) * _UNITS[of_unit])
    return None, None
