"""Detects losses that are not finite and loss spikes, and decides when a run rolls back.

A spike is detected from the losses of past steps, and a resumed run must detect the same spikes. Therefore a
checkpoint holds the latest losses and the rows that were skipped after each spike.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from gemma_jax.config import StabilityConfig
from gemma_jax.errors import UserError
from gemma_jax.training.optimizer import LEAST_SCALE


@dataclasses.dataclass(frozen=True)
class Gap:
    """Rows of the data that a run skips: `rows` rows after step `after_step`."""

    after_step: int
    rows: int


class RollBack(Exception):
    """Raised when a run must roll back to an earlier checkpoint and continue from there with later data."""

    def __init__(self, step: int, to: int, gap: Gap) -> None:
        super().__init__(f"the loss has spiked at step {step}")
        self.to, self.gap = to, gap


class Stability:
    """The recent losses of a run, as many as spike detection needs, and the gaps in its data."""

    def __init__(self, config: StabilityConfig) -> None:
        self._config = config
        self.gaps: tuple[Gap, ...] = ()
        self.not_finite_in_a_row = 0
        self.skipped_steps = 0
        """The number of steps so far that were skipped because they were not finite."""
        self._losses: collections.deque[float] = collections.deque(
            maxlen=config.spike_window + config.spike_steps
        )

    def record(self) -> dict[str, Any]:
        """Returns the state as JSON values, for a checkpoint."""
        return {
            "gaps": [[gap.after_step, gap.rows] for gap in self.gaps],
            "not_finite_in_a_row": self.not_finite_in_a_row,
            "skipped_steps": self.skipped_steps,
            "losses": list(self._losses),
        }

    @classmethod
    def from_record(cls, config: StabilityConfig, record: Mapping[str, Any]) -> "Stability":
        """Restores the state from what `record` returned. An empty record makes the state of a new run."""
        self = cls(config)
        self.gaps = tuple(Gap(*gap) for gap in record.get("gaps", []))
        self.not_finite_in_a_row = record.get("not_finite_in_a_row", 0)
        self.skipped_steps = record.get("skipped_steps", 0)
        self._losses.extend(record.get("losses", []))
        return self

    def first_row(self, step: int, batch_size: int) -> int:
        """Returns the index of the first row of data that comes after `step` steps."""
        return step * batch_size + sum(gap.rows for gap in self.gaps if gap.after_step <= step)

    @property
    def next_is_last(self) -> bool:
        """Whether the run ends if its next loss or gradient is not finite."""
        return self.not_finite_in_a_row >= self._config.skip_nonfinite

    def record_step(self, loss: float, grad_norm: float, loss_scale: float = LEAST_SCALE) -> bool:
        """Record the numbers of the next step. Returns True if the step was not finite and so was skipped.

        If only its gradient was not, and the loss can be scaled by less, as it then is, the step is not
        counted among those in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.not_finite_in_a_row = 0
            self._losses.append(loss)
            return False
        self.not_finite_in_a_row += not (math.isfinite(loss) and loss_scale > LEAST_SCALE)
        self.skipped_steps += 1
        return True

    @property
    def spiking(self) -> bool:
        """Whether the latest steps are a spike: all their losses are far above the median of earlier losses.

        The standard deviation is estimated from the median absolute deviation, which a few high losses do not
        change (for a normal distribution it is 0.6745 standard deviations).
        """
        wanted = self._config.spike_window + self._config.spike_steps
        if not self._config.spike_threshold or len(self._losses) < wanted:
            return False
        losses = list(self._losses)
        before, latest = losses[: self._config.spike_window], losses[self._config.spike_window :]
        median = statistics.median(before)
        deviation = statistics.median(abs(loss - median) for loss in before) / 0.6745
        return min(latest) > median + self._config.spike_threshold * deviation

    def roll_back(self, step: int, checkpoints: Iterable[int], batch_size: int) -> RollBack | None:
        """Returns how to roll back after a spike that ends at `step`, or None if no checkpoint is old enough.

        The data continues after the batch of `step` and `stability.skip_batches` further batches.

        Args:
          step: The step at which the spike was detected.
          checkpoints: The steps that the run can roll back to. Those saved by a stop must not be among them,
            because a run that was never stopped must roll back to the same step.
          batch_size: The number of rows in a batch.

        Raises:
          UserError: The run has already rolled back `stability.max_rollbacks` times.
        """
        if len(self.gaps) >= self._config.max_rollbacks:
            raise UserError(
                f"the loss has spiked again at step {step}, after {len(self.gaps)} spikes that the run was "
                "rolled back for; lower optimizer.learning_rate, or raise stability.max_rollbacks."
            )
        first = step - self._config.spike_steps + 1
        old_enough = [saved for saved in checkpoints if saved < first - self._config.rollback_margin]
        if not old_enough:
            self._losses.clear()  # the run continues, perhaps on a new level of the loss
            return None
        to = max(old_enough)
        position = self.first_row(step, batch_size) + self._config.skip_batches * batch_size
        return RollBack(step, to, Gap(to, position - self.first_row(to, batch_size)))
