"""Each contradiction in a config is found before anything is loaded, and told by its value."""

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

NAN, INF = math.nan, math.inf

# What is changed, and what the message must say.
PRETRAIN: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps is 0"),
    ({"steps": 2**31}, "steps is 2147483648"),
    ({"steps": 10**400}, "steps is 1000"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**32}, "seed is 4294967296"),
    *(
        ({f"model.{name}": 0}, f"model.{name} is 0, but must be at least 1")
        for name in (
            "vocab_size", "num_layers", "embed_dim", "hidden_dim", "num_heads", "num_kv_heads", "head_dim",
            "context_length", "vocab_multiple",
        )
    ),
    ({"model.rope_base": 0.5}, "model.rope_base is 0.5"),
    ({"model.rope_base": INF}, "model.rope_base is inf"),
    ({"model.norm_epsilon": -1e-6}, "model.norm_epsilon is -1e-06"),
    ({"model.norm_epsilon": NAN}, "model.norm_epsilon is nan"),
    ({"model.num_kv_heads": 3}, "model.num_kv_heads is 3, which does not divide model.num_heads, 8"),
    ({"model.num_kv_heads": 16}, "model.num_kv_heads is 16, which does not divide model.num_heads, 8"),
    ({"model.num_layers": 10**6}, "num_layers 1000000"),
    ({"model.embed_dim": 2 * 10**9}, "embed_dim 2000000000"),
    ({"data.batch_size": 10**6 + 1}, "data.batch_size is 1000001 rows"),
    ({"data.batch_size": 2**19, "data.sequence_length": 2**13}, "524288 rows of 8192 tokens"),
    ({"mesh.cpu_devices": 100_000}, "mesh.cpu_devices is 100000"),
    ({"model.head_dim": 255}, "model.head_dim is 255"),
    ({"data.sequence_length": 0}, "data.sequence_length is 0"),
    ({"data.sequence_length": 8193}, "data.sequence_length is 8193, longer than model.context_length, 8192"),
    ({"data.batch_size": 0}, "data.batch_size is 0"),
    ({"data.held_out": -0.1}, "data.held_out is -0.1"),
    ({"data.held_out": 1.5}, "data.held_out is 1.5"),
    ({"data.held_out": 1.0}, "data.held_out is 1, which leaves nothing"),
    ({"data.held_out": NAN}, "data.held_out is nan"),
    ({"data.sources": ()}, "data.sources is empty"),
    ({"data.weights": (1.0, 2.0)}, "data.weights has 2 entries for 1 data.sources"),
    ({"data.weights": (0.0,)}, "data.weights is (0.0,)"),
    ({"data.weights": (INF,)}, "data.weights is (inf,)"),
    ({"optimizer.accumulation_steps": 0}, "optimizer.accumulation_steps is 0"),
    ({"optimizer.accumulation_steps": 3}, "data.batch_size is 8, which optimizer.accumulation_steps, 3"),
    ({"optimizer.warmup_steps": -1}, "optimizer.warmup_steps is -1"),
    ({"optimizer.warmup_steps": 6, "steps": 5}, "optimizer.warmup_steps is 6, more than all 5 steps"),
    ({"optimizer.schedule": "warmup-stable-decay", "optimizer.warmup_steps": 60, "steps": 100,
      "optimizer.decay_fraction": 0.5}, "optimizer.warmup_steps is 60 and"),
    ({"optimizer.learning_rate": -1e-3}, "optimizer.learning_rate is -0.001"),
    ({"optimizer.learning_rate": NAN}, "optimizer.learning_rate is nan"),
    ({"optimizer.clip_norm": -1.0}, "optimizer.clip_norm is -1.0"),
    ({"optimizer.epsilon": -1.0}, "optimizer.epsilon is -1.0"),
    ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay is -0.1"),
    ({"optimizer.z_loss": -1.0}, "optimizer.z_loss is -1.0"),
    ({"optimizer.b1": 1.0}, "optimizer.b1 is 1.0, but must be below 1"),
    ({"optimizer.b1": -0.1}, "optimizer.b1 is -0.1"),
    ({"optimizer.b2": 1.5}, "optimizer.b2 is 1.5"),
    ({"optimizer.final_fraction": 1.1}, "optimizer.final_fraction is 1.1"),
    ({"optimizer.decay_fraction": NAN}, "optimizer.decay_fraction is nan"),
    ({"compute.scan_unroll": 0}, "compute.scan_unroll is 0"),
    ({"compute.loss_block": 0}, "compute.loss_block is 0"),
    ({"checkpoint.every": 0}, "checkpoint.every is 0"),
    ({"checkpoint.keep_last": 0}, "checkpoint.keep_last is 0"),
    ({"checkpoint.keep_every": -1}, "checkpoint.keep_every is -1"),
    ({"checkpoint.keep_best": -1}, "checkpoint.keep_best is -1"),
    ({"evaluation.every": -1}, "evaluation.every is -1"),
    ({"evaluation.rows": 0}, "evaluation.rows is 0"),
    ({"logging.every": 0}, "logging.every is 0"),
    ({"profile": "0"}, "profile is 0, but must be a step or FIRST:LAST"),
    ({"profile": "9:3"}, "profile is 9:3"),
    ({"profile": "3-9"}, "profile is 3-9"),
    ({"profile": "9:11", "steps": 10}, "profile is 9:11, but the run has 10 steps"),
    ({"data.text_field": ""}, "data.text_field is empty"),
    ({"optimizer.groups": (ParameterGroup("", 1.0),)}, "optimizer.groups has ''"),
    ({"optimizer.groups": (ParameterGroup("a"),)}, "optimizer.groups has 'a' with no settings"),
    ({"optimizer.groups": (ParameterGroup("a", 1.0, -1.0),)}, "weight_decay of 'a' is -1.0"),
    ({"optimizer.groups": (ParameterGroup("a", INF),)}, "learning_rate_factor of 'a' is inf"),
    ({"optimizer.groups": (ParameterGroup("a", NAN),)}, "learning_rate_factor of 'a' is nan"),
    ({"stability.skip_nonfinite": -1}, "stability.skip_nonfinite is -1"),
    ({"stability.spike_window": 1}, "stability.spike_window is 1"),
    ({"stability.spike_threshold": NAN}, "stability.spike_threshold is nan"),
    ({"hosts.heartbeat_seconds": 0}, "hosts.heartbeat_seconds is 0"),
    ({"hosts.count": 2}, "hosts.count is 2 and hosts.index 0, but no hosts.coordinator"),
    ({"hosts.index": 1}, "hosts.count is 0 and hosts.index 1, but no hosts.coordinator"),
    ({"hosts.coordinator": "a:1"}, "hosts.coordinator is set, but hosts.count is not"),
    ({"hosts.coordinator": "a", "hosts.count": 2}, "hosts.coordinator is a, but must be HOST:PORT"),
    ({"hosts.coordinator": "a:1", "hosts.count": 2, "hosts.index": 2}, "hosts.index is 2, but 2 processes"),
    ({"tokenizer.train_megabytes": 0.0}, "tokenizer.train_megabytes is 0.0"),
    ({"mesh.fsdp": 0}, "mesh.fsdp is 0"),
    ({"mesh.cpu_devices": 3}, "data.batch_size is 8, which data 1 x fsdp 3 x accumulation_steps 1 = 3"),
]  # fmt: skip


