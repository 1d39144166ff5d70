"""A small program as text with all the pitfalls of real ones; expected values are counted by hand."""

from pathlib import Path

import pytest

from gemma_jax.planning.analysis import analyse
from gemma_jax.planning.collectives import Collective, collectives
from gemma_jax.planning.compiler import Compiled
from gemma_jax.planning.hlo import Array, executions, parse, trip_count

TEXT = (Path(__file__).parent / "programs" / "loops.hlo").read_text(encoding="utf-8")
MODULE = parse(TEXT)
MESH = {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}  # device = 4 slice + 2 fsdp + tensor


def test_instructions_are_read() -> None:
    entry = MODULE.computations["main"].instructions
    splash = entry["splash_mqa_fwd_segmented_residuals.1"]
    assert splash.is_kernel and splash.operands == ("info", "q.0", "kv.0", "kv.0")  # over several lines
    assert splash.arrays == (Array("f32", (512, 128)), Array("bf16", (8, 1024, 256)))
    assert splash.metadata("op_name") == "jit(step)/splash_mqa_fwd/pallas_call"
    assert entry["w.0"].arrays[0].bytes == 2 * 64 * 32 and str(entry["w.0"].arrays[0]) == "bf16[64,32]"
    assert MODULE.source(splash) == (
        "/package/gemma_jax/model/layers.py:76 < /package/gemma_jax/model/transformer.py:67"
    )
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule empty")


@pytest.mark.parametrize(("computation", "loop", "rounds"), [
    ("main", "outer", 18),  # written down by the compiler
    ("outer_body", "inner", 8),  # from 1 to 9, read from condition and start
    ("main", "endless", None),
])  # fmt: skip
def test_rounds_of_loops(computation: str, loop: str, rounds: int | None) -> None:
    holder = MODULE.computations[computation]
    assert trip_count(MODULE, holder, holder.instructions[loop]) == rounds


def test_executions_multiply_along_nested_loops() -> None:
    counts = {e.instruction.name: (e.count, e.counted) for e in executions(MODULE)}
    assert counts["carried"] == (18, True)
    assert counts["work"] == (18 * 8, True)
    assert counts["v.2"] == (1, False)  # nobody knows
    assert counts["endless"] == (1, False) and counts["outer"] == (1, True)
    assert "inside" not in counts  # a fusion is one instruction


def test_cycles_kernels_and_memory() -> None:
    compiled = Compiled(TEXT, arguments=1000, outputs=300, aliased=200, temporaries=50)
    analysis = analyse(compiled, {"parameters": 600, "batch": 100}, MESH)
    assert analysis.cycles == 18 * 100 + 18 * 8 * 10 + 5
    assert analysis.uncounted_loops == 1
    assert analysis.memory == {
        "parameters": 600, "batch": 100, "padding": 300, "outputs": 100, "temporaries": 50,
    }  # fmt: skip
    assert [cost.cycles for cost in analysis.costs] == [18 * 100 + 18 * 8 * 10 + 5]  # no place is told
    attention, stated = analysis.kernels
    # Two products of 8 heads of 1024 x 256 with 1024 keys, two operations each; causality needs half.
    assert attention.attention and attention.flops == 2 * 2 * 8 * 1024 * 256 * 1024 / 2
    assert (stated.attention, stated.flops) == (False, 1000)


def found(kind: str) -> list[Collective]:
    return [c for c in collectives(MODULE, MESH) if c.kind == kind]


def test_a_collective_that_lies_over_several_fusions_is_counted_once() -> None:
    """Start, middle and done fusions of one chain each contain a copy of the collective."""
    first, second = found("all-gather")
    assert first.arrays == ("bf16[256,32]",) and first.count == 18 and first.axis == "fsdp x tensor"
    assert first.bytes == 18 * 2 * 256 * 32 * 3 / 4
    assert first.op_name == "jit(step)/jvp()/while/body/dot_general"
    assert second.arrays == ("f32[8,64]",)  # of a start, the result and not the operand
    assert second.axis == "slice x fsdp" and second.bytes == 4 * 8 * 64 * 3 / 4


def test_collectives_of_one_shard_map_are_told_apart() -> None:
    """They can have the same channel."""
    gather = "all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}"
    text = (
        "ENTRY %main (x: f32[8]) -> f32[64] {\n"
        "  %x = f32[8]{0} parameter(0)\n"
        f"  %one = f32[64]{{0}} {gather}\n"
        f"  ROOT %two = f32[64]{{0}} {gather}\n"
        "}\n"
    )
    assert len(collectives(parse(text), MESH)) == 2


def test_a_sum_of_which_each_device_keeps_a_part_is_a_reduce_scatter() -> None:
    (scatter,) = found("reduce-scatter")
    assert scatter.axis == "slice x fsdp x tensor" and scatter.bytes == 4 * 1026 * 16 * 7 / 8
    assert scatter.op_name == "jit(step)/transpose(jvp())/dot_general"  # told by the fusion


def test_permutes_and_transfers_between_slices() -> None:
    (permute,) = found("collective-permute")
    assert permute.axis == "tensor" and permute.count == 18 * 8 and permute.bytes == 18 * 8 * 4 * 8 * 64
    (between,) = found("all-reduce")  # the one of single devices sends nothing
    assert between.axis == "slice" and between.bytes == 4 * 1024 * 8 * 128


@pytest.mark.parametrize(("groups", "axis"), [
    ("[4,2]<=[8]", "tensor"),
    ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
    ("[2,4]<=[2,4]", "fsdp x tensor"),
    ("[4,2]<=[2,4]T(1,0)", "slice"),
    ("mesh['x'=2,'y'=4] {'y'}", "fsdp x tensor"),
    ("mesh['x'=2,'y'=4] {'y':(1)2}", "fsdp"),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", "slice"),
    ("{}", "slice x fsdp x tensor"),
])  # fmt: skip
def test_groups_of_devices_in_all_their_notations(groups: str, axis: str) -> None:
    text = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n"
        "  %x = f32[8]{0} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%sum\n"
        "}\n"
    )
    (collective,) = collectives(parse(text), MESH)
    assert collective.axis == axis
