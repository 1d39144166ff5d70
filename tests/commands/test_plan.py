"""`gemma plan`: what it prints. CPU devices and a small program stand for TPUs and their compiler."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from gemma_jax.cli import main
from gemma_jax.commands.plan import REMAT_POLICIES, PlanOptions, variants
from gemma_jax.config import PRESETS, PretrainConfig, replace, to_json
from gemma_jax.planning.compiler import Compiled, OutOfMemory
from tests.messages import naming

PROGRAM = (Path(__file__).parents[1] / "planning" / "programs" / "loops.hlo").read_text(encoding="utf-8")
GIB = 2**30
compiled: list[Any] = []


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled.clear()

    def compile_lowered(lowered: jax.stages.Lowered, options: dict[str, str]) -> Compiled:
        compiled.append(options)
        rows = lowered.in_avals[0][1].tokens.shape[0] // 8
        if rows >= 4:
            raise OutOfMemory(20 * GIB, 16 * GIB, "RESOURCE_EXHAUSTED")
        return Compiled(PROGRAM, arguments=GIB, outputs=GIB, aliased=GIB, temporaries=rows * GIB)

    monkeypatch.setattr("gemma_jax.planning.planner.devices_of", lambda topology: jax.devices())
    monkeypatch.setattr("gemma_jax.planning.planner.compile_lowered", compile_lowered)
    monkeypatch.setattr("gemma_jax.planning.planner.peak_flops", lambda devices: 8 * 197e12)
    for module in ("gemma_jax.planning.planner", "gemma_jax.commands.plan_report"):
        monkeypatch.setattr(f"{module}.compiler_version", lambda topology: "libtpu 0, jax 0")
    monkeypatch.setattr("gemma_jax.planning.compiler.prepare", lambda topology: None)
    config = replace(
        PretrainConfig(model=PRESETS["gemma_tiny"]),
        {"data.sequence_length": 32, "data.batch_size": 8, "data.cache_dir": str(tmp_path / "cache")},
    )
    (tmp_path / "config.json").write_text(to_json(config))


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        status = main(["plan", str(tmp_path), "--topology", "v5e-8", *map(str, arguments)])
        return status, capsys.readouterr().out

    return run


def test_a_record_for_programs(plan: Callable[..., tuple[int, str]]) -> None:
    status, text = plan("--json", "--tokens", "20B", "--price", "1.2")
    record = json.loads(text)
    assert status == 0 and record["fits"] and record["chips"] == record["devices"] == 8
    assert record["needed_bytes"] == sum(record["memory_bytes"].values()) == 2 * GIB
    assert record["estimate"]["seconds"] > 0 and record["run"]["tokens"] == 20e9
    assert record["run"]["cost"] == pytest.approx(1.2 * record["run"]["chip_hours"])
    assert record["mesh"] == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1}
    assert {c["kind"] for c in record["collectives"]} >= {"all-gather", "reduce-scatter"}
    assert record["settings"]["model"]["embed_dim"] == 32


def test_what_is_known_is_not_compiled_again(plan: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    first = plan("--compute.tpu_options", "xla_a=1")
    assert plan("--compute.tpu_options", "xla_a=1") == first and compiled == [{"xla_a": "1"}]
    plan()
    assert len(compiled) == 2
    dump = tmp_path / "program.txt"
    plan("--dump_hlo", dump)
    assert dump.read_text() == PROGRAM and len(compiled) == 3


def test_a_program_that_does_not_fit(plan: Callable[..., tuple[int, str]]) -> None:
    status, page = plan("--data.batch_size", 32)
    assert status == 1 and re.search(naming("fit", "20.00", "16.00 GiB"), page)
    status, text = plan("--data.batch_size", 32, "--json")
    assert status == 1 and json.loads(text)["needed_bytes"] == 20 * GIB


def test_a_sweep_ranks_what_fits(plan: Callable[..., tuple[int, str]]) -> None:
    status, page = plan(
        "--sweep", "--sweep_tensor", 1, 2, "--sweep_remat", "full", "--sweep_rows", 1, 2, 4, 8
    )
    assert status == 0
    lines = page.splitlines()[2:]
    # On tensor 1 four rows do not fit, and eight are not tried; on tensor 2 a device's rows are half as many.
    fits = [line for line in lines if "not fit" not in line]
    assert len(fits) == 5 and len(lines) == 7 and all("full" in line for line in lines)
    assert [line for line in lines if "not fit" in line] == lines[len(fits) :]
    speeds = [float(line.split()[-3].replace(",", "")) for line in fits]
    assert speeds == sorted(speeds, reverse=True)


def test_variants_that_cannot_be_are_left_out() -> None:
    config = replace(PretrainConfig(model=PRESETS["gemma_tiny"]), {"data.sequence_length": 32})
    options = PlanOptions(sweep_tensor=(1, 3, 8), sweep_remat=("full",), sweep_rows=(2, 1))
    found = list(variants(config, 8, options))
    # 3 does not divide 8 devices; fewest rows first.
    shapes = [(c.mesh.fsdp, c.mesh.tensor, c.data.batch_size) for c in found]
    assert shapes == [(8, 1, 8), (8, 1, 16), (1, 8, 1), (1, 8, 2)]
    assert {c.compute.remat for c in variants(config, 8, PlanOptions())} == set(REMAT_POLICIES)
