"""The training loop: runs steps, evaluations and checkpoints in an order that makes the run resumable."""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_jax.checkpoint.record import RunRecord, fingerprints
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import TrainingConfig, to_dict
from gemma_jax.data.loader import BatchIterator
from gemma_jax.errors import UserError
from gemma_jax.sharding import put_batch
from gemma_jax.streams import progress
from gemma_jax.training.evaluation import Evaluator, Numbers, StopRequested
from gemma_jax.training.goodput import Goodput
from gemma_jax.training.hardware import peak_flops, peak_memory
from gemma_jax.training.metrics import RunLog
from gemma_jax.training.optimizer import LEAST_SCALE
from gemma_jax.training.patience import Patience
from gemma_jax.training.profile import Profiler
from gemma_jax.training.stability import RollBack, Stability
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import Metrics, TrainStep

# Called with (step, index of its batch's first row, parameters before the step). Prints the batch and returns
# a short text that names the gradients that are not finite. The optimizer state is freed first, to make room.
ShowFailure = Callable[[int, int, Any], str]

EMPTY_RECORD = RunRecord(step=0, rows_seen=0, config={})
STEPS_TO_CHANGE = 3  # adapters that are the same after so many steps are not trained

# Speed and time left are means over this many steps: enough to be steady, few enough to show a slowdown.
_LATEST_STEPS = 50

# If the metrics of a step arrive within this many seconds, the step had ended before they were requested.
_AT_ONCE = 1e-3


@dataclasses.dataclass(frozen=True)
class RunServices:
    """The services that a training loop uses besides the train step and the batches."""

    store: CheckpointStore
    log: RunLog
    stability: Stability
    """The loss history of the run, up to the step where the loop begins."""
    goodput: Goodput
    evaluators: Sequence[Evaluator] = ()
    evaluated: Mapping[str, Numbers] = dataclasses.field(default_factory=dict)
    """The numbers already measured at the step where the loop begins, by evaluator name."""
    record: RunRecord = EMPTY_RECORD
    """What the records of all checkpoints have in common."""
    patience: Patience = dataclasses.field(default_factory=lambda: Patience(0, ""))
    flops_a_token: float = 0.0
    show_failure: ShowFailure = lambda step, first_row, params: ""
    """Called when a step that is not finite ends the run, before the error is raised."""
    stop_requested: StopRequested = lambda: False
    """Called after every step; True stops the run."""


