"""The mesh, the table from logical axes to mesh axes, and arrays put on the mesh.

Parameters and activations name their axes by what they mean ("embed", "heads", "batch"). One table
says over which mesh axis each is split. The same code runs on one CPU device and on a pod.
"""

import math
from collections.abc import Sequence
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

# A multi-query model has one key/value head: it is copied to every tensor device rather than refused.
MAY_REPLICATE = frozenset({"kv_heads"})


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of axes slice, data, fsdp and tensor.

    Devices are in an order that keeps the last axes on neighbouring links. Each slice, which reaches the
    others only through the data-centre network, is one row of the first axis.

    Args:
      config: sizes of the axes.
      devices: those of the mesh, which need not be here; those of all processes of the job if left out.

    Raises:
      UserError: the axes do not fit the devices (see `gemma_jax.config.mesh_shape`) or their slices.
    """
    if devices is None:
        devices = _cpu_devices(config.cpu_devices) if config.cpu_devices else jax.devices()
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * len(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    # An axis of two may have to share a dimension of the torus with another: those of v5p-128 are 4 x 4 x 4.
    if slices <= 1:  # other devices can stand for several slices in tests
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
    """The devices of a mesh, those of TPUs along the fsdp axis in the order of their coordinates.

    jax may put them in a ring that winds through the torus; weights.fsdp goes along its dimensions. What lies
    beside each other on the tensor axis moves together.
    """
    if devices.flat[0].platform != "tpu":
        return devices
    ordered = devices.copy()
    for block in np.ndindex(devices.shape[:2]):  # of slice and data: [fsdp, tensor]
        places = [(device.coords, device.core_on_chip) for device in devices[block][:, 0]]
        ordered[block] = devices[block][sorted(range(len(places)), key=places.__getitem__)]
    return ordered


def _cpu_devices(count: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # jax has devices already: use what it has
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
    """`cpu`, `gpu` or `tpu`: of the mesh's devices, which need not be those of this machine."""
    return mesh.devices.flat[0].platform


def partition_spec(axes: Axes, shape: Sequence[int], mesh: Mesh, name: str) -> P:
    """How an array of `shape` with these logical axes is split over `mesh`.

    Args:
      axes: a logical axis for each dimension, or None for one that is never split.
      shape: sizes of the dimensions.
      mesh: the mesh.
      name: of the array, for messages.

    Raises:
      UserError: a mesh axis does not divide its dimension.
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
    """`x`, split over `mesh` as its logical axes say. Same code on every platform."""
    spec = partition_spec(axes, x.shape, mesh, "activation")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def parameter_name(path: tuple[Any, ...]) -> str:
    """`blocks.attention.q` from the key path of a leaf in a tree of parameters.

    The array of a dense weight, which is its only one, bears the name of the weight.
    """
    # An nnx.Variable is a node of its own in the tree, whose child is called `value`.
    keys = [key for key in path if key != jax.tree_util.GetAttrKey("value")]
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys]
    return ".".join(names).removesuffix(".array")


def named_arrays(tree: Any) -> Arrays:
    """The leaves of a tree by dotted name: the same names for values, shapes and shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {parameter_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return named


def with_arrays(tree: Tree, arrays: Arrays) -> Tree:
    """`tree` with each leaf replaced by the array of its name: the inverse of `named_arrays`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[parameter_name(path)], tree)


def logical_axes(variable: nnx.Variable[Any]) -> Axes:
    """The logical axes that a parameter was created with."""
    return tuple(variable.get_metadata("axes"))


def with_shardings(tree: Tree, mesh: Mesh, *, copy_other_ranks: bool = False) -> Tree:
    """A tree of abstract or real values as abstract arrays with shardings.

    Parameters carry logical axes, and so do the optimizer's moments, which optax makes of them; any
    other array (a step count) is copied to every device.

    Args:
      tree: of parameters, or of an optimizer's state.
      mesh: the mesh.
      copy_other_ranks: copy to every device what has a parameter's axes but another rank, as Adafactor's
        statistics of rows and columns do, instead of raising an error.

    Raises:
      UserError: the mesh does not divide a parameter.
      ValueError: an array's rank is not that of its logical axes.
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
    """Of arrays [B, ...] whose rows are split over the mesh."""
    return NamedSharding(mesh, P(RULES["batch"]))


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Rows of a global batch that this process's devices hold, ascending."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = {row for index in indices.values() if index for row in range(*index[0].indices(batch_size))}
    return sorted(rows)


def put_batch(batch: Tree, batch_size: int, mesh: Mesh) -> Tree:
    """A batch of this process's rows (numpy) as global arrays [batch_size, ...] on the mesh."""
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

    return jax.tree.map(put, batch)
