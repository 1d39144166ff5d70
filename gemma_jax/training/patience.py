"""Ends a run whose evaluations no longer improve."""

import math
from collections.abc import Mapping
from typing import Any

from gemma_jax.config import TrainingConfig


class Patience:
    """Counts evaluations since the lowest one (early stopping)."""

    def __init__(self, limit: int, name: str, history: Mapping[str, Any] | None = None) -> None:
        """Args:
        limit: The number of evaluations without a lower one that ends the run; 0 never does.
        name: The number of an evaluation that is compared.
        history: The history in the record of the checkpoint that the run resumes from.
        """
        self._limit, self._name = limit, name
        best, since = (history or {}).get("patience", (math.inf, 0))
        self._best, self._since = float(best), int(since)

    @classmethod
    def of(cls, config: TrainingConfig, history: Mapping[str, Any] | None = None) -> "Patience":
        """Returns the patience of a config's run."""
        return cls(config.evaluation.patience, config.checkpoint.keep_best_by, history)

    def __str__(self) -> str:
        """Says what has been counted."""
        return f"{self._name} has not been below {self._best:.4g} in {self._since} evaluations"

    @property
    def spent(self) -> bool:
        """Whether the run ends."""
        return 0 < self._limit <= self._since

    def is_over(self, evaluated: Mapping[str, Mapping[str, float]]) -> bool:
        """Counts the evaluations of a step, by evaluator; returns whether the run ends."""
        for numbers in evaluated.values():
            if self._name in numbers:
                lower = numbers[self._name] < self._best
                self._best = min(self._best, numbers[self._name])
                self._since = 0 if lower else self._since + 1
        return self.spent and bool(evaluated)

    def record(self) -> dict[str, Any]:
        """Returns what `history` needs, as JSON."""
        return {"patience": [self._best, self._since]} if math.isfinite(self._best) else {}