@dataclasses.dataclass
class Trainer:
    """Runs the training loop. All processes of a job take the same decisions, because these depend only on
    numbers that all of them have."""

    config: TrainingConfig
    mesh: Mesh
    train_step: TrainStep
    batches: BatchIterator
    """This process's rows of each global batch, beginning at the step where the run resumes."""
    services: RunServices

    def train(self, state: TrainState) -> TrainState:
        """Train to the end, or until a stop is requested; save in either case.

        Args:
          state: The state to resume from. Its arrays are donated.

        Returns:
          The state after the last step.

        Raises:
          RollBack: The loss has spiked, the run must resume from an earlier checkpoint. The state is freed.
          UserError: Too many steps in a row were not finite, or there were too many spikes. Nothing more is
            saved.
        """
        self.state, self.step, self.stopped = state, int(state.step), False
        self.profiler = Profiler(self.config)
        self.reader = StepReader(self.config, self.mesh, self.step, self.batches, self.services)
        # Full training changes at once; adapters may have been left out of the model by mistake.
        adapters = not self.step and jax.tree.leaves(state.frozen)
        self.before = fingerprints(state.trainable) if adapters else None
        try:
            self.evaluate_first()
            progress("compiling the training step")
            while self.step < self.config.steps and not self.stopped:
                self.do_step()
                self.after_step()
            self.end()
        except RollBack:
            _free(self.state)
            raise
        except _NotFinite as error:
            self.end_not_finite(error)
        return self.state

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps and after the last step is due now."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def evaluate_first(self) -> None:
        """Run the evaluations that were due at this step but were cut off by a stop."""
        done = self.services.evaluated
        left = [e for e in self.services.evaluators if self.due(e.every) and e.name not in done]
        if self.step and left:
            self.services.goodput.record("starting")
            self.evaluate(left, lambda: False)

    def do_step(self) -> None:
        """Start the next step on the devices."""
        if self.profiler.begins(self.step + 1):
            self.reader.read()
            self.profiler.start()
        before = self.batches.wait_seconds
        rows = next(self.batches)
        self.reader.waited(self.batches.wait_seconds - before)
        batch = put_batch(rows, self.config.data.batch_size, self.mesh)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, metrics = self.train_step(self.state, batch)
        self.step += 1
        self.reader.started(self.step, metrics)

    def after_step(self) -> None:
        """Evaluate and save if that is due; save if a stop is requested."""
        services, last = self.services, self.step == self.config.steps
        self.stopped = services.stop_requested() and not last
        evaluators = [e for e in services.evaluators if self.due(e.every) and not self.stopped]
        saving = self.due(self.config.checkpoint.every)
        if self.step == STEPS_TO_CHANGE and self.before is not None:
            self.check_change()
        if self.profiler.ends(self.step):
            self.reader.read()
            self.profiler.stop()
            self.reader.clock.pause()
        if not (evaluators or saving or self.stopped):
            return
        self.reader.read()
        evaluated = self.evaluate(evaluators, (lambda: False) if last else services.stop_requested)
        if saving or self.stopped:
            self.save(evaluated)
        self.reader.clock.pause()

    def check_change(self) -> None:
        """Warn if the adapters have not changed since the run began."""
        before, now = jax.device_get((self.before, fingerprints(self.state.trainable)))
        if jax.tree.leaves(before) == jax.tree.leaves(now):
            self.services.log.message(
                f"the adapters have not changed in {self.step} steps; check the learning rate and the data"
            )

    def evaluate(self, evaluators: Sequence[Evaluator], stop_requested: StopRequested) -> dict[str, Numbers]:
        """Runs evaluators until a stop is requested; returns the numbers of those that finished."""
        evaluated: dict[str, Numbers] = {}
        for evaluator in evaluators:
            numbers = evaluator.measure(self.state.params, stop_requested)
            self.services.goodput.record("evaluating")
            if numbers is None:
                self.stopped = True
                break
            if numbers:
                self.services.log.evaluation({"step": self.step, **numbers})
            self.services.log.texts(self.step, evaluator.texts)
            evaluated[evaluator.name] = numbers
        patience = self.services.patience
        if patience.is_over(evaluated):
            self.stopped = True
            self.services.log.message(f"{patience}; the run ends at step {self.step}")
        return evaluated

    def save(self, evaluated: dict[str, Numbers]) -> None:
        """Start writing a checkpoint of this step."""
        stability = self.services.stability
        record = dataclasses.replace(
            self.services.record,
            step=self.step,
            rows_seen=stability.first_row(self.step, self.config.data.batch_size),
            config=to_dict(self.config),
            evaluations=evaluated,
            history=stability.record() | self.services.patience.record(),
        )
        self.services.store.save(record, self.state.parts)
        self.services.goodput.record("saving")

    def end(self) -> None:
        """Wait for everything that runs in the background."""
        self.reader.read()
        self.profiler.stop()
        self.services.store.wait()
        if self.stopped:
            self.services.goodput.record("saving")
            self.services.log.event({"step": self.step, **self.services.goodput.entry()})

    def end_not_finite(self, error: "_NotFinite") -> None:
        """Show the batch that was not finite, then raise UserError."""
        stability = self.services.stability
        self.services.store.wait()
        _free(self.state.opt_state)
        first_row = stability.first_row(error.step - 1, self.config.data.batch_size)
        found = self.services.show_failure(error.step, first_row, self.state.params)
        count = stability.not_finite_in_a_row
        raise UserError(
            f"{error}{f', the last of {count} such steps in a row' if count > 1 else ''}{found}; lower "
            "optimizer.learning_rate, or take the document that causes it out of the data."
        )


