"""Fully sharded data parallelism: weights are gathered for use, gradients summed into their parts.

Left to itself XLA sums a gradient over a whole slice of TPUs as an all-reduce, of which each device then
throws most away: twice the traffic. The TPU compiler scatters a sum along one dimension of the torus, and not
into narrow parts of the last dimension of an array (benchmarks/LOG.md). So the functions here run along one
dimension of the torus after the other, with the parts first; after the first stage there is little left to
send.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from gemma_jax.sharding import RULES, platform

AXIS = "fsdp"


def stages(mesh: Mesh) -> tuple[int, ...]:
    """Sizes of the dimensions of the torus that the fsdp axis runs through, the outer one first.

    One stage where the devices have no coordinates, or do not fill a box in their order.
    """
    size = mesh.shape[AXIS]
    if platform(mesh) != "tpu":
        return (size,)
    line = mesh.devices.reshape(-1, size, mesh.shape["tensor"])[0, :, 0]
    places = [(*device.coords, device.core_on_chip) for device in line]
    sizes = [len(set(along)) for along in zip(*places, strict=True)]
    fills = math.prod(sizes) == size and places == sorted(places)
    return tuple(n for n in sizes if n > 1) if fills and size > 1 else (size,)


def _groups(sizes: tuple[int, ...]) -> list[list[list[int]]]:
    """For each stage, the groups of numbers on the axis that differ in its dimension alone."""
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return [np.moveaxis(numbers, i, -1).reshape(-1, size).tolist() for i, size in enumerate(sizes)]


def gather(part: jax.Array, dimension: int, sizes: tuple[int, ...]) -> jax.Array:
    """Inside a `shard_map`: the array whose parts along `dimension` are on the devices of the fsdp axis."""
    part = jnp.moveaxis(part, dimension, 0)
    rows, rest = part.reshape(len(part), -1), part.shape[1:]
    for groups in reversed(_groups(sizes)):
        rows = lax.all_gather(rows, AXIS, tiled=True, axis_index_groups=groups)
    return jnp.moveaxis(rows.reshape(-1, *rest), 0, dimension)


def scatter_sum(whole: jax.Array, dimension: int, sizes: tuple[int, ...]) -> jax.Array:
    """Inside a `shard_map`: this device's part along `dimension` of the sum over the devices of a batch."""
    whole = jnp.moveaxis(whole, dimension, 0)
    rows, rest = whole.reshape(len(whole), -1), whole.shape[1:]
    for size, groups in zip(sizes, _groups(sizes), strict=True):
        # A matrix stored with its rows last, or whose parts are no whole tiles, would be summed whole.
        rows = rows.reshape(size, -1, rows.shape[-1])
        rows = lax.psum_scatter(rows, AXIS, axis_index_groups=groups)
    rows = lax.psum(rows, [axis for axis in RULES["batch"] if axis != AXIS])
    return jnp.moveaxis(rows.reshape(-1, *rest), 0, dimension)
