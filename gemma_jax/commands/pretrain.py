"""`gemma pretrain CONFIG`: train a model from random weights, or go on where a run was left."""

import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gemma_jax.commands.fork import resolve_fork, start_fork
from gemma_jax.commands.replay import show_failure
from gemma_jax.commands.run_directory import CONFIG_FILE, check_data, load_config, open_run, record_data
from gemma_jax.config import (
    HostsConfig,
    PretrainConfig,
    differences,
    mesh_text,
    profiled_steps,
    read_command,
    replace,
    to_json,
    validate,
    validate_on_devices,
    within,
)
from gemma_jax.errors import RESTART_STATUS, UserError
from gemma_jax.paths import user_path

if TYPE_CHECKING:
    from etils import epath
    from flax import nnx
    from jax.sharding import Mesh

    from gemma_jax.checkpoint.store import CheckpointStore
    from gemma_jax.data.loader import Dataset
    from gemma_jax.tokenizer import Tokenizer
    from gemma_jax.training.loop import Evaluate
    from gemma_jax.training.stability import Stability
    from gemma_jax.training.state import TrainState

# What may differ when a run is resumed: where and how fast it goes, not what it computes.
MAY_CHANGE = (
    "run_dir",
    "steps",
    "existing_run",
    "profile",
    "compute",
    "mesh",
    "hosts",
    "stability",
    "checkpoint",
    "evaluation",
    "logging",
    "data.cache_dir",
)


def run(arguments: Sequence[str], prog: str) -> int:
    """Train to the end of the config's steps; status 75 if a signal asked for a stop before it."""
    _, config = read_command(arguments, prog, "CONFIG", PretrainConfig(), load=_load, validate=validate)
    if not config.run_dir:
        raise UserError("run_dir is empty; name the directory of the run.")

    from gemma_jax.data.documents import check_source
    from gemma_jax.training.interruption import EndSignals

    with EndSignals():
        for source in config.data.sources:
            check_source(source)
        return pretrain(config)


def _load(name: str) -> PretrainConfig:
    config, experiment = load_config(name)
    return replace(config, {"run_dir": config.run_dir or f"runs/{experiment}"})


def pretrain(config: PretrainConfig) -> int:
    """Run a config that was validated. Gives the exit status; raises UserError as everything below does."""
    started = time.monotonic()
    run_dir = user_path(config.run_dir)
    config = _as_existing(run_dir, config)

    from gemma_jax.startup import joined, keep_programs

    keep_programs(config.compute.compilation_cache)
    with joined(config.hosts, on_cpu=config.mesh.cpu_devices > 0):
        # From here on the config is the same in every process of a job.
        return _train(replace(config, {"hosts": HostsConfig()}), run_dir, started)