class StepReader:
    """Fetches the metrics of a step while the next one runs, logs them, and checks them for spikes."""

    def __init__(
        self, config: TrainingConfig, mesh: Mesh, start: int, batches: BatchIterator, services: RunServices
    ) -> None:
        self.clock = Clock()
        self._config, self._batches, self._services = config, batches, services
        self._peak = peak_flops(mesh.devices.flat)
        self._pending: tuple[int, Metrics] | None = None
        self._written, self._waited = start, 0.0  # step and data-wait seconds at the last line of the log
        # Seconds waited for the latest batch; and seconds since the last read in which no step ran.
        self._waiting = self._idle = 0.0

    def waited(self, seconds: float) -> None:
        """Record how long the loop waited for the next batch."""
        if self._pending is None:
            self._idle += seconds
        else:
            self._waiting = seconds

    def started(self, step: int, metrics: Metrics) -> None:
        """Keep the metrics of a step that was just started, and read those of the previous step."""
        self.read()
        self._pending = step, metrics
        if self._services.stability.next_is_last:
            self.read()  # if this step ends the run, starting another would be wasted

    def read(self) -> None:
        """Wait for the step that was started last, and log its metrics.

        Raises:
          RollBack: The loss has spiked.
          UserError: The loss has spiked once more than the config allows.
          _NotFinite: The step was not finite, once too often in a row.
        """
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        began = time.monotonic()
        numbers = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if time.monotonic() - began < _AT_ONCE:
            self._idle += self._waiting
        services = self._services
        self.clock.step_ended(numbers["tokens"])
        scale = numbers.get("loss_scale", LEAST_SCALE)
        skipped = services.stability.record_step(numbers["loss"], numbers["grad_norm"], scale)
        services.goodput.step_ended(self._idle, finite=not skipped)
        self._waiting = self._idle = 0.0
        if not skipped:
            self._log(step, numbers)
            self._look_for_spike(step)
        elif services.stability.not_finite_in_a_row > self._config.stability.skip_nonfinite:
            raise _NotFinite(step, numbers)
        else:
            self._log_skipped(step, numbers)

    def _log(self, step: int, numbers: Numbers) -> None:
        config, services, clock = self._config, self._services, self.clock
        speed, seconds = clock.tokens_per_second, clock.seconds_a_step
        wait = (self._batches.wait_seconds - self._waited) / (step - self._written)
        entry = {
            "step": step,
            **numbers,
            "tokens": step * config.data.batch_size * config.data.sequence_length,
            "tokens_per_second": speed,
            "flops_per_second": speed * services.flops_a_token,
            "input_wait_seconds": wait,
            "input_wait_share": wait / seconds if seconds else 0.0,
        }
        if self._peak is not None:
            entry["flops_utilisation"] = speed * services.flops_a_token / self._peak
        if step % config.logging.every == 0 or step in (1, config.steps):
            entry |= {"peak_memory_bytes": peak_memory(), **services.goodput.entry()}
            self._written, self._waited = step, self._batches.wait_seconds
        services.log.training(entry, (config.steps - step) * seconds)

    def _log_skipped(self, step: int, numbers: Numbers) -> None:
        stability, log = self._services.stability, self._services.log
        halved = "; the loss scale is halved" if "loss_scale" in numbers else ""
        log.message(
            f"step {step} skipped: its loss is {numbers['loss']} and its gradient norm "
            f"{numbers['grad_norm']} ({stability.not_finite_in_a_row} in a row, "
            f"{stability.skipped_steps} in all){halved}"
        )
        log.event({"step": step, "skipped_steps": stability.skipped_steps})

    def _look_for_spike(self, step: int) -> None:
        services, every = self._services, self._config.checkpoint.every
        if services.stability.spiking:
            regular = [saved for saved in services.store.steps() if saved % every == 0]
            back = services.stability.roll_back(step, regular, self._config.data.batch_size)
            if back is not None:
                raise back
            services.log.message(
                f"the loss has spiked at step {step}, but no checkpoint is old enough to go back to"
            )


class _NotFinite(Exception):
    """Raised when one step too many in a row is not finite."""

    def __init__(self, step: int, numbers: Numbers) -> None:
        super().__init__(
            f"the loss of step {step} is {numbers['loss']} and its gradient norm {numbers['grad_norm']}"
        )
        self.step = step


class Clock:
    """Measures the latest steps, excluding the first one (which compiles), evaluations and saves."""

    def __init__(self) -> None:
        self._latest: collections.deque[tuple[float, float]] = collections.deque(maxlen=_LATEST_STEPS)
        self._since: float | None = None

    def step_ended(self, tokens: float) -> None:
        """Count the time since the previous step ended as one step, unless `pause` was called in between."""
        now = time.monotonic()
        if self._since is not None:
            self._latest.append((now - self._since, tokens))
        self._since = now

    def pause(self) -> None:
        """Exclude the time until the next step ends, because something other than a step begins."""
        self._since = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, or 0 until two steps have ended."""
        seconds, tokens = map(sum, zip(*self._latest, strict=True)) if self._latest else (0.0, 0.0)
        return tokens / seconds if seconds else 0.0

    @property
    def seconds_a_step(self) -> float:
        """Seconds per step, or 0 until two steps have ended."""
        return sum(seconds for seconds, _ in self._latest) / len(self._latest) if self._latest else 0.0


def _free(tree: Any) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()
