"""The device mesh, the table from logical axes to mesh axes, and the placement of arrays on the mesh.

Parameters and activations name their axes by their meaning ("embed", "heads", "batch"). One table
defines over which mesh axes each logical axis is split. The same code runs on one CPU device and on a pod.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.config import MESH_AXES, MeshConfig, mesh_shape
from gemma_jax.errors import UserError

Tree = TypeVar("Tree")
Axes = tuple[str | None, ...]
Arrays = dict[str, Any]

DRIVER = Path("/proc/driver/nvidia/version")
# The first major version of the driver by that of CUDA (docs.nvidia.com/deploy/cuda-compatibility).
LEAST_DRIVERS = {12: 525, 13: 580}

# Logical axis -> mesh axes that split it. Batches are split over slice, data and fsdp, parameters over fsdp
# (fully sharded data parallelism) and tensor (Megatron's split of heads and feed-forward).
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    # activations
    "batch": ("slice", "data", "fsdp"),
    "length": (),
    "residual": (),
}

# Logical axes that may be copied instead of split: a multi-query model has one key/value head, which every
# device of the tensor axis holds.
MAY_REPLICATE = frozenset({"kv_heads"})


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates the mesh with the axes slice, data, fsdp and tensor.

    The order of the devices keeps the last axes on neighbouring links. Each slice, which reaches the others
    only through the data-centre network, is one index of the first axis.

    Args:
      config: The sizes of the axes.
      devices: The devices of the mesh, which need not be in this machine; by default those of all processes
        of the job.

    Raises:
      UserError: the axes do not fit the devices (see `gemma_jax.config.mesh_shape`) or their slices; or the
        driver of GPUs is too old, so that jax would compute on the CPU.
    """
    if devices is None:
        devices = _cpu_devices(config.cpu_devices) if config.cpu_devices else _local_devices()
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * len(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    # Two mesh axes may have to share a dimension of the torus. For example, an axis of size 2 does not fill a
    # dimension of v5p-128, whose torus is 4 x 4 x 4.
    if slices <= 1:  # in tests, devices that are not TPUs can stand for several slices
        ordered = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif config.slice != slices:
        raise UserError(
            f"mesh.slice is {config.slice}, but the devices are on {slices} slices; set it to that."
        )
    else:
        ordered = create_hybrid_device_mesh(
            (1, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(_row_major(ordered), MESH_AXES, axis_types=types)


def _row_major(devices: np.ndarray) -> np.ndarray:
    """Returns the devices of a mesh; TPUs are sorted along the fsdp axis by their coordinates.

    jax may order them as a ring that winds through the torus, but weights.fsdp communicates along one
    dimension of the torus after the other. Devices that are neighbours on the tensor axis move together.
    """
    if devices.flat[0].platform != "tpu":
        return devices
    ordered = devices.copy()
    for block in np.ndindex(devices.shape[:2]):  # of slice and data: [fsdp, tensor]
        places = [(device.coords, device.core_on_chip) for device in devices[block][:, 0]]
        ordered[block] = devices[block][sorted(range(len(places)), key=places.__getitem__)]
    return ordered


def _local_devices() -> Sequence[jax.Device]:
    """Returns the devices that jax finds by itself, GPUs with most of their memory rather than 75%."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name, which jax lets nobody mix
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    try:
        devices = jax.devices()
    except RuntimeError:
        _check_driver()
        raise
    if devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        _check_driver()
    return devices


def _check_driver(driver: Path = DRIVER) -> None:
    """Raises UserError if the machine has GPUs whose driver is too old for the installed CUDA."""
    found = re.search(r"Kernel Module.*?\s(\d+)\.", driver.read_text()) if driver.exists() else None
    cudas = [cuda for cuda in LEAST_DRIVERS if importlib.util.find_spec(f"jax_cuda{cuda}_plugin")]
    if found and cudas and all(int(found[1]) < LEAST_DRIVERS[cuda] for cuda in cudas):
        cuda, least = cudas[0], LEAST_DRIVERS[cudas[0]]
        remedy = "install gemma_jax[cuda12], " if cuda == 13 and int(found[1]) >= LEAST_DRIVERS[12] else ""
        raise UserError(
            f"the NVIDIA driver is of version {found[1]}, but jax for CUDA {cuda} needs {least} or later; "
            f"update the driver, {remedy}or set JAX_PLATFORMS=cpu."
        )


def _cpu_devices(count: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # jax is already initialised: use the devices that it has
        pass
    processes = jax.process_count()
    if count % processes:
        raise UserError(
            f"mesh.cpu_devices is {count}, which the {processes} processes of the job do not divide."
        )
    devices: list[jax.Device] = []
    for process in range(processes):
        own = [device for device in jax.devices("cpu") if device.process_index == process]
        devices += own[: count // processes]
    if len(devices) < count:
        raise UserError(
            f"mesh.cpu_devices is {count}, but this process already runs jax with {len(devices)}; "
            "make the mesh before any other use of jax, or start a new process."
        )
    return devices


def platform(mesh: Mesh) -> str:
    """Returns the platform (`cpu`, `gpu` or `tpu`) of the mesh's devices, which may be in other machines."""
    return mesh.devices.flat[0].platform


def partition_spec(axes: Axes, shape: Sequence[int], mesh: Mesh, name: str) -> P:
    """Returns how an array of `shape` with these logical axes is split over `mesh`.

    Args:
      axes: The logical axis of each dimension, or None for a dimension that is never split.
      shape: The sizes of the dimensions.
      mesh: The mesh.
      name: The name of the array, for messages.

    Raises:
      UserError: a mesh axis does not divide its dimension.
      ValueError: the array's rank is not the number of logical axes.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {tuple(shape)} but logical axes {axes}")
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = () if axis is None else RULES[axis]
        parts = math.prod(mesh.shape[m] for m in mesh_axes)
        if size % parts and (size == 1 or axis in MAY_REPLICATE):
            mesh_axes = ()
        elif size % parts:
            raise UserError(
                f"{name}: axis {axis!r} of size {size} is not divisible by mesh axis "
                f"{' x '.join(mesh_axes)} of size {parts}; choose a mesh that divides it."
            )
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return P(*entries)


def constrain(x: jax.Array, axes: Axes, mesh: Mesh) -> jax.Array:
    """Returns `x` with the sharding over `mesh` that its logical axes define. Works on every platform."""
    spec = partition_spec(axes, x.shape, mesh, "activation")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def parameter_name(path: tuple[Any, ...]) -> str:
    """Returns a dotted name, such as `blocks.attention.q`, from the key path of a leaf of a parameter tree.

    A dense weight has only one array, and that array has the name of the weight.
    """
    # An nnx.Variable is a separate node in the tree; its child is called `value`.
    keys = [key for key in path if key != jax.tree_util.GetAttrKey("value")]
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys]
    return ".".join(names).removesuffix(".array")


def named_arrays(tree: Any) -> Arrays:
    """Returns the leaves of a tree by dotted name: the same names for values, shapes and shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {parameter_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return named


def with_arrays(tree: Tree, arrays: Arrays) -> Tree:
    """Returns `tree` with each leaf replaced by the array of its name: the inverse of `named_arrays`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[parameter_name(path)], tree)


def logical_axes(variable: nnx.Variable[Any]) -> Axes:
    """Returns the logical axes that a parameter was created with."""
    return tuple(variable.get_metadata("axes"))


def with_shardings(tree: Tree, mesh: Mesh, *, copy_other_ranks: bool = False) -> Tree:
    """Returns a tree of abstract or real values as abstract arrays with shardings.

    Parameters carry logical axes, and so do the optimizer's moments, which optax makes from them. Any
    other array (a step count) is copied to every device.

    Args:
      tree: A tree of parameters, or an optimizer's state.
      mesh: The mesh.
      copy_other_ranks: Whether to copy to every device an array that has a parameter's axes but another rank,
        such as Adafactor's statistics of rows and columns, instead of raising an error.

    Raises:
      UserError: a mesh axis does not divide a parameter's dimension.
      ValueError: an array's rank is not the number of its logical axes.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
        axes = logical_axes(leaf) if isinstance(leaf, nnx.Variable) else None

        def of_array(array: Any) -> jax.ShapeDtypeStruct:
            spec = P()
            if axes is not None and (len(array.shape) == len(axes) or not copy_other_ranks):
                spec = partition_spec(axes, array.shape, mesh, parameter_name(path))
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(of_array, leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [B, ...] that splits their rows over the mesh."""
    return NamedSharding(mesh, P(RULES["batch"]))


def row_parts(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Returns the indices, ascending, of the rows of a global batch that this process's devices hold."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for index in indices.values() if index for row in range(*index[0].indices(batch_size))}
    return sorted(rows)


def put_batch(batch: Tree, batch_size: int, mesh: Mesh) -> Tree:
    """Puts this process's rows (numpy) of a batch on the mesh, as global arrays [batch_size, ...]."""
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

    return jax.tree.map(put, batch)
