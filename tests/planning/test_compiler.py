"""The real TPU compiler on a machine without a TPU: what the train step becomes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

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
from gemma_jax.planning.cache import PlanCache
from gemma_jax.planning.compiler import devices_of, memory_told
from gemma_jax.planning.hlo import executions, parse
from gemma_jax.planning.planner import Plan, Planner
from gemma_jax.planning.topology import Topology, parse_topology
from gemma_jax.planning.traffic import origin
from gemma_jax.sharding import make_mesh
from gemma_jax.weights import fsdp
from tests.messages import naming

# Two layers of the 2B model's shape, a quarter as wide: dimensions that the TPU's tiles divide.
SHALLOW = PretrainConfig(
    model=replace(
        PRESETS["gemma_2b"],
        {"num_layers": 2, "embed_dim": 512, "hidden_dim": 2048, "num_heads": 4, "head_dim": 128}
        | {"vocab_size": 8192},
    ),
    data=DataConfig(batch_size=4, sequence_length=256),
    compute=ComputeConfig(remat="full"),
)


NO_WINDOWED_EINSUM = ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)


@pytest.mark.parametrize(("message", "needed", "available"), [
    ("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5, 15.75),
    ("RESOURCE_EXHAUSTED: something new", None, None),
])  # fmt: skip
def test_what_the_compiler_says_of_memory(
    message: str, needed: float | None, available: float | None
) -> None:
    gib = 2**30
    wanted = (needed and needed * gib, available and available * gib)
    assert memory_told(message) == wanted


@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize(("name", "mesh", "sizes"), [
    ("v5e-1", {}, (1,)),
    ("v5e-8", {}, (2, 4)),
    ("v5e-16", {}, (4, 4)),  # jax would wind a ring through it
    ("v5e-16", {"slice": 2, "tensor": 2}, (2, 4)),
    ("v5e-256", {}, (16, 16)),
    ("v5e-256", {"tensor": 4}, (4, 16)),
    ("v5p-128", {"tensor": 4}, (4, 4)),
    ("v5p-128", {}, (4, 4, 4)),
    ("v5p-128", {"tensor": 2}, (2, 4, 4)),  # jax.make_mesh refuses it: no dimension has two
    ("tpu7x-8", {}, (2, 2, 2)),  # two devices a chip
])  # fmt: skip
def test_the_fsdp_axis_follows_the_torus(name: str, mesh: dict[str, int], sizes: tuple[int, ...]) -> None:
    devices = devices_of(parse_topology(name, mesh.get("slice", 1)))
    made = make_mesh(MeshConfig(**mesh), devices)
    assert fsdp.stages(made) == sizes
    for line in np.moveaxis(made.devices, 2, -1).reshape(-1, made.shape["fsdp"]):
        places = np.array([(*d.coords, d.core_on_chip) for d in line]).reshape(*sizes, 4)
        for axis in range(len(sizes)):  # along one stage one coordinate changes
            moved = np.diff(np.moveaxis(places, axis, 0), axis=0).reshape(-1, 4)
            assert ((moved != 0).sum(axis=-1) == 1).all() or sizes == (1,)
    for line in made.devices.reshape(-1, made.shape["tensor"]):  # neighbours on the tensor axis have a link
        places = np.array([(*device.coords, device.core_on_chip) for device in line])
        assert (np.abs(np.diff(places, axis=0)).sum(axis=-1) == 1).all()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PlanCache:
    return PlanCache(tmp_path_factory.mktemp("plans"))


@pytest.fixture(scope="module")
def plan(tpu_compiler: None, cache: PlanCache) -> Plan:
    """The plan of a small model on four chips, compiled once for all tests."""
    return Planner(parse_topology("v5e-4"), cache).plan(SHALLOW)


def test_memory_of_the_real_step(plan: Plan) -> None:
    """Parameters are a quarter on each of four chips, Adam's moments twice that, and all is donated."""
    model = SHALLOW.model
    weights = 512 * (2 * 4 * 128 + 2 * 128 + 3 * 2048) + 2 * 512
    parameters = 4 * (8192 * 512 + 2 * weights + 512) // 4
    assert plan.analysis is not None and model.num_layers == 2
    memory = plan.analysis.memory
    assert memory["parameters"] == parameters
    assert 2 * parameters <= memory["optimizer"] <= 2 * parameters + 100
    assert memory["batch"] == 5 * 4 * 256
    assert memory["outputs"] < 10_000 and 0 <= memory["padding"] < 0.02 * parameters
    assert 0 < memory["temporaries"] < 64 * 2**20


