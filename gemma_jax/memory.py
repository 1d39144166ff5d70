"""Checks that arrays fit into memory before any of them is allocated."""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.errors import UserError

# The files with a container's memory limit, in version 2 and version 1 of Linux control groups.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

SMALLER_MODEL = "choose a smaller model or a narrower compute.param_dtype"


def require_memory(tree: Any, name: str, remedy: str = SMALLER_MODEL) -> None:
    """Checks that the devices of this process have the memory that a tree of arrays needs.

    Devices that are not in this machine are not checked.

    Args:
      tree: A tree of abstract arrays with shardings.
      name: What the tree holds, for the message.
      remedy: What the user can do, for the message.

    Raises:
      UserError: a device has too little memory, or this machine has less than all its CPU devices need.
    """
    needed: Counter[jax.Device] = Counter()
    for leaf in jax.tree.leaves(tree):
        size = shard_bytes(leaf)
        needed.update(dict.fromkeys(leaf.sharding.addressable_devices, size))
    on_cpu = sum(size for device, size in needed.items() if device.platform == "cpu")
    if on_cpu > (available := machine_memory()):
        raise UserError(
            f"{name} needs {_gib(on_cpu)}, but this machine has {_gib(available)} of memory; {remedy}, or "
            "take a machine with more memory."
        )
    for device, size in needed.items():
        limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        if limit is not None and size > limit:
            raise UserError(
                f"{name} needs {_gib(size)} on each device, but a {device.device_kind} has {_gib(limit)}; "
                f"split it over more devices (mesh.fsdp, mesh.tensor), or {remedy}."
            )


def shard_bytes(array: Any) -> int:
    """Returns the bytes that one shard of an abstract array takes."""
    return stored_bytes(array.sharding.shard_shape(array.shape), array.dtype)


def stored_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Returns the bytes that an array of this shape takes. Two int4 take one."""
    count = math.prod(shape)
    return -(-count // 2) if dtype == jnp.int4 else count * dtype.itemsize


def machine_memory() -> int:
    """Returns the bytes of memory of this machine, or of this process's container if that has fewer."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no limit: no file, or "max" (version 2)
            limits.append(int(Path(path).read_text()))
    return min(limits)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
