"""GPUs by name, the modelled time of their instructions, and what they cannot compute in."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gemma_jax.config import ComputeConfig
from gemma_jax.errors import UserError
from gemma_jax.model.transformer import compute_dtype
from gemma_jax.planning import compiler
from gemma_jax.planning.gpu import CHIPS, Chip, GpuTopology
from gemma_jax.planning.hlo import parse
from gemma_jax.planning.roofline import with_times
from gemma_jax.planning.topology import parse_topology
from gemma_jax.training.hardware import peak_flops
from tests.messages import naming

MIB = 2**20


@pytest.mark.parametrize(("name", "slices", "chips", "shown"), [
    ("h100-8", 1, 8, "h100-8"),
    ("L4", 1, 1, "l4-1"),
    ("a100-80", 1, 1, "a100-80-1"),
    ("a100-40-16", 1, 16, "a100-40-16"),
    ("2x h100-8", 1, 16, "2 x h100-8"),
    ("4xh200-8", 4, 32, "4 x h200-8"),
    ("rtx-4090-2", 3, 6, "3 x rtx-4090-2"),
])  # fmt: skip
def test_names(name: str, slices: int, chips: int, shown: str) -> None:
    topology = parse_topology(name, slices)
    assert isinstance(topology, GpuTopology) and (topology.chips, str(topology)) == (chips, shown)


@pytest.mark.parametrize(("name", "slices", "told"), [
    ("h101-8", 1, "'h101-8' a100-40 a100-80 h100 h200 l4 t4 rtx-4090 h100-8"),
    ("h100-32", 1, "'h100-32' 32 16"),
    ("h100-0", 1, "'h100-0' 0 1"),
    ("999x h100-8", 1, "'999x 999 256"),
    ("2x h100-8", 3, "'2x 2 3"),
])  # fmt: skip
def test_gpus_that_there_are_not(name: str, slices: int, told: str) -> None:
    with pytest.raises(UserError, match=naming(*told.split())):
        parse_topology(name, slices)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_training_knows_the_peak_of_each_chip(chip: Chip) -> None:
    device: Any = SimpleNamespace(device_kind=chip.title)
    assert peak_flops([device, device]) == 2 * chip.flops


@pytest.mark.parametrize(("axes", "mesh", "network"), [
    ("tensor", {"fsdp": 2, "tensor": 8}, "node"),
    ("fsdp", {"fsdp": 2, "tensor": 8}, "network"),
    ("fsdp", {"slice": 2, "fsdp": 8}, "node"),
    ("slice", {"slice": 2, "fsdp": 8}, "network"),
    ("slice x fsdp", {"slice": 2, "fsdp": 8}, "network"),
    ("fsdp", {"fsdp": 16}, "network"),
])  # fmt: skip
def test_what_leaves_a_node(axes: str, mesh: dict[str, int], network: str) -> None:
    shape = {name: mesh.get(name, 1) for name in ("slice", "data", "fsdp", "tensor")}
    assert GpuTopology("h100", 8, 2).network_of(axes, shape) == network


PROGRAM = """HloModule program

%sliced (p0: bf16[4,1024,1024], p1: s32[]) -> bf16[1024,1024] {
  %p0 = bf16[4,1024,1024]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,1024,1024]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %flat = bf16[1024,1024]{1,0} bitcast(%slice)
}

%updated (q0: bf16[4,1024,1024], q1: bf16[1,1024,1024], q2: s32[]) -> bf16[4,1024,1024] {
  %q0 = bf16[4,1024,1024]{2,1,0} parameter(0)
  %q1 = bf16[1,1024,1024]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %new = bf16[4,1024,1024]{2,1,0} dynamic-update-slice(%q0, %q1, %q2, %q2, %q2)
}

%product (r0: bf16[8192,8192], r1: bf16[8192,8192]) -> bf16[8192,8192] {
  %r0 = bf16[8192,8192]{1,0} parameter(0)
  %r1 = bf16[8192,8192]{1,0} parameter(1)
  ROOT %dot = bf16[8192,8192]{1,0} dot(%r0, %r1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[4,1024,1024], b: bf16[8192,8192], c: f32[8192,8192], i: s32[]) -> bf16[8192,8192] {
  %a = bf16[4,1024,1024]{2,1,0} parameter(0)
  %b = bf16[8192,8192]{1,0} parameter(1)
  %c = f32[8192,8192]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %layer = bf16[1024,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced
  %one = bf16[1,1024,1024]{2,1,0} bitcast(%layer)
  %stack = bf16[4,1024,1024]{2,1,0} fusion(%a, %one, %i), kind=kLoop, calls=%updated
  %exact = f32[8192,8192]{1,0} dot(%c, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %of_cublas = (bf16[8192,8192]{1,0}, s8[4096]{0}) custom-call(%b, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %of_triton = bf16[8192,8192]{1,0} fusion(%b, %b), kind=kCustom, calls=%product
}
"""  # noqa: E501


def test_the_time_of_instructions() -> None:
    """Bytes of the part that is read or written alone; operations at the peak of their dtype."""
    times = {}
    for name in ("h100", "t4"):
        module = with_times(parse(PROGRAM), CHIPS[name])
        found = module.computations["main"].instructions
        times[name] = {one: 1e-9 * instruction.cycles for one, instruction in found.items()}
    one_layer, flops = 2 * 2 * MIB, 2 * 8192**3
    for name, bandwidth, peak, float32 in (("h100", 3352e9, 989e12, 66.9e12), ("t4", 320e9, 8.1e12, 8.1e12)):
        assert times[name] == {
            **dict.fromkeys(("a", "b", "c", "i", "one"), 0),
            **dict.fromkeys(("layer", "stack"), pytest.approx(one_layer / bandwidth, rel=1e-3)),
            **dict.fromkeys(("of_triton", "of_cublas"), pytest.approx(flops / peak, rel=1e-3)),
            "exact": pytest.approx(flops / float32, rel=1e-3),
        }


def gpu(capability: str, name: str) -> Any:
    device = SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=name)
    return SimpleNamespace(devices=np.array([device]))


def test_a_chip_without_bfloat16_computes_in_float16() -> None:
    t4, l4 = gpu("7.5", "Tesla T4"), gpu("8.9", "NVIDIA L4")
    assert compute_dtype(ComputeConfig(), t4) == np.float16
    assert compute_dtype(ComputeConfig(), l4) == compute_dtype(ComputeConfig(dtype="bfloat16"), l4)
    with pytest.raises(UserError, match=naming("compute.dtype", "bfloat16", "Tesla T4", "float16")):
        compute_dtype(ComputeConfig(dtype="bfloat16"), t4)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = parse_topology("h100-8")
    versions = {"jax-cuda13-plugin": "0.0.1", "jax-cuda13-pjrt": "0.0.1", "nvidia-cuda-nvcc": "13.0"}
    monkeypatch.setattr(compiler, "_version_of", versions.get)
    with pytest.raises(UserError, match=naming("nvidia-nvvm", "gemma_jax[gpu-compiler]")):
        compiler.prepare(topology)
    versions["nvidia-nvvm"] = "13.0"
    with pytest.raises(UserError, match=naming("jax-cuda13-plugin", "0.0.1", "jax")):
        compiler.prepare(topology)