def test_traffic_of_the_real_step(plan: Plan) -> None:
    """Parameters are gathered over fsdp in bfloat16, gradients scattered; little else is sent."""
    assert plan.analysis is not None and plan.fsdp is not None
    found = plan.analysis.collectives
    assert {c.axis for c in found} == {"fsdp"}
    assert not [c for c in found if c.kind == "collective-permute"], "a windowed einsum"
    gathered = sum(c.bytes for c in found if c.kind == "all-gather")
    assert not [c for c in found if c.kind == "all-gather" and c.bytes > 1e5 and "f32" in c.arrays[0]]
    received, least = plan.fsdp
    assert 0.3 * least < gathered < least
    assert least < received < 1.1 * least


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_a_frozen_base_of_4_bits_is_gathered_as_it_is_stored(cache: PlanCache) -> None:
    """Once in the forward and once in the backward pass, with its scales; no gradient of it is exchanged."""
    config = FinetuneConfig(
        model=SHALLOW.model,
        data=ExampleDataConfig(batch_size=8, sequence_length=256),
        quantization="nf4",
        lora=LoraConfig(rank=4),
        mesh=MeshConfig(fsdp=8),
    )
    plan = Planner(parse_topology("v5e-8"), cache).plan(config, "finetune")
    assert plan.analysis is not None
    packed = sum(
        p.item_bytes * np.prod(p.shape) * p.layers
        for p in plan.program.parameters
        if p.name.startswith("blocks.") and ".base." in p.name
    )
    received: dict[str, float] = {}
    for c in plan.analysis.collectives:
        names = origin(c, plan.program.parameters).parameters
        if any(name.startswith("blocks.") and ".base." in name for name in names):
            received[c.kind] = received.get(c.kind, 0) + c.bytes
    assert received.pop("all-gather") == pytest.approx(2 * 7 / 8 * packed, rel=0.1)
    assert sum(received.values()) < 0.2 * packed  # adapters; a gradient of the base would be 4 times as large


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize("topology", ["v5e-16", "v6e-16"])
def test_over_two_dimensions_of_the_torus_gradients_are_still_scattered(
    topology: str, cache: PlanCache
) -> None:
    """Left to the compiler they would be all-reduces there, of twice the bytes."""
    changes = {"data.batch_size": 16, "model.embed_dim": 2048, "compute.loss_vocab_block": 8192}
    config = replace(SHALLOW, {**changes, "compute.tpu_options": NO_WINDOWED_EINSUM})
    plan = Planner(parse_topology(topology), cache).plan(config)
    assert plan.analysis is not None and plan.fsdp is not None
    summed = dict.fromkeys(("all-reduce", "reduce-scatter"), 0.0)
    for collective in plan.analysis.collectives:
        if collective.kind in summed:
            summed[collective.kind] += collective.bytes
    gradients = 2 * 16 * plan.analysis.memory["parameters"] / 4  # in bfloat16, of all sixteen parts
    assert 0.9 * gradients < summed["reduce-scatter"] < 1.01 * gradients
    assert summed["all-reduce"] < 0.02 * gradients


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_products_of_a_wide_layer_run_near_the_peak(cache: PlanCache, tmp_path: Path) -> None:
    """With the norm or the gelu computed within them the compiler gives some a third more."""
    model = replace(PRESETS["gemma_7b"], {"num_layers": 1, "vocab_size": 8192})
    compute = ComputeConfig(remat="attention", dtype="bfloat16")
    data = DataConfig(batch_size=4, sequence_length=2048)
    config = PretrainConfig(model=model, data=data, compute=compute, mesh=MeshConfig(fsdp=4))
    Planner(parse_topology("v5e-4"), cache).plan(config, dump_hlo=tmp_path / "hlo.txt")
    at_peak = 2 * 2048 * model.embed_dim * model.hidden_dim / 197e12 * 1.503e9  # in cycles
    found = executions(parse((tmp_path / "hlo.txt").read_text()))
    products = [x.instruction for x in found if "dot_general" in x.instruction.metadata("op_name")]
    of_feed_forward = [x.cycles / at_peak for x in products if x.cycles > 0.9 * at_peak]
    assert len(of_feed_forward) == 3 + 2 + 6  # forward, computed again, backward
    assert np.mean(of_feed_forward) < 1.15


