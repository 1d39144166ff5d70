"""Which parameter a collective is for, and the least that must be sent: on the real parameters of 2B."""

import dataclasses
from pathlib import Path

import pytest

from gemma_jax.config import PRESETS, ComputeConfig
from gemma_jax.model import ModelSpec, layers
from gemma_jax.planning.collectives import Collective
from gemma_jax.planning.traffic import Parameter, fsdp_minimum, fsdp_traffic, origin, parameters
from gemma_jax.testing import cpu_mesh


def of_2b(**axes: int) -> list[Parameter]:
    mesh = cpu_mesh(8, **axes)
    return parameters(ModelSpec(PRESETS["gemma_2b"], ComputeConfig(), mesh).params, mesh)


def test_parameters_as_a_group_of_fsdp_holds_them() -> None:
    known = {p.name: p for p in of_2b(fsdp=4, tensor=2)}
    gate = known["blocks.feed_forward.gate"]
    assert (gate.axes, gate.shape, gate.layers) == (("embed", "mlp"), (2048, 16_384 // 2), 18)
    assert known["embedding"].shape == (256_000 // 2, 2048) and known["embedding"].layers == 1
    assert known["blocks.attention.k"].shape == (2048, 1, 256)  # copied over tensor


def test_the_least_traffic() -> None:
    embedding, blocks = 256_000 * 2048, 18 * (2048 * (2 * 2048 + 2 * 256 + 3 * 16_384) + 2 * 2048)
    least = fsdp_minimum(of_2b(), 8, 1, "bf16", "bf16")
    # Blocks are gathered twice, the embedding once; all are scattered once. The final norm is gathered twice.
    assert least == 2 * (3 * blocks + 2 * embedding + 3 * 2048) * 7 / 8
    twice = fsdp_minimum(of_2b(), 8, 2, "bf16", "f32")
    assert twice == (2 * 2 * (2 * blocks + embedding + 2 * 2048) + 4 * (blocks + embedding + 2048)) * 7 / 8


def collective(array: str, op_name: str = "", source: str = "", kind: str = "all-gather") -> Collective:
    return Collective(kind, "fsdp", (array,), 1, 1.0, source, op_name)


@pytest.mark.parametrize(("array", "names"), [
    ("bf16[256000,2048]", ("embedding",)),
    ("bf16[1,16384,2048]", ("blocks.feed_forward.down",)),  # as it lies
    ("bf16[2048,16384]", ("blocks.feed_forward.gate", "blocks.feed_forward.up")),
    ("bf16[2112,16384]", ("blocks.feed_forward.gate", "blocks.feed_forward.up", "blocks.feed_forward.down")),
    ("bf16[1,2048,1,256]", ("blocks.attention.k", "blocks.attention.v")),
    ("bf16[2048,2048]", ("blocks.attention.q", "blocks.attention.o")),  # axes merged
    ("bf16[8,8192,2048]", ()),
    ("f32[]", ()),
])  # fmt: skip
def test_parameters_are_told_by_their_shapes(array: str, names: tuple[str, ...]) -> None:
    assert set(origin(collective(array), of_2b()).parameters) == set(names)


def test_logical_axis_work_and_place() -> None:
    why = origin(collective("bf16[2048,16384]", "jit(f)/transpose(jvp())/checkpoint/dot_general"), of_2b())
    assert why.logical_axes == ("embed",) and why.work == "backward"
    names = {
        "jit(f)/jvp()/dot_general": "forward",
        "jit(f)/transpose(jvp())/rematted_computation/dot_general": "recompute",
        "jit(f)/add": "update",
    }
    for name, work in names.items():
        assert origin(collective("f32[]", name), []).work == work


def test_the_source_line_names_the_parameter() -> None:
    lines = Path(layers.__file__).read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "self.q.matmul(" in text)
    product = layers.__file__.replace("model/layers.py", "weights/matmul.py")
    why = origin(collective("bf16[2048,2048]", source=f"{product}:3 < {layers.__file__}:{line}"), of_2b())
    assert why.parameters == ("blocks.attention.q",)
    assert why.source == f"model/layers.py:{line}"


def test_parts_on_their_way_through_the_torus_belong_to_a_parameter_too() -> None:
    """Where the collective is one of fsdp.gather; elsewhere the same shape is one of activations."""
    lines = Path(layers.__file__).read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "self.down.matmul(" in text)
    fsdp = layers.__file__.replace("model/layers.py", "weights/fsdp.py")
    part = "bf16[128,16384]"
    why = origin(collective(part, source=f"{fsdp}:40 < {layers.__file__}:{line}"), of_2b())
    assert why.parameters == ("blocks.feed_forward.down",)
    look_up = layers.__file__.replace("model/layers.py", "weights/weight.py")
    for place in (f"{layers.__file__}:{line}", f"{look_up}:38"):
        assert origin(collective(part, source=place), of_2b()).parameters == ()


def test_traffic_over_fsdp_alone_is_compared() -> None:
    gather = collective("bf16[8]")
    others = [dataclasses.replace(gather, axis="tensor"), dataclasses.replace(gather, kind="all-to-all")]
    assert fsdp_traffic([gather, *others, dataclasses.replace(gather, kind="reduce-scatter")]) == 2.0
