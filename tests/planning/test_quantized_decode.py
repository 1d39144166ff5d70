"""A step of decoding with quantised weights, by the real TPU compiler: two layers of the 2B's width."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from gemma_jax.config import PRESETS, ComputeConfig, DataConfig, PretrainConfig, replace
from gemma_jax.memory import stored_bytes
from gemma_jax.model import ModelSpec
from gemma_jax.planning.cache import PlanCache
from gemma_jax.planning.compiler import compile_lowered, devices_of
from gemma_jax.planning.hlo import executions, parse
from gemma_jax.planning.planner import Planner
from gemma_jax.planning.topology import parse_topology
from gemma_jax.sharding import named_arrays
from gemma_jax.testing import cpu_mesh
from gemma_jax.weights import Parameter, kind_of

CONFIG = PretrainConfig(
    model=replace(PRESETS["gemma_2b"], {"num_layers": 2, "vocab_size": 8192}),
    data=DataConfig(batch_size=8, sequence_length=128),
    compute=ComputeConfig(param_dtype="bfloat16"),
)
BANDWIDTH, CLOCK = 819e9, 1.503e9  # bytes a second and hertz of a v5e


def seconds(hlo: str, part: str) -> float:
    """Of a v5e for all instructions whose op_name has a part, by the compiler's own cycles."""
    found = [e for e in executions(parse(hlo)) if part in e.instruction.metadata("op_name")]
    assert found
    return sum(e.instruction.cycles * e.count for e in found) / CLOCK


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize(
    ("kind", "most"), [("int8", 1.3), ("int4", 2.1), ("int4:64", 2.1), ("int4:channel", 1.3)]
)
def test_a_matmul_reads_packed_bytes(kind: str, most: float) -> None:
    """It writes no dequantised copy, and takes hardly longer than reading the packed matrix."""
    place = SingleDeviceSharding(devices_of(parse_topology("v5e-1"))[0])
    about = Parameter("matrix", ("embed", "mlp"), (2048, 16384), 2048, 1, 0)
    weight = nnx.eval_shape(lambda: kind_of(kind)(about, cpu_mesh(1), nnx.Rngs(0), jnp.dtype("bfloat16")))
    structure, arrays = weight.parts()
    x = jax.ShapeDtypeStruct((8, 1, 2048), jnp.bfloat16, sharding=place)
    held = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arrays]
    program = jax.jit(lambda x, held: structure.weight(held).multiply(x), out_shardings=place)
    compiled = compile_lowered(program.lower(x, held), {})
    assert compiled.temporaries < 2**20
    packed = sum(stored_bytes(a.shape, a.dtype) for a in arrays)
    assert seconds(compiled.text, "") < most * packed / BANDWIDTH


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize("kind", ["int8", "int4", "int4:channel"])
def test_a_step_of_decoding_holds_no_dequantised_copy(tmp_path: Path, kind: str) -> None:
    """The smallest matrix of the feed-forward would take 64 MiB in bfloat16, and 16 MiB in int4."""
    plan = Planner(parse_topology("v5e-1"), PlanCache(tmp_path)).plan(CONFIG, "decode", 8, None, kind)
    assert plan.analysis is not None
    arrays = named_arrays(ModelSpec(CONFIG.model, CONFIG.compute, cpu_mesh(1), kind_of(kind)).params)
    held = sum(stored_bytes(x.shape, x.dtype) for x in arrays.values())
    assert held <= plan.analysis.memory["parameters"] < 1.02 * held
    assert plan.analysis.memory["temporaries"] < 2**22