def test_time_of_the_real_step(plan: Plan) -> None:
    """Loops are counted: the model cannot be done faster than the peak, nor is it a thousandth of it."""
    assert plan.analysis is not None and plan.estimate is not None
    assert plan.analysis.uncounted_loops == 0
    assert plan.estimate.utilisation is not None and 0.01 < plan.estimate.utilisation < 1


@pytest.mark.usefixtures("tpu_compiler")
def test_a_program_that_is_too_large_does_not_fit(cache: PlanCache) -> None:
    huge = replace(SHALLOW, {"model.vocab_size": 8_192_000, "data.batch_size": 1, "compute.loss_block": 256})
    plan = Planner(parse_topology("v5e-1"), cache).plan(huge)
    assert plan.analysis is None and plan.estimate is None
    assert plan.entry.needed is not None and plan.entry.needed > 16 * 2**30


@pytest.mark.usefixtures("tpu_compiler")
def test_meshes_and_devices_that_cannot_be(cache: PlanCache) -> None:
    planner = Planner(parse_topology("v5e-4", 2), cache)
    with pytest.raises(UserError, match=naming("mesh.slice", 1, 2)):
        planner.plan(replace(SHALLOW, {"data.batch_size": 8}))
    unheard_of = dataclasses.replace(planner.topology.generation, name="v99")
    with pytest.raises(UserError, match=naming("v99:2x2")):
        devices_of(Topology(unheard_of, (2, 2), 1))


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_programs_of_sampling(mode: str, cache: PlanCache) -> None:
    plan = Planner(parse_topology("v5e-4"), cache).plan(SHALLOW, mode)
    assert plan.analysis is not None and plan.estimate is not None
    # A step of decode ends when the rows do: its loop has no fixed length.
    assert plan.analysis.uncounted_loops == (1 if mode == "decode" else 0)
    assert plan.analysis.memory["parameters"] > 0 and plan.estimate.tokens_per_second > 0


@pytest.mark.slow
@pytest.mark.usefixtures("tpu_compiler")
def test_gradients_go_between_slices_and_parameters_do_not(cache: PlanCache) -> None:
    config = replace(SHALLOW, {"mesh.slice": 2, "data.batch_size": 8})
    plan = Planner(parse_topology("v5e-4", 2), cache).plan(config)
    assert plan.analysis is not None and plan.estimate is not None
    between = [c for c in plan.analysis.collectives if c.axis == "slice"]
    # Each of four devices sums its quarter of the gradients, in bfloat16 or float32, with the other slice.
    summed = sum(c.bytes for c in between if c.kind == "all-reduce")
    quarter = plan.analysis.memory["parameters"]
    assert 0.5 * quarter <= summed <= 1.1 * quarter
    assert max(between, key=lambda c: c.bytes).kind == "all-reduce"
    assert set(plan.estimate.link_seconds) == {"ici", "dcn"}
