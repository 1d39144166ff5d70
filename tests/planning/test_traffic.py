"""Which parameter a collective is for, and the least that must be sent: on the real parameters of 2B."""

import dataclasses

import pytest

from gemma_jax.config import PRESETS, ComputeConfig, DataConfig, MeshConfig, PretrainConfig
from gemma_jax.model import ModelSpec
from gemma_jax.planning.collectives import Collective, collectives
from gemma_jax.planning.hlo import parse
from gemma_jax.planning.programs import lower
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
    least = fsdp_minimum(of_2b(), 8, 1)
    # Blocks are gathered twice, the embedding once; all are scattered once. The final norm is gathered twice.
    assert least == 2 * (3 * blocks + 2 * embedding + 3 * 2048) * 7 / 8
    twice = fsdp_minimum(of_2b(), 8, 2)
    assert twice == 2 * (5 * blocks + 3 * embedding + 5 * 2048) * 7 / 8


def collective(array: str, op_name: str = "", source: str = "", kind: str = "all-gather") -> Collective:
    return Collective(kind, "fsdp", (array,), 1, 1.0, source, op_name)


@pytest.mark.parametrize(("array", "names"), [
    ("bf16[256000,2048]", ("embedding",)),
    ("bf16[1,16384,2048]", tuple(f"blocks.feed_forward.{name}" for name in ("gate", "up", "down"))),
    ("bf16[1,2048,1,256]", ("blocks.attention.k", "blocks.attention.v")),
    ("bf16[18,2048]", ("blocks.attention_norm", "blocks.feed_forward_norm")),
    ("bf16[8,8192,2048]", ()),
    ("f32[]", ()),
])  # fmt: skip
def test_outside_of_a_scope_parameters_are_known_by_their_shape(array: str, names: tuple[str, ...]) -> None:
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


@pytest.mark.parametrize(("array", "changes", "names"), [
    ("bf16[2048,2048]", {}, ["blocks.attention.q"]),  # axes merged; and not o, which is as large
    ("bf16[2112,2048]", {}, ["blocks.attention.q"]),  # padded
    ("bf16[128,16384]", {"op_name": "jit(f)/transpose(jvp(blocks.feed_forward.up))/psum_scatter"},
     ["blocks.feed_forward.up"]),  # a part on its way along one dimension of the torus
    ("bf16[128,16384]", {"op_name": "jit(f)/jvp()/all_gather"}, []),
    ("bf16[128,16384]", {"op_name": "jit(f)/blocks.feed_forward.up/mul", "axis": "tensor"}, []),
    ("bf16[8,2048,1024]", {"op_name": "jit(f)/embedding/all_to_all", "kind": "all-to-all"}, []),
    ("s32[8,1024]", {"op_name": "jit(f)/embedding/all_gather"}, []),
])  # fmt: skip
def test_the_scope_of_an_operation_names_the_parameter(
    array: str, changes: dict[str, str], names: list[str]
) -> None:
    within = collective(array, op_name="jit(f)/jvp()/while/body/blocks.attention.q/all_gather")
    assert list(origin(dataclasses.replace(within, **changes), of_2b()).parameters) == names


def test_every_parameter_is_found_in_a_program() -> None:
    """By the names that a lowered train step gives its operations, whatever its source lines look like."""
    mesh = cpu_mesh(8)
    config = PretrainConfig(
        model=PRESETS["gemma_tiny"],
        data=DataConfig(batch_size=8, sequence_length=32),
        mesh=MeshConfig(fsdp=8),
    )
    program = lower("pretrain", config, mesh, 0)
    found: dict[str, set[str]] = {}
    text = program.lowered.compile().as_text()
    assert text is not None
    for found_there in collectives(parse(text), dict(mesh.shape)):
        why = origin(found_there, program.parameters)
        for name in why.parameters if len(why.parameters) == 1 else ():
            found.setdefault(name, set()).add(why.work)
    matrices = [p.name for p in program.parameters if not p.name.endswith("norm")]
    assert found.keys() >= set(matrices)
    assert all("backward" in found[name] for name in matrices if name != "embedding")


def test_traffic_over_fsdp_alone_is_compared() -> None:
    gather = collective("bf16[8]")
    others = [dataclasses.replace(gather, axis="tensor"), dataclasses.replace(gather, kind="all-to-all")]
    assert fsdp_traffic([gather, *others, dataclasses.replace(gather, kind="reduce-scatter")]) == 2.0
