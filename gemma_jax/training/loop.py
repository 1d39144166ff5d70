"""The training loop: steps, evaluations and checkpoints, in the order that makes a run resumable."""

import collections
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import PretrainConfig, to_dict
from gemma_jax.data.loader import BatchIterator
from gemma_jax.errors import UserError
from gemma_jax.sharding import put_batch
from gemma_jax.training.hardware import peak_flops, peak_memory, training_flops_a_token
from gemma_jax.training.metrics import RunLog
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import StepMetrics, TrainStep

# A function of the parameters that gives `held_out_loss` and whatever else it measures.
Evaluate = Callable[[Any], dict[str, float]]

# Shows a person the batch of a step. What it needs on the devices has room: the run's own state is gone.
Replay = Callable[[int], None]

# Speed and time left are means over so many steps: not jumpy, and yet a slower machine shows.
_LATEST_STEPS = 50


class Clock:
    """Times of the latest steps, without the first one (which compiles), evaluations and saves."""

    def __init__(self) -> None:
        self._latest: collections.deque[tuple[float, float]] = collections.deque(maxlen=_LATEST_STEPS)
        self._since: float | None = None

    def step_ended(self, tokens: float) -> None:
        """Count a step since the last end of one, if nothing else came between."""
        now = time.monotonic()
        if self._since is not None:
            self._latest.append((now - self._since, tokens))
        self._since = now

    def pause(self) -> None:
        """Something else begins: the time until the next step's end is not one step's."""
        self._since = None

    @property
    def tokens_per_second(self) -> float:
        """0 until two steps have been seen."""
        seconds, tokens = map(sum, zip(*self._latest, strict=True)) if self._latest else (0.0, 0.0)
        return tokens / seconds if seconds else 0.0

    @property
    def seconds_a_step(self) -> float:
        """0 until two steps have been seen."""
        return sum(seconds for seconds, _ in self._latest) / len(self._latest) if self._latest else 0.0


def train(
    config: PretrainConfig,
    mesh: Mesh,
    state: TrainState,
    train_step: TrainStep,
    batches: BatchIterator,
    evaluate: Evaluate | None,
    replay: Replay,
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
      replay: shows the batch of a step whose loss or gradient is not finite, before the run ends.
      store: takes checkpoints.
      log: takes numbers.
      stop_requested: asked after every step.

    Returns:
      The state after the last step that was done.

    Raises:
      UserError: the loss or the gradient of a step is not finite; nothing is saved any more.
    """
    clock, step = Clock(), int(state.step)
    flops_a_token = training_flops_a_token(config.model, config.data.sequence_length)
    peak = peak_flops(mesh.devices.flat)
    written, waited = step, 0.0  # what the last line of the log counted
    pending: tuple[int, StepMetrics] | None = None

    def read(pending: tuple[int, StepMetrics] | None) -> None:
        """Fetch a step's numbers; while the next step runs, except at the end and before a save."""
        if pending is None:
            return
        nonlocal written, waited
        at, metrics = pending[0], jax.device_get(pending[1])
        clock.step_ended(float(metrics.tokens))
        if not math.isfinite(metrics.loss) or not math.isfinite(metrics.grad_norm):
            store.wait()
            # The update has spoilt the state, and the step that runs now is of no use either.
            for array in jax.tree.leaves(state):
                array.delete()
            replay(at)
            raise UserError(
                f"the loss of step {at} is {metrics.loss} and its gradient norm {metrics.grad_norm}; lower "
                "optimizer.learning_rate, or take the document that causes it out of the data."
            )
        speed, wait = clock.tokens_per_second, (batches.wait_seconds - waited) / (at - written)
        entry = {
            "step": at,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": at * config.data.batch_size * config.data.sequence_length,
            "tokens_per_second": speed,
            "flops_per_second": speed * flops_a_token,
            "input_wait_seconds": wait,
            "input_wait_share": wait / clock.seconds_a_step if clock.seconds_a_step else 0.0,
        }
        if peak is not None:
            entry["flops_utilisation"] = speed * flops_a_token / peak
        if at % config.logging.every == 0 or at in (1, config.steps):
            entry["peak_memory_bytes"] = peak_memory()
            written, waited = at, batches.wait_seconds
        log.training(entry, (config.steps - at) * clock.seconds_a_step)

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
            log.held_out({"step": step, **measured})
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
