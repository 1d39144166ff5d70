"""The life of a run, the same for every command that trains: start, fork, resume, roll back, finish."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.checkpoint.folders import saved_steps
from gemma_jax.checkpoint.record import RunRecord, run_record
from gemma_jax.checkpoint.restore import load_arrays, step_folder
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import (
    HostsConfig,
    TrainingConfig,
    from_record,
    mesh_text,
    replace,
    to_dict,
    validate_on_devices,
)
from gemma_jax.data.loader import Dataset
from gemma_jax.errors import RESTART_STATUS, UserError
from gemma_jax.paths import user_path
from gemma_jax.sharding import local_rows, make_mesh
from gemma_jax.startup import joined, keep_programs, wait_for_all
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training import interruption, run_directory
from gemma_jax.training.evaluation import Evaluator
from gemma_jax.training.goodput import Goodput
from gemma_jax.training.hardware import training_flops_a_token
from gemma_jax.training.loop import EMPTY_RECORD, RunServices, Trainer
from gemma_jax.training.metrics import RunLog, plot_losses, read_metrics, say
from gemma_jax.training.objectives import Recipe
from gemma_jax.training.patience import Patience
from gemma_jax.training.sinks import check_sinks, open_sinks
from gemma_jax.training.stability import Gap, RollBack, Stability
from gemma_jax.training.state import TrainState, abstract_train_state, create_train_state
from gemma_jax.training.step import make_train_step

Config = TypeVar("Config", bound=TrainingConfig)


OPTIONAL = ("loss_scale",)  # parts of a checkpoint that a run can begin without


@dataclasses.dataclass(frozen=True)
class Task:
    """The parts of a run that differ between the commands that train."""

    recipe: Recipe
    dataset: Dataset
    tokenizer: Tokenizer
    evaluators: Sequence[Evaluator] = ()
    initial: Callable[[], nnx.State | None] = lambda: None
    """Returns the parameters that a new run starts with, or None for random ones. A resumed or forked run
    takes only the frozen parameters from it, because no checkpoint of a run contains them."""
    show_failure: Callable[["Task", RunLog, int, int, nnx.State], str] = lambda *failure: ""
    """Describes the batch of a step that is not finite: a `loop.ShowFailure` that also takes task and log."""
    record: RunRecord = EMPTY_RECORD
    """What the records of all checkpoints have in common."""
    base: Callable[[nnx.State, Mapping[str, Any]], dict[str, Any]] = lambda frozen, before: {}
    """Returns `RunRecord.base` of the frozen parameters. The second argument is that of the checkpoint that a
    run resumes from; raises UserError if the frozen parameters are others."""


def run_training(config: Config, choose: Callable[[Config, Mesh], Task], started: float) -> int:
    """Starts or resumes the run of a config.

    Args:
      config: The run's config, from `run_directory.as_existing`.
      choose: Returns what is trained, and on which data. It is called in every process of the job.
      started: When this process started, by `time.monotonic`.

    Returns:
      The exit status: RESTART_STATUS if a signal has stopped the run before its end.

    Raises:
      UserError: any fault that the user can correct.
    """
    keep_programs(config.compute.compilation_cache)
    with joined(config.hosts, on_cpu=config.mesh.cpu_devices > 0):
        # From here on the config is the same in every process of a job.
        config = replace(config, {"hosts": HostsConfig()})
        check_sinks(config.logging)
        mesh = make_mesh(config.mesh)
        validate_on_devices(config, mesh.size)
        return _Run(config, mesh, choose(config, mesh), started).train()


def choose_tokenizer(config: TrainingConfig, path: str, make_default: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer of a run, the same in every process of the job.

    Args:
      config: The run's config.
      path: A tokenizer's model file. If it is empty, a run that is resumed or forked uses its own.
      make_default: Makes a tokenizer if there is none yet. It may write to a cache, so process 0 runs before
        the others.

    Raises:
      UserError: It cannot be read, or its size is not `model.vocab_size`.
    """

    def chosen() -> Tokenizer:
        saved = user_path(config.run_dir) / run_directory.TOKENIZER_FILE
        if path:
            return Tokenizer.load(path)
        if config.existing_run == "resume" and saved.exists():
            return Tokenizer.load(saved)
        if config.fork_from:
            return Tokenizer.load(step_folder(config.fork_from)[1] / run_directory.TOKENIZER_FILE)
        return make_default()

    tokenizer = chosen() if jax.process_index() == 0 else None
    wait_for_all("the tokenizer is ready")
    tokenizer = tokenizer or chosen()
    if config.existing_run == "resume" and saved_steps(user_path(config.run_dir)):
        run_directory.check_tokenizer(user_path(config.run_dir), tokenizer)
    elif config.fork_from:
        run_directory.check_tokenizer(step_folder(config.fork_from)[1], tokenizer)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, but model.vocab_size is "
            f"{config.model.vocab_size}; set --model.vocab_size {tokenizer.vocab_size} or give another "
            "tokenizer.path."
        )
    return tokenizer


