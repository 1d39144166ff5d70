"""Compiles the programs of sampling before there are prompts or weights.

The programs go into the cache of compiled programs, where later processes find them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from gemma_jax.config import SamplingConfig
from gemma_jax.model import ModelSpec
from gemma_jax.sampling.batch import complete_requests
from gemma_jax.sampling.generate import Generator
from gemma_jax.sampling.requests import Completion, requests_of


def precompile(spec: ModelSpec, config: SamplingConfig, end_tokens: Sequence[int], prompts: int) -> int:
    """Compiles what sampling needs for prompts of every length, and returns the number of programs.

    Args:
      spec: The model.
      config: The settings of sampling.
      end_tokens: The end tokens of the model.
      prompts: How many prompts, each with `config.samples`, are processed at once.

    Raises:
      UserError: as `Generator.check`, or so many prompts do not fit into memory.
    """
    generator = Precompiler(spec, spec.params)
    # As many rows as those prompts will have, of the shortest length.
    rows = dataclasses.replace(config, samples=prompts * config.samples, batch_size=0)
    generator.check_memory([[0]], [rows])
    longest = spec.config.context_length - 1
    # The shortest and the longest prompt of each bucket: their caches may differ.
    powers = [1 << power for power in range(4, longest.bit_length() + 1)]
    for length in sorted({min(n, longest) for power in powers for n in (power // 2 + 1, power)}):
        # Prompts that begin with different tokens, for a common beginning is computed by other programs.
        ids = [[index % spec.config.vocab_size] * length for index in range(prompts)]
        requests = requests_of(ids, config, end_tokens)
        for _ in complete_requests(generator, requests, [Completion() for _ in requests]):
            pass
    return len(generator.compiled)


class Precompiler(Generator):
    """A Generator whose programs are compiled, not run: they return shapes, and tokens of id 0."""

    def __init__(self, spec: ModelSpec, params: nnx.State) -> None:
        super().__init__(spec, params)
        self.compiled: dict[str, Any] = {}  # what each program returns, by its name and arguments
        self._made = 0
        for name in ("prefill", "empty_slots", "begin", "refill", "decode", "grown"):
            setattr(self, name, functools.partial(self._call, name, getattr(self, name)))

    def _call(self, name: str, program: Any, *args: Any, **static: Any) -> Any:
        key = f"{name} {jax.tree.map(np.shape, args)} {static}"
        if key not in self.compiled:
            lowered = program.lower(*args, **static)
            self.compiled[key] = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                lowered.out_info,
                lowered.compile().output_shardings,
            )
        made = self.compiled[key]
        if name not in ("begin", "refill", "decode"):
            return made
        slots, report = made
        self._made = self._made + args[2] if name == "decode" else 1
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), report)
        return slots, zeros._replace(counts=zeros.counts + self._made)
