"""Each contradiction in a config is found before anything is loaded; the message names the value."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from gemma_jax.config import (
    MeshConfig,
    ParameterGroup,
    PretrainConfig,
    SampleConfig,
    mesh_shape,
    replace,
    validate,
    validate_mesh,
    validate_on_devices,
    validate_sample,
)
from gemma_jax.errors import UserError
from tests.messages import naming

NAN, INF = math.nan, math.inf

# What is changed, and what the message must name.
PRETRAIN: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps 0"),
    ({"seed": 2**32}, "seed 4294967296"),
    ({"model.num_kv_heads": 3}, "model.num_kv_heads 3 model.num_heads 8"),
    ({"model.num_layers": 10**6}, "num_layers 1000000 vocab_size"),
    ({"model.embed_dim": 2 * 10**9}, "embed_dim 2000000000 vocab_size"),
    ({"data.batch_size": 2**19, "data.sequence_length": 2**13}, "data.batch_size 524288 8192"),
    ({"mesh.cpu_devices": 100_000}, "mesh.cpu_devices 100000"),
    ({"data.sequence_length": 8193}, "data.sequence_length 8193 model.context_length 8192"),
    ({"data.held_out": 1.5}, "data.held_out 1.5"),
    ({"data.held_out": 1.0}, "data.held_out 1.0"),
    ({"data.sources": ()}, "data.sources python-stdlib"),
    ({"data.weights": (1.0, 2.0)}, "data.weights 2 1 data.sources"),
    ({"data.weights": (INF,)}, "data.weights (inf,)"),
    ({"optimizer.accumulation_steps": 3}, "data.batch_size 8 optimizer.accumulation_steps 3"),
    ({"optimizer.warmup_steps": 6, "steps": 5}, "optimizer.warmup_steps 6 5 steps"),
    ({"optimizer.schedule": "warmup-stable-decay", "optimizer.warmup_steps": 60, "steps": 100,
      "optimizer.decay_fraction": 0.5}, "optimizer.warmup_steps 60 optimizer.decay_fraction 50 100"),
    ({"optimizer.b1": 1.0}, "optimizer.b1 1.0"),
    ({"profile": "0"}, "profile 0 FIRST:LAST"),
    ({"profile": "9:11", "steps": 10}, "profile 9:11 10"),
    ({"data.text_field": ""}, "data.text_field empty"),
    ({"optimizer.groups": (ParameterGroup("", 1.0),)}, "optimizer.groups ParameterGroup(pattern=''"),
    ({"optimizer.groups": (ParameterGroup("a", 1.0, -1.0),)}, "optimizer.groups weight_decay -1.0"),
    ({"optimizer.groups": (ParameterGroup("a", INF),)}, "learning_rate_factor inf"),
    ({"stability.spike_window": 1}, "stability.spike_window 1"),
    ({"hosts.count": 2}, "hosts.count 2 hosts.index 0 hosts.coordinator"),
    ({"hosts.coordinator": "a", "hosts.count": 2}, "hosts.coordinator a HOST:PORT"),
    ({"hosts.coordinator": "a:1", "hosts.count": 2, "hosts.index": 2}, "hosts.index 2 2"),
    ({"mesh.cpu_devices": 3}, "data.batch_size 8 fsdp 3 accumulation_steps 1 3"),
]  # fmt: skip
SAMPLE: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ({"temperature": -0.5}, "temperature -0.5"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"top_p": 1.01}, "top_p 1.01"),
    ({"top_p": NAN}, "top_p nan"),
    ({"mesh.tensor": 0}, "mesh.tensor 0"),
]


@pytest.mark.parametrize(
    ("config", "check"), [(PretrainConfig(), validate), (SampleConfig(), validate_sample)]
)
def test_every_number_has_bounds_that_are_checked(config: Any, check: Callable[[Any], None]) -> None:
    def visit(section: Any, prefix: str) -> None:
        for field in dataclasses.fields(section):
            name, value = prefix + field.name, getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                visit(value, f"{name}.")
            if field.type not in (int, float):
                continue
            least, most = field.metadata["least"], field.metadata["most"]
            wrong = [least - 1, most + 1, 10**400] + [NAN, INF, -INF] * (field.type is float)
            for number in wrong:
                with pytest.raises(UserError, match="^" + naming(name, least, most)):
                    check(replace(config, {name: number}))

    visit(config, "")


@pytest.mark.parametrize(
    ("config", "check", "changes", "told"),
    [(PretrainConfig(), validate, *case) for case in PRETRAIN]
    + [(SampleConfig(), validate_sample, *case) for case in SAMPLE],
)
def test_contradictions_name_the_field_and_its_value(
    config: Any, check: Callable[[Any], None], changes: dict[str, Any], told: str
) -> None:
    check(config)
    with pytest.raises(UserError, match=naming(*told.split())):
        check(replace(config, changes))


@pytest.mark.parametrize(("mesh", "devices", "shape"), [
    (MeshConfig(), 1, (1, 1, 1, 1)),
    (MeshConfig(), 8, (1, 1, 8, 1)),  # all there are on fsdp
    (MeshConfig(data=-1, fsdp=1, tensor=4), 8, (1, 2, 1, 4)),
    (MeshConfig(data=1, fsdp=2, tensor=-1), 8, (1, 1, 2, 4)),
    (MeshConfig(data=2, fsdp=2, tensor=2), 8, (1, 2, 2, 2)),
    (MeshConfig(slice=2, data=2, tensor=2), 8, (2, 2, 1, 2)),
])  # fmt: skip
def test_shape_of_a_mesh(mesh: MeshConfig, devices: int, shape: tuple[int, int, int, int]) -> None:
    assert mesh_shape(mesh, devices) == shape


@pytest.mark.parametrize(("mesh", "devices", "told"), [
    (MeshConfig(fsdp=16), 8, "fsdp 16 tensor 1 16 8 mesh.cpu_devices"),
    (MeshConfig(tensor=3), 8, "fsdp -1 tensor 3 8 -1 mesh.cpu_devices"),
    (MeshConfig(fsdp=4), 8, "fsdp 4 tensor 1 8 -1 mesh.cpu_devices"),
    (MeshConfig(data=0), 8, "mesh.data 0"),
    (MeshConfig(tensor=-1), 8, "mesh.fsdp mesh.tensor -1"),
    (MeshConfig(cpu_devices=4, tensor=8), 8, "tensor 8 8 4 mesh.cpu_devices"),
])  # fmt: skip
def test_meshes_that_cannot_be(mesh: MeshConfig, devices: int, told: str) -> None:
    def check() -> None:
        validate_mesh(mesh)
        mesh_shape(mesh, devices)

    with pytest.raises(UserError, match=naming(*told.split())):
        check()


def test_a_batch_that_the_mesh_does_not_divide_is_told_with_one_that_it_does() -> None:
    config = replace(PretrainConfig(), {"data.batch_size": 20, "mesh.tensor": 2})
    validate_on_devices(config, 10)  # fsdp 5
    with pytest.raises(UserError, match=naming("data.batch_size", 20, "fsdp 8", 8, 24)):
        validate_on_devices(config, 16)
    accumulated = replace(config, {"optimizer.accumulation_steps": 4})
    validate_on_devices(accumulated, 10)
    with pytest.raises(UserError, match=naming("fsdp 2", "accumulation_steps 4", 8, 24)):
        validate_on_devices(accumulated, 4)
