"""The training loop: steps, evaluations and checkpoints, in the order that makes a run resumable."""

import collections
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import TrainingConfig, to_dict
from gemma_jax.data.loader import BatchIterator
from gemma_jax.errors import UserError
from gemma_jax.sharding import put_batch
from gemma_jax.training.goodput import Goodput
from gemma_jax.training.hardware import peak_flops, peak_memory, training_flops_a_token
from gemma_jax.training.metrics import RunLog
from gemma_jax.training.profile import Profiler
from gemma_jax.training.stability import Stability
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import StepMetrics, TrainStep

StopRequested = Callable[[], bool]

# A function of the parameters that gives `held_out_loss` and whatever else it measures; None if a stop was
# requested before it was done.
Evaluate = Callable[[Any, StopRequested], dict[str, float] | None]

# Shows a person the batch of a step, from its first row on, with the parameters that the step began with, and
# says in half a sentence what of it is not finite. It has room on the devices: the optimizer's state is gone.
Replay = Callable[[int, int, Any], str]

# Speed and time left are means over so many steps: not jumpy, and yet a slower machine shows.
_LATEST_STEPS = 50

# A step whose numbers come this soon was done before they were asked for.
_AT_ONCE = 1e-3


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
    config: TrainingConfig,
    mesh: Mesh,
    state: TrainState,
    train_step: TrainStep,
    batches: BatchIterator,
    evaluate: Evaluate | None,
    replay: Replay,
    store: CheckpointStore,
    log: RunLog,
    stability: Stability,
    goodput: Goodput,
    profiler: Profiler,
    *,
    evaluate_first: bool = False,
    stop_requested: StopRequested = lambda: False,
) -> TrainState:
    """Train from the step of `state` to the end, or until a stop is requested; save in either case.

    All processes of a job do the same: what they decide depends on numbers that all of them have.

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
      stability: what the run remembers of its losses, up to the step of `state`.
      goodput: counts the time.
      profiler: traces some steps.
      evaluate_first: the step of `state` still has to be evaluated, for the run was stopped before.
      stop_requested: asked after every step.

    Returns:
      The state after the last step that was done.

    Raises:
      RollBack: the loss has spiked, and an earlier checkpoint is to be taken; the state is gone.
      UserError: too many steps in a row were not finite, or spikes too many; nothing is saved any more.
    """
    clock, step, size = Clock(), int(state.step), config.data.batch_size
    flops_a_token = training_flops_a_token(config.model, config.data.sequence_length)
    peak = peak_flops(mesh.devices.flat)
    written, waited = step, 0.0  # what the last line of the log counted
    # Seconds waited for the latest batch, and those in which no step ran meanwhile, since a step was read.
    waiting = idle = 0.0
    pending: tuple[int, StepMetrics] | None = None

    def read() -> None:
        """Fetch a step's numbers; while the next step runs, except at the end, before a save and the like."""
        nonlocal pending, written, waited, waiting, idle
        if pending is None:
            return
        (at, on_device), pending = pending, None
        began = time.monotonic()
        metrics = jax.device_get(on_device)
        if time.monotonic() - began < _AT_ONCE:
            idle += waiting
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        clock.step_ended(float(metrics.tokens))
        last = stability.next_is_last
        skipped = stability.see(loss, grad_norm)
        goodput.step_ended(idle, finite=not skipped)
        waiting = idle = 0.0
        if skipped:
            if last:
                end_not_finite(at, loss, grad_norm)
            log.message(
                f"step {at} skipped: its loss is {loss} and its gradient norm {grad_norm} "
                f"({stability.not_finite_in_a_row} in a row, {stability.skipped_steps} in all)"
            )
            log.event({"step": at, "skipped_steps": stability.skipped_steps})
            return
        speed, wait = clock.tokens_per_second, (batches.wait_seconds - waited) / (at - written)
        entry = {
            "step": at,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(metrics.learning_rate),
            "tokens": at * size * config.data.sequence_length,
            "tokens_per_second": speed,
            "flops_per_second": speed * flops_a_token,
            "input_wait_seconds": wait,
            "input_wait_share": wait / clock.seconds_a_step if clock.seconds_a_step else 0.0,
        }
        if peak is not None:
            entry["flops_utilisation"] = speed * flops_a_token / peak
        if at % config.logging.every == 0 or at in (1, config.steps):
            entry |= {"peak_memory_bytes": peak_memory(), **goodput.entry()}
            written, waited = at, batches.wait_seconds
        log.training(entry, (config.steps - at) * clock.seconds_a_step)
        if stability.spiking:
            regular = [saved for saved in store.steps() if saved % config.checkpoint.every == 0]
            back = stability.roll_back(at, regular, size)
            if back is not None:
                _free(state)
                raise back
            log.message(f"the loss has spiked at step {at}, but no checkpoint is old enough to go back to")

    def end_not_finite(at: int, loss: float, grad_norm: float) -> None:
        store.wait()
        _free(state.opt_state)
        found = replay(at, stability.first_row(at - 1, size), state.params)
        count = stability.not_finite_in_a_row
        raise UserError(
            f"the loss of step {at} is {loss} and its gradient norm {grad_norm}"
            f"{f', the last of {count} such steps in a row' if count > 1 else ''}{found}; lower "
            "optimizer.learning_rate, or take the document that causes it out of the data."
        )

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == config.steps)

    if evaluate is not None and evaluate_first and due(config.evaluation.every):
        goodput.spent("starting")
        log.held_out({"step": step, **(evaluate(state.params, lambda: False) or {})})
        goodput.spent("evaluating")
    while step < config.steps:
        if profiler.begins(step + 1):
            read()
            profiler.start()
        before = batches.wait_seconds
        local = next(batches)
        waiting = batches.wait_seconds - before
        if pending is None:
            idle, waiting = idle + waiting, 0.0
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = train_step(state, put_batch(local, size, mesh))
        step += 1
        read()
        pending = (step, metrics)
        if stability.next_is_last:
            read()  # the next step would run in vain
        stopping = stop_requested() and step < config.steps
        evaluating = evaluate is not None and due(config.evaluation.every) and not stopping
        saving = due(config.checkpoint.every)
        if profiler.ends(step):
            read()
            profiler.stop()
            clock.pause()
        if not (evaluating or saving or stopping):
            continue
        read()
        measured: dict[str, float] | None = {}
        if evaluating and evaluate is not None:
            measured = evaluate(state.params, stop_requested if step < config.steps else lambda: False)
            goodput.spent("evaluating")
            if measured is None:
                stopping = True
            else:
                log.held_out({"step": step, **measured})
        if saving or stopping:
            store.save(
                step,
                state.params,
                state.opt_state,
                rows_seen=stability.first_row(step, size),
                config=to_dict(config),
                held_out_loss=(measured or {}).get("held_out_loss"),
                history=stability.record(),
            )
            goodput.spent("saving")
        clock.pause()
        if stopping:
            break
    read()
    profiler.stop()
    store.wait()
    if step < config.steps:
        goodput.spent("saving")
        log.event({"step": step, **goodput.entry()})
    return state


def _free(tree: Any) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()
