"""The real GPU compiler on a machine without a GPU: two layers of the models' real shapes.

It is found in the folder of `make test-slow` if the environment has PYTHONPATH=.venv/gpu-compiler.
"""

import json
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from gemma_jax.cli import main
from gemma_jax.config import (
    PRESETS,
    ComputeConfig,
    DataConfig,
    ExampleDataConfig,
    FinetuneConfig,
    LoraConfig,
    MeshConfig,
    PretrainConfig,
    replace,
)
from gemma_jax.errors import UserError
from gemma_jax.model.attention import self_attend
from gemma_jax.planning.cache import PlanCache
from gemma_jax.planning.compiler import GPU_OPTIONS, Compiled, compile_lowered, devices_of, prepare
from gemma_jax.planning.hlo import executions, parse
from gemma_jax.planning.planner import Plan, Planner
from gemma_jax.planning.topology import parse_topology
from gemma_jax.sharding import make_mesh

GIB, MIB = 2**30, 2**20
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def gpu_compiler() -> None:
    try:
        prepare(parse_topology("h100-8"))
    except UserError as error:
        pytest.skip(str(error))


TRAINING = PretrainConfig(
    model=replace(PRESETS["gemma_2b"], {"num_layers": 2}),
    data=DataConfig(batch_size=8, sequence_length=8192),
    compute=ComputeConfig(remat="attention", loss_vocab_block=16_000),
)
QLORA = FinetuneConfig(
    model=replace(PRESETS["gemma_7b"], {"num_layers": 2}),
    data=ExampleDataConfig(batch_size=1, sequence_length=2048),
    lora=LoraConfig(rank=16),
    quantization="nf4",
    compute=ComputeConfig(param_dtype="bfloat16", remat="full", loss_vocab_block=16_000),
)


def plan_of(tmp_path: Path, topology: str, config, mode="pretrain", quantization="") -> tuple[Plan, str]:
    """Returns the plan and the text of the program."""
    dump = tmp_path / "program.txt"
    planner = Planner(parse_topology(topology), PlanCache(tmp_path))
    plan = planner.plan(config, mode, 64, dump, quantization)
    return plan, dump.read_text()


def test_fully_sharded_training(tmp_path: Path) -> None:
    """Weights are gathered and gradients scattered in bfloat16; the state is updated in place."""
    plan, _ = plan_of(tmp_path, "h100-8", TRAINING)
    analysis, figures = plan.analysis, plan.estimate
    assert analysis and figures and plan.fsdp
    # Two layers use the kernel forward and backward once: with this policy its output is kept.
    kernels = Counter[str]()
    for kernel in analysis.kernels:
        assert kernel.attention and kernel.flops > 0
        kernels[kernel.name] += kernel.count
    assert kernels == {"mha_forward": 2, "mha_backward": 2}
    sums = Counter[tuple[str, str]]()
    for collective in analysis.collectives:
        assert collective.axis == "fsdp"
        wide = any(array.startswith("f32") and math.prod(map(int, array[4:-1].split(","))) > 2**16
                   for array in collective.arrays if array != "f32[]")  # fmt: skip
        assert not wide, collective
        sums[collective.kind, "bytes"] += collective.bytes
    parameters = 8 * analysis.memory["parameters"] / 4
    assert 0.9 < sums["reduce-scatter", "bytes"] / (2 * parameters * 7 / 8) < 1.05
    assert sums["all-reduce", "bytes"] < MIB
    assert plan.fsdp[0] < 1.4 * plan.fsdp[1]
    assert analysis.memory["outputs"] < MIB and analysis.memory["padding"] < MIB
    assert figures.link_seconds.keys() == {"node"} and 0.2 < (figures.utilisation or 0) < 0.8


def test_two_nodes(tmp_path: Path) -> None:
    """Between nodes each GPU sums its eighth of the gradients; the embedding has two of them."""
    config = replace(TRAINING, {"mesh.slice": 2, "data.batch_size": 16, "data.sequence_length": 1024})
    plan, _ = plan_of(tmp_path, "2x h100-8", config)
    assert plan.analysis and plan.estimate
    assert plan.estimate.link_seconds.keys() == {"node", "network"}
    assert {c.axis for c in plan.analysis.collectives if c.kind == "all-gather"} == {"fsdp"}
    between = sum(c.bytes for c in plan.analysis.collectives if c.axis == "slice")
    assert 0.5 * plan.analysis.memory["parameters"] <= between <= 1.3 * plan.analysis.memory["parameters"]


