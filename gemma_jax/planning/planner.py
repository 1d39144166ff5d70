"""Makes plans: compiles a config for a topology, analyses the program and estimates its speed."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh, use_abstract_mesh

from gemma_jax.config import TrainingConfig, validate_on_devices
from gemma_jax.planning.analysis import Analysis, analyse
from gemma_jax.planning.cache import Entry, PlanCache, key_of
from gemma_jax.planning.compiler import (
    GPU_OPTIONS,
    OutOfMemory,
    compile_lowered,
    compiler_version,
    devices_of,
)
from gemma_jax.planning.estimate import Estimate, estimate
from gemma_jax.planning.gpu import GpuTopology
from gemma_jax.planning.programs import Mode, Program, lower
from gemma_jax.planning.topology import AnyTopology
from gemma_jax.planning.traffic import fsdp_minimum, fsdp_traffic
from gemma_jax.sharding import make_mesh
from gemma_jax.streams import progress
from gemma_jax.training.hardware import peak_flops


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of one program on one topology."""

    topology: AnyTopology
    devices: int
    mesh_shape: Mapping[str, int]
    program: Program
    entry: Entry
    estimate: Estimate | None  # None if it does not fit
    fsdp: tuple[float, float] | None  # bytes per step that a device receives over fsdp, and the minimum

    @property
    def analysis(self) -> Analysis | None:
        """The analysis of the program; None if it does not fit."""
        return self.entry.analysis

    @property
    def devices_a_chip(self) -> int:
        """Devices per chip: 2 for tpu7x, where each TensorCore is a device."""
        return self.devices // self.topology.chips


class Planner:
    """Makes plans for one topology, whose devices are created only once."""

    def __init__(self, topology: AnyTopology, cache: PlanCache) -> None:
        self.topology = topology
        self.devices = devices_of(topology)
        self._cache = cache

    def plan(
        self,
        config: TrainingConfig,
        mode: Mode = "pretrain",
        new_tokens: int = 128,
        dump_hlo: Path | None = None,
        quantization: str = "",
    ) -> Plan:
        """Compile a config's program, or use the cached result, and make a plan of it.

        Args:
          config: The config of the run, which includes the mesh of the topology's devices.
          mode: Which program of the config to plan.
          new_tokens: For prefill and decode, the room in the key/value cache after the prompts, in tokens.
          dump_hlo: A file for the text of the compiled program, which is then always compiled again.
          quantization: See `programs.lower`.

        Raises:
          UserError: The config does not fit the devices, or the compiler refuses an option.
        """
        validate_on_devices(config, len(self.devices))
        mesh = make_mesh(config.mesh, self.devices)
        chip = self.topology.chip if isinstance(self.topology, GpuTopology) else None
        # Without a GPU, Pallas finds in the mesh what it compiles for.
        with use_abstract_mesh(mesh.abstract_mesh) if chip else contextlib.nullcontext():
            program = lower(mode, config, mesh, new_tokens, quantization)
        given = config.compute.gpu_options if chip else config.compute.tpu_options
        options = dict(option.split("=", 1) for option in given) | (GPU_OPTIONS if chip else {})
        name = f"{self.topology.slices} x {self.topology.compiler_name}, {list(mesh.shape.items())}"
        name += self.topology.target if isinstance(self.topology, GpuTopology) else ""
        key = key_of(program.lowered.as_text(), name, options, compiler_version(self.topology))
        entry = None if dump_hlo else self._cache.get(key)
        if entry is None:
            progress(f"compiling for {self.topology}, which can take minutes")
            entry = self._compile(program, options, mesh, dump_hlo)
            self._cache.put(key, entry)
        available = self.topology.memory * self.topology.chips // len(self.devices)
        needed = sum(entry.analysis.memory.values()) if entry.analysis else 0
        if needed > available:  # the compiler does not reject all such programs (benchmarks/LOG.md)
            entry = Entry(None, needed, available)
        figures, fsdp = None, None
        if entry.analysis:
            peak = peak_flops(self.devices)
            assert peak is not None  # every generation of topology.py is in the table
            work = program.tokens, program.model_flops, program.cache_bytes
            figures = estimate(entry.analysis, self.topology, peak, dict(mesh.shape), *work)
        if entry.analysis and mode in ("pretrain", "finetune") and mesh.shape["fsdp"] > 1:
            passes = config.optimizer.accumulation_steps
            least = fsdp_minimum(program.parameters, mesh.shape["fsdp"], passes)
            fsdp = (fsdp_traffic(entry.analysis.collectives), least)
        return Plan(self.topology, len(self.devices), dict(mesh.shape), program, entry, figures, fsdp)

    def _compile(self, program: Program, options: Mapping[str, str], mesh: Mesh, dump: Path | None) -> Entry:
        chip = self.topology.chip if isinstance(self.topology, GpuTopology) else None
        try:
            with use_abstract_mesh(mesh.abstract_mesh) if chip else contextlib.nullcontext():
                compiled = compile_lowered(program.lowered, options)
        except OutOfMemory as error:
            return Entry(None, error.needed, error.available)
        if dump:
            dump.write_text(compiled.text, encoding="utf-8")
        return Entry(analyse(compiled, program.argument_bytes, dict(mesh.shape), chip))
