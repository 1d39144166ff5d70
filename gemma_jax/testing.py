"""For tests of code built on gemma_jax: meshes of CPU devices, a tiny model, equality across meshes.

Call `use_cpu_devices` at the top of a conftest.py, before anything else uses jax.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_jax.api import Gemma
from gemma_jax.config import PRESETS, ComputeConfig, MeshConfig, TransformerConfig, replace
from gemma_jax.model import ModelSpec
from gemma_jax.sharding import make_mesh, parameter_name


def use_cpu_devices(count: int = 8) -> None:
    """Make this process see `count` CPU devices.

    Raises:
      UserError: jax runs already with fewer.
    """
    make_mesh(MeshConfig(cpu_devices=count))


def cpu_mesh(devices: int = 8, *, slices: int = 1, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh of that many CPU devices; by default all of them on fsdp.

    Raises:
      UserError: there are fewer, or the axes do not fit them.
    """
    return make_mesh(MeshConfig(slice=slices, data=data, fsdp=fsdp, tensor=tensor, cpu_devices=devices))


def tiny_gemma(mesh: Mesh | None = None, seed: int = 0, **changes: Any) -> Gemma:
    """A Gemma of two layers with random weights and no tokenizer.

    Args:
      mesh: one CPU device if left out.
      seed: of the weights.
      **changes: fields of TransformerConfig that differ from the preset gemma_tiny.
    """
    config: TransformerConfig = replace(PRESETS["gemma_tiny"], changes)
    spec = ModelSpec(config, ComputeConfig(), mesh or cpu_mesh(1))
    return Gemma(spec, spec.init(seed), None)


def relative_difference(a: Any, b: Any) -> float:
    """Relative L2 norm of the difference of two arrays: |a - b| / |b|.

    The measure of equality of this project: two orders of one float32 sum can differ by 2e-2 in single
    elements and by 3e-7 in norm.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    scale = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / scale) if scale else float(np.linalg.norm(a))


def assert_same(actual: Any, expected: Any, tolerance: float) -> None:
    """Every array of two trees is equal in relative L2 norm; the error names those that are not.

    Raises:
      AssertionError: the trees differ in structure or in value.
    """
    actual_leaves = jax.tree_util.tree_leaves_with_path(actual)
    expected_leaves = jax.tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves), "the trees have different numbers of arrays"
    differences = {
        f"{parameter_name(path)} (leaf {index})": relative_difference(a, b)
        for index, ((path, a), b) in enumerate(zip(actual_leaves, expected_leaves, strict=True))
    }
    wrong = {name: value for name, value in differences.items() if not value <= tolerance}
    assert not wrong, f"relative L2 differences above {tolerance}: {wrong}"


def assert_same_on_meshes(
    function: Callable[[Mesh], Any], meshes: Sequence[Mesh], tolerance: float = 1e-5
) -> None:
    """`function` returns the same tree of arrays on every mesh, by relative L2 norm.

    Raises:
      AssertionError: naming the mesh and the arrays that differ.
    """
    expected = jax.device_get(function(meshes[0]))
    for mesh in meshes[1:]:
        try:
            assert_same(jax.device_get(function(mesh)), expected, tolerance)
        except AssertionError as error:
            raise AssertionError(f"on {dict(mesh.shape)} against {dict(meshes[0].shape)}: {error}") from error