def attention(topology: str, length: int, heads: int, kv_heads: int, dtype: str = "bfloat16") -> Compiled:
    """Compiles value and gradients of attention of a row of packed segments."""
    mesh = make_mesh(MeshConfig(), devices_of(parse_topology(topology)))
    shapes = [((1, length, n, 256), jnp.dtype(dtype)) for n in (heads, kv_heads, kv_heads)]
    shapes += [((1, length), jnp.dtype("int32"))] * 2
    arguments = [jax.ShapeDtypeStruct(*s, sharding=NamedSharding(mesh, P())) for s in shapes]

    def loss(q, k, v, positions, segments):
        return jnp.sum(self_attend(q, k, v, positions, segments, mesh).astype(jnp.float32) ** 2)

    with use_abstract_mesh(mesh.abstract_mesh):
        return compile_lowered(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments), GPU_OPTIONS)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (16, 16)], ids=["multi-query", "multi-head"])
def test_memory_of_attention_is_linear_in_the_length(heads: int, kv_heads: int) -> None:
    half, whole = (attention("h100", length, heads, kv_heads) for length in (4096, 8192))
    assert "mha_forward" in whole.text and "mha_backward" in whole.text
    assert whole.temporaries < 2.1 * half.temporaries
    assert whole.temporaries <= 4 * heads * 8192**2 / 8
    # Keys are read where they are: no array is as large as copies of them for each query head.
    if kv_heads == 1:
        copies = [e for e in executions(parse(whole.text)) if f"[1,8192,{heads},1,256]" in e.instruction.type]
        assert not copies


@pytest.mark.parametrize("topology", ["a100-40", "l4", "rtx-4090"])
def test_blocks_of_attention_fit_each_chip(topology: str) -> None:
    assert "mha_backward" in attention(topology, 1024, 16, 16).text


@pytest.mark.parametrize("kind", ["", "int8", "int4"])
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_sampling_makes_no_copy_of_a_weight_in_bfloat16(tmp_path: Path, mode: str, kind: str) -> None:
    model = replace(PRESETS["gemma_7b"], {"num_layers": 2})
    config = PretrainConfig(
        model=model,
        data=DataConfig(batch_size=8, sequence_length=1024),
        compute=ComputeConfig(param_dtype="bfloat16"),
    )
    plan, text = plan_of(tmp_path, "h100", config, mode, kind)
    assert plan.analysis and plan.estimate
    if mode == "prefill":
        assert {kernel.name for kernel in plan.analysis.kernels} == {"mha_forward"}
        return
    assert plan.estimate.read_seconds <= plan.estimate.seconds
    smallest = model.embed_dim * model.num_heads * model.head_dim  # elements of a weight
    found = [
        e.instruction
        for e in executions(parse(text))
        if e.instruction.opcode in ("fusion", "copy", "convert", "custom-call")
        and "scatter" not in e.instruction.name  # the cache, which is written in place
        for array in e.instruction.arrays
        if array.dtype in ("bf16", "f32") and math.prod(array.shape) >= smallest
    ]
    assert kind == "" or not found, found


def test_qlora_makes_the_weights_of_one_layer_dense_at_a_time(tmp_path: Path) -> None:
    """Two more layers take no more memory than what is kept of them: their inputs and adapters."""
    two, four = (
        plan_of(tmp_path, "h100", replace(QLORA, {"model.num_layers": n}), "finetune")[0].analysis
        for n in (2, 4)
    )
    assert two and four
    dense = 2 * 3 * QLORA.model.embed_dim * QLORA.model.hidden_dim  # of the feed-forward, in bytes
    assert four.memory["temporaries"] - two.memory["temporaries"] < 0.2 * dense
    assert four.memory["temporaries"] < 4 * dense


def test_a_chip_without_bfloat16_computes_in_float16(tmp_path: Path) -> None:
    config = replace(QLORA, {"data.sequence_length": 512})
    plan, text = plan_of(tmp_path, "t4", config, "finetune")
    assert plan.analysis and not plan.analysis.kernels and plan.analysis.memory["parameters"] < 2 * GIB
    # The products with the base's weights, of which there are seven in a layer, have float16 operands.
    large = [
        e
        for e in executions(parse(text))
        if "cublas" in e.instruction.attributes and max(a.bytes for a in e.operand_arrays) >= 24 * MIB
    ]
    assert sum(e.count for e in large) >= 2 * 2 * 7
    for e in large:
        assert [array.dtype for array in e.operand_arrays][:2] == ["f16", "f16"], e.instruction.name


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--model.num_layers", "2", "--data.batch_size", "2", "--data.sequence_length", "512"]
    changes += ["--data.cache_dir", str(tmp_path)]
    command = ["plan", "gemma_2b", "--topology", "a100-80-2", *changes]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"] and record["topology"] == "a100-80-2" and record["devices"] == 2
    assert "nvcc" in record["compiler"] and any("roofline" in told for told in record["assumptions"])
    assert main(command) == 0
    assert "roofline" in capsys.readouterr().out
    # An L4 has 22.5 GiB, of which 90% may be used; the float32 state of these two layers takes 8.
    assert main(["plan", "gemma_2b", "--topology", "l4", "--model.num_layers", "8", *changes[2:]]) == 1
    assert main([*command, "--compute.gpu_options", "xla_gpu_none=1"]) == 2
    assert "xla_gpu_none" in capsys.readouterr().err
