"""Slices by the names of the cloud's documents, where v4, v5p and tpu7x count TensorCores."""

import pytest

from gemma_jax.errors import UserError
from gemma_jax.planning.topology import parse_topology


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
    ("v9-8", 1, "topology 'v9-8' is not known"),
    ("v5p-7", 1, "named by its TensorCores, 2 a chip"),
    ("v5e-7", 1, "7 chips of v5e make no slice"),
    ("v5p-130", 1, "65 chips of v5p make no slice"),
    ("v5e-4", 0, "slices is 0"),
])  # fmt: skip
def test_slices_that_there_are_not(name: str, slices: int, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_topology(name, slices)
    assert told in str(error.value)
