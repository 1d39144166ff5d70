"""Slices by the names of the cloud's documents, where v4, v5p and tpu7x count TensorCores."""

import pytest

from gemma_jax.errors import UserError
from gemma_jax.planning.topology import parse_topology
from tests.messages import naming


@pytest.mark.parametrize(("name", "compiler_name", "chips", "shown"), [
    # docs.cloud.google.com/tpu/docs/v5e, v6e
    ("v5e-1", "v5e:1x1", 1, "v5e-1"),
    ("v5e-8", "v5e:2x4", 8, "v5e-8"),
    ("v5litepod-32", "v5e:4x8", 32, "v5e-32"),
    ("v5e-256", "v5e:16x16", 256, "v5e-256"),
    # docs.cloud.google.com/tpu/docs/v4, v5p, tpu7x
    ("v4-8", "v4:2x2x1", 4, "v4-8"),
    ("v5p-64", "v5p:2x4x4", 32, "v5p-64"),
    ("tpu7x-128", "tpu7x:4x4x4", 64, "tpu7x-128"),
    ("v5p-1536", "v5p:8x8x12", 768, "v5p-1536"),
    # layouts
    ("v5e:4x8", "v5e:4x8", 32, "v5e-32"),
    ("V5P-4x4x8", "v5p:4x4x8", 128, "v5p-256"),
])  # fmt: skip
def test_names(name: str, compiler_name: str, chips: int, shown: str) -> None:
    topology = parse_topology(name)
    assert (topology.compiler_name, topology.chips, str(topology)) == (compiler_name, chips, shown)


def test_slices_multiply_chips() -> None:
    topology = parse_topology("v5e-256", slices=16)
    assert topology.chips == 4096 and str(topology) == "16 x v5e-256"


@pytest.mark.parametrize(("name", "slices", "told"), [
    ("v9-8", 1, "'v9-8' v5e-256"),
    ("v5p-7", 1, "'v5p-7' TensorCores 2"),
    ("v5e-7", 1, "'v5e-7' 7 v5e-4x4"),
    ("v5p-130", 1, "'v5p-130' 65 v5p-4x4x4"),
    ("v5e-4", 0, "slices 0"),
])  # fmt: skip
def test_slices_that_there_are_not(name: str, slices: int, told: str) -> None:
    with pytest.raises(UserError, match=naming(*told.split())):
        parse_topology(name, slices)
