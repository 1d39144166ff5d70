"""Helpers for tests of code built on gemma_jax: CPU meshes, a tiny model, equality across meshes.

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
    """Configures jax to have `count` CPU devices in this process.

    Raises:
      UserError: jax is already initialised with fewer.
    """
    make_mesh(MeshConfig(cpu_devices=count))


def cpu_mesh(devices: int = 8, *, slices: int = 1, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """Returns a mesh of that many CPU devices; by default all of them are on the fsdp axis.

    Raises:
      UserError: there are fewer devices, or the axes do not fit them.
    """
    return make_mesh(MeshConfig(slice=slices, data=data, fsdp=fsdp, tensor=tensor, cpu_devices=devices))


def tiny_gemma(mesh: Mesh | None = None, seed: int = 0, **changes: Any) -> Gemma:
    """Returns a Gemma of two layers with random weights and no tokenizer.

    Args:
      mesh: The mesh; one CPU device by default.
      seed: The seed of the weights.
      **changes: Fields of TransformerConfig that differ from the preset gemma_tiny.
    """
    config: TransformerConfig = replace(PRESETS["gemma_tiny"], changes)
    spec = ModelSpec(config, ComputeConfig(), mesh or cpu_mesh(1))
    return Gemma(spec, spec.init(seed), None)


def relative_difference(a: Any, b: Any) -> float:
    """Returns the relative L2 norm of the difference of two arrays: |a - b| / |b|.

    This project measures equality by it, because one float32 sum in two different orders can differ by 2e-2
    in single elements but by only 3e-7 in norm.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    scale = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / scale) if scale else float(np.linalg.norm(a))


def assert_same(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that each array of two trees is equal within `tolerance` in relative L2 norm.

    Raises:
      AssertionError: the trees have different numbers of arrays, or arrays differ, which the message names.
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
    """Asserts that `function` returns the same tree of arrays on every mesh, by relative L2 norm.

    Raises:
      AssertionError: arrays differ; the message names the mesh and the arrays.
    """
    expected = jax.device_get(function(meshes[0]))
    for mesh in meshes[1:]:
        try:
            assert_same(jax.device_get(function(mesh)), expected, tolerance)
        except AssertionError as error:
            raise AssertionError(f"on {dict(mesh.shape)} against {dict(meshes[0].shape)}: {error}") from error
