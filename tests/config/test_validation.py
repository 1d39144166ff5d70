"""Each contradiction in a config is found before anything is loaded, and told by its value."""

import dataclasses
import math
import re
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

NAN, INF = math.nan, math.inf

# What is changed, and what the message must say.
PRETRAIN: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps is 0"),
    ({"seed": 2**32}, "seed is 4294967296"),
    ({"model.num_kv_heads": 3}, "model.num_kv_heads is 3, which does not divide model.num_heads, 8"),
    ({"model.num_layers": 10**6}, "num_layers 1000000"),
    ({"model.embed_dim": 2 * 10**9}, "embed_dim 2000000000"),
    ({"data.batch_size": 2**19, "data.sequence_length": 2**13}, "524288 rows of 8192 tokens"),
    ({"mesh.cpu_devices": 100_000}, "mesh.cpu_devices is 100000"),
    ({"data.sequence_length": 8193}, "data.sequence_length is 8193, longer than model.context_length, 8192"),
    ({"data.held_out": 1.5}, "data.held_out is 1.5"),
    ({"data.held_out": 1.0}, "data.held_out is 1"),
    ({"data.sources": ()}, "data.sources is empty"),
    ({"data.weights": (1.0, 2.0)}, "data.weights has 2 entries for 1 data.sources"),
    ({"data.weights": (INF,)}, "data.weights is (inf,)"),
    ({"optimizer.accumulation_steps": 3}, "data.batch_size is 8, which optimizer.accumulation_steps, 3"),
    ({"optimizer.warmup_steps": 6, "steps": 5}, "optimizer.warmup_steps is 6, more than all 5 steps"),
    ({"optimizer.schedule": "warmup-stable-decay", "optimizer.warmup_steps": 60, "steps": 100,
      "optimizer.decay_fraction": 0.5}, "optimizer.warmup_steps is 60 and"),
    ({"optimizer.b1": 1.0}, "optimizer.b1 is 1.0"),
    ({"profile": "0"}, "profile is 0, but must be a step or FIRST:LAST"),
    ({"profile": "9:11", "steps": 10}, "profile is 9:11, but the run has 10 steps"),
    ({"data.text_field": ""}, "data.text_field is empty"),
    ({"optimizer.groups": (ParameterGroup("", 1.0),)}, "has ParameterGroup(pattern=''"),
    ({"optimizer.groups": (ParameterGroup("a", 1.0, -1.0),)}, "optimizer.groups: weight_decay is -1.0"),
    ({"optimizer.groups": (ParameterGroup("a", INF),)}, "learning_rate_factor is inf"),
    ({"stability.spike_window": 1}, "stability.spike_window is 1"),
    ({"hosts.count": 2}, "hosts.count is 2 and hosts.index 0, but no hosts.coordinator"),
    ({"hosts.coordinator": "a", "hosts.count": 2}, "hosts.coordinator is a, but must be HOST:PORT"),
    ({"hosts.coordinator": "a:1", "hosts.count": 2, "hosts.index": 2}, "hosts.index is 2, but 2 processes"),
    ({"mesh.cpu_devices": 3}, "data.batch_size is 8, which data 1 x fsdp 3 x accumulation_steps 1 = 3"),
]  # fmt: skip
SAMPLE: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"temperature": -0.5}, "temperature is -0.5"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": NAN}, "top_p is nan"),
    ({"mesh.tensor": 0}, "mesh.tensor is 0"),
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
                with pytest.raises(UserError, match=rf"^{re.escape(name)} is .*, but must be from "):
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
    with pytest.raises(UserError) as error:
        check(replace(config, changes))
    assert told in str(error.value)


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
    (MeshConfig(fsdp=16), 8, "the mesh (data 1 x fsdp 16 x tensor 1) needs 16 devices, but there are 8"),
    (MeshConfig(tensor=3), 8, "(data 1 x fsdp -1 x tensor 3) does not use exactly the 8 devices"),
    (MeshConfig(fsdp=4), 8, "(data 1 x fsdp 4 x tensor 1) does not use exactly the 8 devices"),
    (MeshConfig(data=0), 8, "mesh.data is 0"),
    (MeshConfig(tensor=-1), 8, "mesh.fsdp and mesh.tensor are both -1"),
    (MeshConfig(cpu_devices=4, tensor=8), 8, "needs 8 devices, but there are 4"),
])  # fmt: skip
def test_meshes_that_cannot_be(mesh: MeshConfig, devices: int, told: str) -> None:
    def check() -> None:
        validate_mesh(mesh)
        mesh_shape(mesh, devices)

    with pytest.raises(UserError) as error:
        check()
    assert told in str(error.value)


def test_a_batch_that_the_mesh_does_not_divide_is_told_with_one_that_it_does() -> None:
    config = replace(PretrainConfig(), {"data.batch_size": 20, "mesh.tensor": 2})
    validate_on_devices(config, 10)  # fsdp 5
    with pytest.raises(
        UserError, match=r"data\.batch_size is 20, .* fsdp 8 .* = 8 does not divide; use 24\."
    ):
        validate_on_devices(config, 16)
    accumulated = replace(config, {"optimizer.accumulation_steps": 4})
    validate_on_devices(accumulated, 10)
    with pytest.raises(UserError, match=r"fsdp 2 x accumulation_steps 4 = 8 does not divide; use 24\."):
        validate_on_devices(accumulated, 4)
