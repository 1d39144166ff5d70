"""Measures the parameters while a run trains."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from gemma_jax.model import ModelSpec
from gemma_jax.sharding import put_batch
from gemma_jax.training.objectives import Objective, Sums
from gemma_jax.weights import NO_CONTEXT

StopRequested = Callable[[], bool]
Numbers = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Measures all parameters of the model every `every` steps, and after the last step."""

    name: str
    every: int
    measure: Callable[[nnx.State, StopRequested], Numbers | None]
    """Returns named numbers for the log, or None if a stop was requested before the measurement ended."""
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Texts for the log, by title, that `measure` may leave here."""


def mean_over(
    model: ModelSpec, objective: Objective, batches: Callable[[], Iterable[Any]], batch_size: int
) -> Callable[[nnx.State, StopRequested], Numbers | None]:
    """Returns a function that measures the mean of each of an objective's sums over some batches.

    Args:
      model: The model to measure.
      objective: The sums to measure.
      batches: Returns a new iterator over the batches, each with this process's rows only.
      batch_size: The number of rows in a global batch.
    """

    @jax.jit
    def sums_of(params: nnx.State, batch: Any) -> Sums:
        return objective(model.merge(params), batch, NO_CONTEXT)

    def measure(params: nnx.State, stop_requested: StopRequested) -> Numbers | None:
        sums: dict[str, Any] = {}
        for number, batch in enumerate(batches()):
            if number and stop_requested():
                return None
            for name, values in jax.device_get(
                sums_of(params, put_batch(batch, batch_size, model.mesh))
            ).items():
                sums[name] = sums.get(name, 0) + np.asarray(values, np.float64)
        return {name: float(total / weight) if weight else 0.0 for name, (total, weight) in sums.items()}

    return measure