SAMPLE: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": 2**31}, "max_new_tokens is 2147483648"),
    ({"temperature": -0.5}, "temperature is -0.5"),
    ({"temperature": NAN}, "temperature is nan"),
    ({"temperature": INF}, "temperature is inf"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 2**31}, "top_k is 2147483648"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": NAN}, "top_p is nan"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**32}, "seed is 4294967296"),
    ({"compute.scan_unroll": 0}, "compute.scan_unroll is 0"),
    ({"mesh.tensor": 0}, "mesh.tensor is 0"),
]


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


def test_what_stands_at_the_limits_is_allowed() -> None:
    changes = {
        "steps": 1,
        "seed": 2**32 - 1,
        "data.sequence_length": 8192,
        "data.held_out": 0.0,
        "data.weights": (3.0,),
        "optimizer.accumulation_steps": 8,
        "optimizer.clip_norm": 0.0,
        "optimizer.warmup_steps": 0,
        "optimizer.b1": 0.0,
        "optimizer.final_fraction": 1.0,
        "evaluation.every": 0,
        "model.num_kv_heads": 8,
        "profile": "1:1",
        "optimizer.groups": (ParameterGroup("*", 0.0), ParameterGroup("x", weight_decay=0.0)),
        "hosts.coordinator": "10.0.0.1:8476",
        "hosts.count": 2,
        "hosts.index": 1,
    }
    validate(replace(PretrainConfig(), changes))


@pytest.mark.parametrize(("mesh", "devices", "shape"), [
    (MeshConfig(), 1, (1, 1, 1, 1)),
    (MeshConfig(), 8, (1, 1, 8, 1)),  # all there are on fsdp
    (MeshConfig(tensor=2), 8, (1, 1, 4, 2)),
    (MeshConfig(data=2, tensor=2), 8, (1, 2, 2, 2)),
    (MeshConfig(data=-1, fsdp=1, tensor=4), 8, (1, 2, 1, 4)),
    (MeshConfig(data=1, fsdp=2, tensor=-1), 8, (1, 1, 2, 4)),
    (MeshConfig(data=2, fsdp=2, tensor=2), 8, (1, 2, 2, 2)),
    (MeshConfig(data=8), 8, (1, 8, 1, 1)),
    (MeshConfig(), 6, (1, 1, 6, 1)),
    (MeshConfig(slice=2), 8, (2, 1, 4, 1)),
    (MeshConfig(slice=2, data=2, tensor=2), 8, (2, 2, 1, 2)),
])  # fmt: skip
def test_shape_of_a_mesh(mesh: MeshConfig, devices: int, shape: tuple[int, int, int, int]) -> None:
    assert mesh_shape(mesh, devices) == shape


@pytest.mark.parametrize(("mesh", "devices", "told"), [
    (MeshConfig(fsdp=16), 8, "the mesh (data 1 x fsdp 16 x tensor 1) needs 16 devices, but there are 8"),
    (MeshConfig(tensor=2), 1, "needs 2 devices, but there is 1"),
    (MeshConfig(tensor=3), 8, "(data 1 x fsdp -1 x tensor 3) does not use exactly the 8 devices"),
    (MeshConfig(fsdp=4), 8, "(data 1 x fsdp 4 x tensor 1) does not use exactly the 8 devices"),
    (MeshConfig(data=0), 8, "mesh.data is 0"),
    (MeshConfig(slice=-1), 8, "mesh.slice is -1, but must be 1 or more."),
    (MeshConfig(fsdp=-2), 8, "mesh.fsdp is -2"),
    (MeshConfig(tensor=-1), 8, "mesh.fsdp and mesh.tensor are both -1"),
    (MeshConfig(data=-1, tensor=-1), 8, "mesh.data and mesh.fsdp and mesh.tensor"),
    (MeshConfig(cpu_devices=-1), 8, "mesh.cpu_devices is -1"),
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