class _Run:
    """A run directory, and the task that trains in it."""

    def __init__(self, config: TrainingConfig, mesh: Mesh, task: Task, started: float) -> None:
        self.config, self.mesh, self.task, self.started = config, mesh, task, started
        self.run_dir = user_path(config.run_dir)
        self.abstract = abstract_train_state(task.recipe)
        self.gaps: tuple[Gap, ...] = ()  # in the data, made by spikes since this process started
        self.stop = (interruption.StopSignals if jax.process_count() == 1 else interruption.JobStopSignals)()
        self.train_step = make_train_step(task.recipe)

    def train(self) -> int:
        """Trains until the end or a stop; returns the exit status."""
        with self._open_store() as store:
            while True:
                try:
                    state = self._attempt(store)
                    break
                except RollBack as rollback:
                    store.remove_after(rollback.to)
                    self.started = time.monotonic()
        if state is None:
            return 0
        if int(state.step) < self.config.steps and not self.patience.spent:
            say(f"stopped at step {int(state.step)}, which is saved; the same command resumes from there")
            return RESTART_STATUS
        if jax.process_index() == 0:
            curve = self.run_dir / "loss.png"
            plot_losses({self.run_dir.name: read_metrics(self.run_dir)}, curve)
            say(f"done: {int(state.step)} steps; the loss curve is in {curve}")
        return 0

    def _open_store(self) -> CheckpointStore:
        """Locks the run directory and writes the tokenizer, the config and the record of the data."""
        config, dataset, overwrite = self.config, self.task.dataset, self.config.existing_run == "overwrite"
        if not overwrite and saved_steps(self.run_dir):
            run_directory.check_data(self.run_dir, dataset)
        store = CheckpointStore(self.run_dir, config.checkpoint, overwrite=overwrite)
        if jax.process_index() == 0:
            if overwrite:
                run_directory.delete_run(self.run_dir)
            self.task.tokenizer.save(self.run_dir / run_directory.TOKENIZER_FILE)
            run_directory.record_config(self.run_dir, config)
            run_directory.record_data(self.run_dir, dataset, self.task.tokenizer)
        return store

    def _attempt(self, store: CheckpointStore) -> TrainState | None:
        """Trains from the newest checkpoint on; returns None if the run is complete.

        Raises:
          RollBack: The run must go back to an earlier checkpoint; this is already logged.
        """
        config, size = self.config, self.config.data.batch_size
        state, stability, record = self._begin(store)
        start = int(state.step)
        self.patience = Patience.of(config, record.history)
        if self.patience.spent:
            say(f"{self.run_dir} is complete: {self.patience}; raise --evaluation.patience to go on")
            return None
        if start >= config.steps:
            say(f"{self.run_dir} is complete: {start} of {config.steps} steps are done; raise --steps")
            return None
        stability.gaps = self.gaps or stability.gaps
        first_row = stability.first_row(start, size)
        log = RunLog(self.run_dir, config.steps, start, open_sinks(config, self.run_dir, start))
        goodput = Goodput(self.started, log.spent_before)
        try:
            self._announce(log, state)
            if start:
                log.event({"step": start, "first_row": first_row, **goodput.entry()})
            services = RunServices(
                store,
                log,
                stability,
                goodput,
                self.task.evaluators,
                record.evaluations,
                dataclasses.replace(self.task.record, base=self.task.base(state.frozen, record.base)),
                self.patience,
                training_flops_a_token(
                    config.model, config.data.sequence_length, frozen=bool(jax.tree.leaves(state.frozen))
                ),
                functools.partial(self.task.show_failure, self.task, log),
                self.stop.requested,
            )
            batches = self.task.dataset.train.iterate(first_row, size, local_rows(size, self.mesh))
            with batches, self.stop:
                return Trainer(config, self.mesh, self.train_step, batches, services).train(state)
        except RollBack as rollback:
            log.message(
                f"{rollback}: back to step {rollback.to}, skipping {rollback.gap.rows:,} rows of data"
            )
            self.gaps = (*(gap for gap in stability.gaps if gap.after_step <= rollback.to), rollback.gap)
            raise
        finally:
            log.close()

    def _begin(self, store: CheckpointStore) -> tuple[TrainState, Stability, RunRecord]:
        """Returns what the run starts from: state, history of losses, and the record of that checkpoint."""
        restored = store.restore(self.abstract.parts, optional=OPTIONAL)
        if restored is None and (fork := self.config.fork_from):
            # A copy becomes the new run's first checkpoint, so that it no longer depends on the old run.
            record = dataclasses.replace(run_record(fork), config=to_dict(self.config))
            wanted = {
                part: tree
                for part, tree in self.abstract.parts.items()
                if part in record.arrays or part not in OPTIONAL
            }
            restored = load_arrays(fork, wanted, record), record
            store.save(record, restored[0])
            store.wait()
            say(f"forked from {fork}; the run has a copy of that checkpoint")
        recipe, stability = self.task.recipe, self.config.stability
        if restored is None:
            return create_train_state(recipe, self.task.initial()), Stability(stability), self.task.record
        parts, record = restored
        # config.json may have been edited or damaged since; the record has a digest that would reveal it.
        run_directory.check_same(from_record(record.config, "the record"), self.config, str(self.run_dir))
        frozen = self.abstract.frozen
        if jax.tree.leaves(frozen):
            params = self.task.initial()
            frozen, _ = recipe.split(recipe.model.init(self.config.seed) if params is None else params)
        step = jax.device_put(jax.numpy.int32(record.step), self.abstract.step.sharding)
        state = self.abstract.with_parts(step, frozen, parts)
        return state, Stability.from_record(stability, record.history), record

    def _announce(self, log: RunLog, state: TrainState) -> None:
        start, steps, devices = int(state.step), self.config.steps, self.mesh.devices
        log.message(f"{'resuming' if start else 'starting'} {self.run_dir} at step {start} of {steps}")
        count, trained = (
            sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.trainable)
        )
        frozen = f", of which {trained:,} are trained," if trained < count else ""
        hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        log.message(
            f"{count:,} parameters{frozen} on {devices.size} {devices.flat[0].device_kind} devices{hosts} "
            f"({mesh_text(self.mesh.shape)})"
        )