def _train(config: PretrainConfig, run_dir: "epath.Path", started: float) -> int:
    import jax

    from gemma_jax.checkpoint.folders import saved_steps
    from gemma_jax.checkpoint.store import CheckpointStore
    from gemma_jax.memory import require_memory
    from gemma_jax.sharding import local_rows, make_mesh
    from gemma_jax.training.goodput import Goodput
    from gemma_jax.training.interruption import JobStopSignals, StopSignals
    from gemma_jax.training.loop import train
    from gemma_jax.training.metrics import RunLog, plot_losses, read_metrics
    from gemma_jax.training.profile import Profiler
    from gemma_jax.training.sinks import check_sinks, open_sinks
    from gemma_jax.training.stability import Gap, RollBack
    from gemma_jax.training.state import abstract_train_state
    from gemma_jax.training.step import make_train_step

    check_sinks(config.logging)
    mesh = make_mesh(config.mesh)
    validate_on_devices(config, mesh.size)
    abstract = abstract_train_state(config, mesh)  # raises where the mesh divides no parameter
    require_memory(abstract, "the state of this run")
    tokenizer = _tokenizer_of_job(config, run_dir)
    dataset = _dataset(config, tokenizer)
    if config.existing_run == "resume" and saved_steps(run_dir):
        check_data(run_dir, dataset)
    store = CheckpointStore(run_dir, config.checkpoint, overwrite=config.existing_run == "overwrite")
    if jax.process_index() == 0:
        tokenizer.save(run_dir / "tokenizer.model")
        # A kill must not leave half of it: the next start reads it.
        unfinished = run_dir / "config.json.tmp"
        unfinished.write_text(to_json(replace(config, {"existing_run": "resume"})))
        unfinished.replace(run_dir / "config.json")
        record_data(run_dir, dataset)

    stop = StopSignals() if jax.process_count() == 1 else JobStopSignals()
    train_step = make_train_step(config, mesh)
    evaluate = _evaluation(config, mesh, dataset, tokenizer)
    size = config.data.batch_size
    rolled_back: RollBack | None = None
    gaps: tuple[Gap, ...] = ()
    with store:
        while True:
            state, stability, evaluated = _begin(config, mesh, abstract, store)
            start = int(state.step)
            if start >= config.steps:
                _say(
                    f"{run_dir} is complete: {start} steps of {config.steps} are done; raise --steps to go on"
                )
                return 0
            stability.gaps = gaps or stability.gaps
            log = RunLog(run_dir, config.steps, start, open_sinks(config, run_dir, start))
            goodput = Goodput(started, log.spent_before)
            if start:
                log.event({"step": start, "first_row": stability.first_row(start, size), **goodput.entry()})
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            shape = mesh_text(mesh.shape)
            hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
            kind = mesh.devices.flat[0].device_kind
            log.message(f"{'resuming' if start else 'starting'} {run_dir} at step {start} of {config.steps}")
            log.message(f"{parameters:,} parameters on {mesh.size} {kind} devices{hosts} ({shape})")
            batches = dataset.train.iterate(stability.first_row(start, size), size, local_rows(size, mesh))
            try:
                with batches, stop:
                    state = train(
                        config,
                        mesh,
                        state,
                        train_step,
                        batches,
                        evaluate,
                        functools.partial(
                            show_failure, config, run_dir, mesh, dataset, tokenizer, log.console
                        ),
                        store,
                        log,
                        stability,
                        goodput,
                        Profiler(profiled_steps(config.profile), run_dir / "profile"),
                        evaluate_first=start > 0 and not evaluated,
                        stop_requested=stop.requested,
                    )
                break
            except RollBack as back:
                rolled_back = back
            finally:
                log.close()
            log.message(
                f"{rolled_back}: the run goes back to step {rolled_back.to} and passes over "
                f"{rolled_back.gap.rows:,} rows of data"
            )
            store.remove_after(rolled_back.to)
            gaps = (*(gap for gap in stability.gaps if gap.after_step <= rolled_back.to), rolled_back.gap)
            started = time.monotonic()
    if int(state.step) < config.steps:
        log.message(f"stopped at step {int(state.step)}, which is saved; the same command goes on from there")
        return RESTART_STATUS
    if jax.process_index() == 0:
        curve = run_dir / "loss.png"
        plot_losses({run_dir.name: read_metrics(run_dir)}, curve)
        log.message(f"done: {config.steps} steps; the loss curve is in {curve}")
    return 0


def _begin(
    config: PretrainConfig, mesh: "Mesh", abstract: "TrainState", store: "CheckpointStore"
) -> "tuple[TrainState, Stability, bool]":
    """Where the run goes on: its state, what it remembers, and whether that step has been evaluated."""
    import jax

    from gemma_jax.training.stability import Stability
    from gemma_jax.training.state import TrainState, create_train_state

    restored = store.restore(abstract.params, abstract.opt_state)
    if restored is None and config.fork_from:
        restored = start_fork(config, abstract, store)
        _say(f"the run begins at {config.fork_from}, which it keeps a copy of")
    if restored is None:
        return create_train_state(config, mesh), Stability(config.stability), False
    params, opt_state, record = restored
    step = jax.device_put(jax.numpy.int32(record.step), abstract.step.sharding)
    stability = Stability.from_record(config.stability, record.history)
    return TrainState(step, params, opt_state), stability, record.held_out_loss is not None


def _as_existing(run_dir: "epath.Path", config: PretrainConfig) -> PretrainConfig:
    """`config` as the run that is there goes on with it, if there is one, and with its fork resolved.

    Raises:
      UserError: the run that is there computes something else, or what is to be forked does not fit.
    """
    resuming = config.existing_run == "resume" and (run_dir / CONFIG_FILE).exists()
    if resuming:
        before = open_run(os.fspath(run_dir))[1]
        # What is recorded is one step; the command may name the whole run, or nothing any more.
        named = os.path.expanduser(config.fork_from).rstrip("/")
        if not named or before.fork_from.startswith(f"{named}/"):
            config = replace(config, {"fork_from": before.fork_from})
        for name, then, now in differences(before, config):
            if not within(name, MAY_CHANGE):
                raise UserError(
                    f"the run in {run_dir} has {name} {then!r}, not {now!r}; "
                    "give another --run_dir, or --existing_run overwrite to delete that run."
                )
    if config.fork_from:
        from gemma_jax.checkpoint.folders import saved_steps

        if not resuming or not saved_steps(run_dir):
            return resolve_fork(config, run_dir)
    return config


