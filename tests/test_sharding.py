"""How arrays are sharded on a mesh, as tables, and that real arrays are sharded in this way."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.config import PRESETS, ComputeConfig, MeshConfig, PretrainConfig, replace
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.sharding import (
    Axes,
    _check_driver,
    local_rows,
    make_mesh,
    named_arrays,
    partition_spec,
    platform,
    put_batch,
    with_arrays,
    with_shardings,
)
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import abstract_train_state
from tests.messages import naming

TINY = PRESETS["gemma_tiny"]


@pytest.mark.parametrize(("cuda", "version", "is_new_enough"), [
    ((13,), "570.86.15", False),
    ((13,), "580.65.06", True),
    ((12,), "570.86.15", True),
    ((12, 13), "570.86.15", True),
    ((12,), "470.57.02", False),
    ((), "470.57.02", True),
])  # fmt: skip
def test_a_driver_that_is_too_old_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: tuple[int, ...], version: str, is_new_enough: bool
) -> None:
    """jax itself would go on with the CPU."""
    driver = tmp_path / "version"
    driver.write_text(
        f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Thu Mar  6 09:12:05 UTC 2025\n"
    )
    installed = {f"jax_cuda{number}_plugin" for number in cuda}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True if name in installed else None)
    if is_new_enough:
        _check_driver(driver)
    else:
        with pytest.raises(UserError, match=naming(version.split(".")[0], cuda[0], "JAX_PLATFORMS=cpu")):
            _check_driver(driver)
    _check_driver(tmp_path / "none")  # no GPU


@pytest.mark.parametrize(("mesh", "axes", "shape", "spec"), [
    # parameters, on fsdp 4 x tensor 2
    ((1, 4, 2), ("vocab", "embed"), (512, 32), P("tensor", "fsdp")),
    ((1, 4, 2), ("layers", "embed", "heads", "head_dim"), (2, 32, 4, 16), P(None, "fsdp", "tensor", None)),
    ((1, 4, 2), ("layers", "embed", "kv_heads", "head_dim"), (2, 32, 2, 16), P(None, "fsdp", "tensor", None)),
    ((1, 4, 2), ("layers", "heads", "head_dim", "embed"), (2, 4, 16, 32), P(None, "tensor", None, "fsdp")),
    ((1, 4, 2), ("layers", "embed", "mlp"), (2, 32, 64), P(None, "fsdp", "tensor")),
    # key/value heads that the mesh does not divide are copied, one head as well as three
    ((1, 4, 2), ("layers", "embed", "kv_heads", "head_dim"), (2, 32, 1, 16), P(None, "fsdp", None, None)),
    ((1, 1, 8), ("layers", "embed", "kv_heads", "head_dim"), (2, 32, 4, 16), P(None, "fsdp", None, None)),
    # activations: rows over data and fsdp together, nothing over tensor
    ((2, 2, 2), ("batch", "length", "residual"), (8, 3, 5), P(("slice", "data", "fsdp"), None, None)),
    ((2, 2, 2), ("batch", "length"), (1, 3), P(None, None)),  # a single row
])  # fmt: skip
def test_partition_specs(mesh: tuple[int, int, int], axes: Axes, shape: tuple[int, ...], spec: P) -> None:
    data, fsdp, tensor = mesh
    actual = partition_spec(axes, shape, cpu_mesh(8, data=data, fsdp=fsdp, tensor=tensor), "array")
    assert actual == spec


@pytest.mark.parametrize(("axes", "shape", "told"), [
    (("embed", "mlp"), (30, 64), ("w", "'embed'", 30, "fsdp", 4)),
    (("layers", "heads"), (2, 3), ("w", "'heads'", 3, "tensor", 2)),
])  # fmt: skip
def test_a_parameter_that_a_mesh_cannot_hold_is_named(
    axes: Axes, shape: tuple[int, ...], told: tuple[object, ...]
) -> None:
    with pytest.raises(UserError, match="^" + naming(*told)):
        partition_spec(axes, shape, cpu_mesh(8, fsdp=4, tensor=2), "w")


def test_a_model_that_the_mesh_does_not_divide_is_refused_by_the_parameters_name() -> None:
    config = PretrainConfig(model=replace(TINY, {"hidden_dim": 63}))
    with pytest.raises(UserError, match=r"blocks\.feed_forward\.\w+.*" + naming("'mlp'", 63)):
        abstract_train_state(pretraining(config, cpu_mesh(8, fsdp=4, tensor=2)))


EXPECTED = {
    "embedding": P("tensor", "fsdp"),
    "final_norm": P("fsdp"),
    "blocks.attention_norm": P(None, "fsdp"),
    "blocks.feed_forward_norm": P(None, "fsdp"),
    "blocks.attention.q": P(None, "fsdp", "tensor", None),
    "blocks.attention.k": P(None, "fsdp", "tensor", None),
    "blocks.attention.v": P(None, "fsdp", "tensor", None),
    "blocks.attention.o": P(None, "tensor", None, "fsdp"),
    "blocks.feed_forward.gate": P(None, "fsdp", "tensor"),
    "blocks.feed_forward.up": P(None, "fsdp", "tensor"),
    "blocks.feed_forward.down": P(None, "tensor", "fsdp"),
}


def test_parameters_and_the_optimizers_moments_lie_in_the_same_places() -> None:
    mesh = cpu_mesh(8, fsdp=4, tensor=2)
    state = abstract_train_state(pretraining(PretrainConfig(model=TINY), mesh))
    params = {name: leaf.sharding.spec for name, leaf in named_arrays(state.params).items()}
    assert params == EXPECTED
    moments = {name: leaf for name, leaf in named_arrays(state.opt_state).items() if leaf.ndim}
    for name, spec in EXPECTED.items():
        like = [leaf.sharding.spec for key, leaf in moments.items() if key.endswith(f".{name}")]
        assert like == [spec, spec], name  # first and second moment
    assert len(moments) == 2 * len(EXPECTED)
    scalars = [leaf for leaf in jax.tree.leaves(state.opt_state) if not leaf.ndim]
    assert scalars and all(leaf.sharding.spec == P() for leaf in scalars)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))


def test_shardings_are_those_of_the_arrays_that_are_made() -> None:
    """The same for abstract and for real values; arrays without axes are copied to every device."""
    mesh = cpu_mesh(8, data=2, fsdp=2, tensor=2)
    wanted = named_arrays(ModelSpec(TINY, ComputeConfig(), mesh).params)
    params = ModelSpec(TINY, ComputeConfig(), mesh).init(0)
    assert named_arrays(with_shardings(params, mesh)) == wanted
    for name, value in named_arrays(params).items():
        assert value.sharding.is_equivalent_to(wanted[name].sharding, value.ndim), name
    assert with_shardings({"count": jnp.zeros(3)}, mesh)["count"].sharding == NamedSharding(mesh, P())
    # A statistic that an optimizer keeps of a parameter's rows is not of the parameter's axes.
    row = nnx.Param(jnp.zeros(32), axes=("layers", "embed", "mlp"))
    with pytest.raises(ValueError, match="row"):
        with_shardings({"row": row}, mesh)
    [copied] = jax.tree.leaves(with_shardings({"row": row}, mesh, copy_other_ranks=True))
    assert copied.sharding == NamedSharding(mesh, P())


def test_names_of_arrays_and_back() -> None:
    params = ModelSpec(TINY, ComputeConfig(), cpu_mesh(1)).init(0)
    arrays = named_arrays(params)
    assert arrays.keys() == EXPECTED.keys()
    doubled = with_arrays(params, {name: 2 * value for name, value in arrays.items()})
    assert str(jax.tree.structure(doubled)) == str(jax.tree.structure(params))
    for name, value in named_arrays(doubled).items():
        np.testing.assert_array_equal(value, 2 * arrays[name])
    assert list(named_arrays({"a": [1, {"b": 2}], "c": 3})) == ["a.0", "a.1.b", "c"]
    with pytest.raises(ValueError, match="same"):
        named_arrays({"a": {"b": 1}, "a.b": 2})


def test_meshes_of_some_of_the_devices() -> None:
    assert dict(cpu_mesh(8, data=2, tensor=2).shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    two = cpu_mesh(8, slices=2, tensor=2)
    assert dict(two.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert list(two.devices[0].flat) == jax.devices()[:4]  # a slice's devices are together
    small = cpu_mesh(2)
    assert small.size == 2 and list(small.devices.flat) == jax.devices()[:2]
    assert platform(small) == "cpu"
    assert make_mesh(MeshConfig()).size == jax.device_count() == 8
    assert set(small.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_batches_are_split_by_rows(data: int, fsdp: int, tensor: int) -> None:
    mesh = cpu_mesh(8, data=data, fsdp=fsdp, tensor=tensor)
    assert local_rows(16, mesh) == list(range(16))  # this process has all devices
    batch = {"tokens": np.arange(32).reshape(16, 2), "weights": np.arange(16.0)}
    placed: dict[str, Any] = put_batch(batch, 16, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        assert {s.data.shape for s in placed[name].addressable_shards} == {
            (16 // (data * fsdp), *value.shape[1:])
        }
        for shard in placed[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])
    # Each row lies on as many devices as tensor has.
    firsts = [shard.index[0].start or 0 for shard in placed["weights"].addressable_shards]
    assert {firsts.count(first) for first in firsts} == {tensor}


def test_the_models_activations_are_split_by_rows() -> None:
    """Tokens come as copies; the hidden states that the blocks hand on are split all the same."""
    mesh = cpu_mesh(8, fsdp=4, tensor=2)
    spec = ModelSpec(TINY, ComputeConfig(), mesh)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=NamedSharding(mesh, P()))

    def hidden(params: nnx.State, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
        return spec.merge(params)(tokens, positions, jnp.ones_like(tokens))

    output = jax.jit(hidden).lower(spec.params, tokens).compile().output_shardings
    assert output.shard_shape((8, 16, 32))[0] == 2
