"""Arrays that cannot fit into memory are rejected before any of them is allocated."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.config import PRESETS, ComputeConfig, replace
from gemma_jax.errors import UserError
from gemma_jax.memory import machine_memory, require_memory
from gemma_jax.model import ModelSpec
from gemma_jax.testing import cpu_mesh
from tests.messages import naming


def tree(gib: float, spec: P, devices: int) -> dict[str, jax.ShapeDtypeStruct]:
    """An abstract array of so many GiB on a mesh of CPU devices."""
    where = NamedSharding(cpu_mesh(devices), spec)
    return {"array": jax.ShapeDtypeStruct((8 * int(gib * 2**17), 2**8), jnp.float32, sharding=where)}


def test_cpu_devices_share_the_memory_of_the_machine() -> None:
    """An array in parts counts once, a copied one as often as there are devices."""
    memory = machine_memory() / 2**30
    assert 1 < memory < 100_000
    require_memory(tree(0.9 * memory, P("fsdp"), 8), "the model")
    require_memory(tree(0.9 * memory, P(), 1), "the model")
    for needed, spec, devices in [(1.1, P("fsdp"), 8), (1.1, P(), 1), (0.2, P(), 8)]:
        with pytest.raises(UserError, match=naming("the model", "GiB", f"{memory:,.1f} GiB")):
            require_memory(tree(needed * memory, spec, devices), "the model")


def test_a_model_that_is_too_large_is_never_made() -> None:
    too_large = replace(PRESETS["gemma_tiny"], {"num_layers": 10**8})
    with pytest.raises(UserError, match=naming("the model", "GiB", "GiB")):
        ModelSpec(too_large, ComputeConfig(), cpu_mesh(8)).init(0)