def _tokenizer_of_job(config: PretrainConfig, run_dir: "epath.Path") -> "Tokenizer":
    """The tokenizer; where it has to be trained, by the first process before the others look for it."""
    import jax

    from gemma_jax.startup import wait_for_all

    if jax.process_index() == 0:
        tokenizer = _tokenizer(config, run_dir)
    wait_for_all("the tokenizer is there")
    if jax.process_index() != 0:
        tokenizer = _tokenizer(config, run_dir)
    return tokenizer


def _tokenizer(config: PretrainConfig, run_dir: "epath.Path") -> "Tokenizer":
    """The tokenizer of the run so far, the one that the config names, or one trained on the corpus."""
    from gemma_jax.checkpoint.restore import step_folder
    from gemma_jax.data.documents import open_source, sample_texts
    from gemma_jax.tokenizer import Tokenizer

    of_run = run_dir / "tokenizer.model"
    if config.tokenizer.path:
        tokenizer = Tokenizer.load(config.tokenizer.path)
    elif config.existing_run == "resume" and of_run.exists():
        tokenizer = Tokenizer.load(of_run)
    elif config.fork_from:
        tokenizer = Tokenizer.load(step_folder(config.fork_from)[1] / "tokenizer.model")
    else:
        data = config.data
        sources = [
            open_source(s, text_field=data.text_field, bad_records=data.bad_records) for s in data.sources
        ]
        settings = (config.model.vocab_size, config.tokenizer.train_megabytes, data.held_out)
        identity = "\n".join([*(source.fingerprint for source in sources), *map(str, settings)])
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        path = user_path(data.cache_dir) / "tokenizers" / f"{key}.model"
        if path.exists():
            tokenizer = Tokenizer.load(path)
        else:
            _say(f"training a tokenizer of {config.model.vocab_size} pieces on {', '.join(data.sources)}")
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = sample_texts(sources, config.tokenizer.train_megabytes, data.held_out)
            tokenizer = Tokenizer.train(texts, config.model.vocab_size, path)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, but model.vocab_size is "
            f"{config.model.vocab_size}; set --model.vocab_size {tokenizer.vocab_size} or give another "
            "tokenizer.path."
        )
    return tokenizer


def _dataset(config: PretrainConfig, tokenizer: "Tokenizer") -> "Dataset":
    import jax

    from gemma_jax.data.loader import prepare

    started = said = time.monotonic()

    def progress(done: int, total: int, tokens: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 5 and tokens:
            said = now
            speed = tokens / (now - started)
            _say(f"tokenising: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed:,.0f} tokens/s")

    dataset = prepare(
        config.data,
        tokenizer,
        config.seed,
        progress,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for s in dataset.statistics:
        _say(
            f"{s.name}: {s.train.documents:,} documents, {s.train.tokens:,} tokens in {s.train_rows:,} rows "
            f"({s.utilisation:.1%} full)"
        )
        _say(
            f"{s.name}: {s.held_out.documents:,} documents, {s.held_out.tokens:,} tokens held out"
            + (f"; {s.skipped:,} unreadable records skipped" if s.skipped else "")
        )
    return dataset


def _evaluation(
    config: PretrainConfig, mesh: "Mesh", dataset: "Dataset", tokenizer: "Tokenizer"
) -> "Evaluate | None":
    """Held-out loss in nats a token and in bits a byte, or None where nothing is held out."""
    import math

    import jax
    import numpy as np

    from gemma_jax.sharding import local_rows, put_batch
    from gemma_jax.training.step import make_evaluation_step

    if not dataset.held_out.num_rows or not config.evaluation.every:
        return None
    size = config.data.batch_size
    rows = local_rows(size, mesh)
    step = make_evaluation_step(config, mesh)
    token_bytes = np.asarray(tokenizer.piece_bytes())

    def evaluate(params: "nnx.State", stop_requested: Callable[[], bool]) -> dict[str, float] | None:
        sums = np.zeros(3)
        for number, batch in enumerate(dataset.held_out.batches(size, config.evaluation.rows, rows)):
            if number and stop_requested():
                return None
            sums += np.asarray(
                jax.device_get(step(params, put_batch(batch, size, mesh), token_bytes)), np.float64
            )
        nats, tokens, num_bytes = sums
        return {"held_out_loss": nats / tokens, "held_out_bits_per_byte": nats / math.log(2) / num_bytes}

    return evaluate


def _say(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
