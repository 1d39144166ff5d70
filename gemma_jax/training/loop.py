"""The training loop: steps, evaluations and checkpoints, in the order that makes a run resumable."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import PretrainConfig, to_dict
from gemma_jax.data.packing import Batch
from gemma_jax.errors import UserError
from gemma_jax.sharding import put_batch
from gemma_jax.training.metrics import RunLog
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import StepMetrics, TrainStep

# A function of the parameters that gives `held_out_loss` and whatever else it measures.
Evaluate = Callable[[Any], dict[str, float]]


class Clock:
    """Time spent in steps, without the first one (which compiles), evaluations and saves."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.tokens = 0.0, 0, 0.0
        self._since: float | None = None

    def step_ended(self, tokens: float) -> None:
        """Count a step since the last end of one, if nothing else came between."""
        now = time.monotonic()
        if self._since is not None:
            self.seconds += now - self._since
            self.steps += 1
            self.tokens += tokens
        self._since = now

    def pause(self) -> None:
        """Something else begins: the time until the next step's end is not one step's."""
        self._since = None

    @property
    def tokens_per_second(self) -> float:
        """0 until two steps have been seen."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_a_step(self) -> float:
        """0 until two steps have been seen."""
        return self.seconds / self.steps if self.steps else 0.0


def train(
    config: PretrainConfig,
    mesh: Mesh,
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[Batch],
    evaluate: Evaluate | None,
    store: CheckpointStore,
    log: RunLog,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train from the step of `state` to the end, or until a stop is requested; save in either case.

    Args:
      config: of the run.
      mesh: that the state lies on.
      state: where to go on; its arrays are consumed.
      train_step: from `make_train_step`.
      batches: this process's rows of each global batch, from the step of `state` on.
      evaluate: measures held-out loss, or None.
      store: takes checkpoints.
      log: takes numbers.
      stop_requested: asked after every step.

    Returns:
      The state after the last step that was done.

    Raises:
      UserError: the loss is not finite; the last checkpoint before it stays.
    """
    clock, step = Clock(), int(state.step)
    pending: tuple[int, StepMetrics] | None = None

    def read(pending: tuple[int, StepMetrics] | None) -> None:
        """Fetch a step's numbers; while the next step runs, except at the end and before a save."""
        if pending is None:
            return
        at, metrics = pending[0], jax.device_get(pending[1])
        clock.step_ended(float(metrics.tokens))
        if not math.isfinite(metrics.loss) or not math.isfinite(metrics.grad_norm):
            raise UserError(
                f"the loss of step {at} is {metrics.loss} and its gradient norm {metrics.grad_norm}; lower "
                "optimizer.learning_rate, or resume from an earlier checkpoint with other data."
            )
        entry = {
            "step": at,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": at * config.data.batch_size * config.data.sequence_length,
            "tokens_per_second": clock.tokens_per_second,
            "time": time.time(),
        }
        left = (config.steps - at) * clock.seconds_a_step
        log.training(entry, left, announce=at % config.logging.every == 0 or at in (1, config.steps))

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == config.steps)

    while step < config.steps:
        batch = put_batch(next(batches), config.data.batch_size, mesh)
        state, metrics = train_step(state, batch)
        step += 1
        read(pending)
        pending = (step, metrics)
        stopping = stop_requested() and step < config.steps
        evaluating, saving = (
            evaluate is not None and due(config.evaluation.every),
            due(config.checkpoint.every),
        )
        if not (evaluating or saving or stopping):
            continue
        read(pending)
        pending = None
        measured: dict[str, float] = {}
        if evaluating and evaluate is not None:
            measured = evaluate(state.params)
            log.held_out({"step": step, **measured, "time": time.time()})
        if saving or stopping:
            store.save(
                step,
                state.params,
                state.opt_state,
                rows_seen=step * config.data.batch_size,
                config=to_dict(config),
                held_out_loss=measured.get("held_out_loss"),
            )
        clock.pause()
        if stopping:
            break
    read(pending)
    store.wait()
    return state
