"""Runs that are stopped, killed, moved to other devices and robbed of their files, as real processes."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    replace,
    to_json,
)
from gemma_jax.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]
REPOSITORY = Path(__file__).parents[2]
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho".split()  # noqa: SIM905
STEPS = 80
Arrays = dict[str, np.ndarray]


class Runs:
    """Starts runs of one config in directories of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        rng = np.random.default_rng(0)
        for number in range(60):
            (self.corpus / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, 80)), encoding="utf-8")
        config = PretrainConfig(
            steps=STEPS,
            model=replace(PRESETS["gemma_tiny"], {"vocab_size": 430}),
            data=DataConfig(
                sources=(f"{self.corpus}/*.txt",),
                sequence_length=32,
                batch_size=8,
                held_out=0.2,
                cache_dir=str(folder / "cache"),
            ),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
            mesh=MeshConfig(cpu_devices=2),
            checkpoint=CheckpointConfig(every=1),
            evaluation=EvaluationConfig(every=20, rows=8),
            logging=LoggingConfig(every=1),
        )
        (folder / "config.json").write_text(to_json(config))

    def start(self, run: str, *arguments: str, cache: str = "programs") -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        config = str(self.folder / "config.json")
        return subprocess.Popen(
            [sys.executable, "train.py", "pretrain", config, "--run_dir", str(self.folder / run), *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, run: str, *arguments: str) -> str:
        """Let a run go to its end; what it said."""
        status, said = ended(self.start(run, *arguments), 120)
        assert status == 0, said
        return said

    def steps(self, run: str) -> list[int]:
        """Of the lines of the log."""
        return [int(entry["step"]) for entry in read_metrics(self.folder / run) if "loss" in entry]

    def checkpoints(self, run: str) -> list[str]:
        folder = self.folder / run / "checkpoints"
        try:
            return [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return []

    def arrays(self, run: str) -> Arrays:
        return last_arrays(self.folder / run)


def last_arrays(run: Path) -> Arrays:
    """Of the checkpoint of the last step, read without our own code."""
    from orbax.checkpoint import v1 as ocp

    loaded = ocp.load_checkpointables(run / "checkpoints" / str(STEPS), {"params": None, "opt_state": None})
    return {f"{part}.{name}": np.asarray(x) for part, tree in loaded.items() for name, x in tree.items()}


def ended(process: subprocess.Popen[str], within: float) -> tuple[int, str]:
    """The status of a process that ends in so many seconds, and what it wrote to standard error."""
    try:
        _, said = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
        raise AssertionError(f"still running after {within} s: {said}") from None
    return process.returncode, said


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], within: float = 60) -> None:
    until = time.monotonic() + within
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.002)


def assert_same_bits(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys() and len(expected) > 30
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Arrays:
    said = runs.finish("undisturbed")
    # Nothing but our own lines: no warnings of the libraries below.
    ours = ("step ", "training a tokenizer", "starting", "done", str(runs.corpus))
    strange = [
        line for line in said.splitlines() if not line.startswith(ours) and "parameters on" not in line
    ]
    assert strange == []
    return runs.arrays("undisturbed")


@pytest.fixture
def cleanup() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that must not outlive a test that fails."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_twenty_kills_lose_nothing(
    runs: Runs, undisturbed: Arrays, cleanup: list[subprocess.Popen[str]]
) -> None:
    rng, left_unfinished = random.Random(0), 0
    for number in range(20):
        process = runs.start("killed")
        cleanup.append(process)
        before = len(runs.steps("killed"))
        if number % 4 == 0:  # anywhere, before training too
            time.sleep(rng.uniform(0.5, 5))
        elif number % 4 == 1:  # between two steps, or in one
            wait_for(process, lambda before=before: len(runs.steps("killed")) > before)
            time.sleep(rng.uniform(0, 0.2))
        else:  # while a checkpoint is being written
            wait_for(process, lambda before=before: len(runs.steps("killed")) > before)
            wait_for(process, lambda: any("unfinished" in name for name in runs.checkpoints("killed")))
            time.sleep(rng.uniform(0, 0.02))
        assert process.poll() is None, "it came to its end: give the test more steps"
        process.kill()
        process.communicate()
        left_unfinished += any("unfinished" in name for name in runs.checkpoints("killed"))
    assert left_unfinished >= 3
    said = runs.finish("killed")
    assert "resuming" in said and "damaged" not in said
    assert_same_bits(runs.arrays("killed"), undisturbed)
    assert sorted(runs.checkpoints("killed")) == sorted(map(str, (STEPS - 1, STEPS)))
    assert losses(runs, "killed") == losses(runs, "undisturbed")


def losses(runs: Runs, run: str) -> list[tuple[int, float]]:
    return [(int(e["step"]), e["loss"]) for e in read_metrics(runs.folder / run) if "loss" in e]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_the_same_command_goes_on(
    runs: Runs, undisturbed: Arrays, cleanup: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    run = f"stopped-{number.name}"
    process = runs.start(run, "--checkpoint.every", "1000")
    cleanup.append(process)
    wait_for(process, lambda: len(runs.steps(run)) >= 5)
    process.send_signal(number)
    status, said = ended(process, 20)
    assert status == 75 and f"{number.name}: saving" in said and "Traceback" not in said
    saved = runs.checkpoints(run)
    assert len(saved) == 1 and f"stopped at step {saved[0]}" in said
    assert f"at step {saved[0]} of {STEPS}" in runs.finish(run, "--checkpoint.every", "1000")
    assert_same_bits(runs.arrays(run), undisturbed)
    assert losses(runs, run) == losses(runs, "undisturbed")


def test_a_second_interrupt_ends_at_once(runs: Runs, cleanup: list[subprocess.Popen[str]]) -> None:
    """Steps take seconds here, and Python hears nothing while it waits for one."""
    slow = ("--data.batch_size", "768", "--data.sequence_length", "256", "--evaluation.every", "0")
    run, remat = "interrupted-twice", ("--compute.remat", "full", "--checkpoint.every", "1000")
    process = runs.start(run, *slow, *remat)
    cleanup.append(process)
    wait_for(process, lambda: len(runs.steps(run)) >= 1, within=120)
    time.sleep(1)  # now it waits for the second step
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    status, said = ended(process, 1.5)
    assert status in (130, -signal.SIGINT) and "SIGINT: saving after this step" in said
    assert "Traceback" not in said and runs.checkpoints(run) == []


def test_signals_while_the_step_is_compiled_or_the_loss_is_evaluated(
    runs: Runs, undisturbed: Arrays, cleanup: list[subprocess.Popen[str]]
) -> None:
    for run, every, cache, moment in (
        ("compiling", "1000", "none", lambda said: "starting" in said),
        ("evaluating", "1", "programs", lambda said: "held-out" in said),
    ):
        process = runs.start(run, "--evaluation.every", every, cache=cache)
        cleanup.append(process)
        assert process.stderr is not None
        while not moment(line := process.stderr.readline()):
            assert line, "it ended"
        process.send_signal(signal.SIGTERM)
        status, said = ended(process, 30)
        assert status == 75 and "Traceback" not in said, said
        runs.finish(run)
        assert_same_bits(runs.arrays(run), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signals_before_training_end_the_program_soon_and_harm_nothing(
    runs: Runs, undisturbed: Arrays, cleanup: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    words = " ".join(WORDS * 10)
    large = runs.folder / "large.jsonl"
    if not large.exists():
        large.write_text((json.dumps({"text": words}) + "\n") * 80_000)
    tokenizer = str(runs.folder / "undisturbed" / "tokenizer.model")
    run = f"tokenising-{number.name}"
    cache = runs.folder / f"cache-{run}"
    data = ("--data.sources", str(large), "--data.cache_dir", str(cache))
    process = runs.start(run, *data, "--tokenizer.path", tokenizer)
    cleanup.append(process)
    wait_for(process, lambda: any((cache / "tokens").glob("*/*.tmp")))
    time.sleep(0.5)
    process.send_signal(number)
    status, said = ended(process, 10)
    assert status == 75 and f"{number.name}: ending" in said and "Traceback" not in said, said
    assert not (runs.folder / run).exists()


def test_two_runs_do_not_write_into_one_directory(
    runs: Runs, undisturbed: Arrays, cleanup: list[subprocess.Popen[str]]
) -> None:
    first = runs.start("twice")
    cleanup.append(first)
    wait_for(first, lambda: len(runs.steps("twice")) >= 2)
    for arguments in ((), ("--existing_run", "overwrite")):
        status, said = ended(runs.start("twice", *arguments), 60)
        assert status == 2 and f"error: process {first.pid} on " in said and "is training in" in said
    assert first.poll() is None, "it ended too soon for this test"
    status, said = ended(first, 120)
    assert status == 0, said
    assert_same_bits(runs.arrays("twice"), undisturbed)


def test_a_run_whose_data_files_are_lost_ends_clearly(
    runs: Runs, undisturbed: Arrays, cleanup: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    for spoil in (lambda path: os.truncate(path, 100), lambda path: path.unlink()):
        cache = tmp_path / "cache"
        process = runs.start("robbed", "--data.cache_dir", str(cache), "--checkpoint.every", "2")
        cleanup.append(process)
        before = len(runs.steps("robbed"))
        wait_for(process, lambda before=before: len(runs.steps("robbed")) > before + 4)
        for path in (cache / "tokens").rglob("*"):
            if path.is_file():
                spoil(path)
        status, said = ended(process, 60)
        last = said.strip().splitlines()[-1]
        if status == 0:  # files that are open stay readable when they are deleted
            assert spoil is not os.truncate and last.startswith("done")
            break
        assert status == 2 and last.startswith("error: The cache"), said
        assert str(cache) in last and "Traceback" not in said
        for path in sorted((cache / "tokens").iterdir()):
            subprocess.run(["rm", "-r", str(path)], check=True)  # as the message says
    else:
        runs.finish("robbed", "--data.cache_dir", str(tmp_path / "cache"))
    assert_same_bits(runs.arrays("robbed"), undisturbed)


def test_a_stopped_run_keeps_its_batch_size(runs: Runs, undisturbed: Arrays) -> None:
    status, said = ended(runs.start("undisturbed", "--data.batch_size", "16", "--steps", "90"), 60)
    assert status == 2 and "data.batch_size 8, not 16" in said
    assert_same_bits(runs.arrays("undisturbed"), undisturbed)


LEGS = ((8, 12), (4, 9), (2, 14), (8, None))  # devices, and steps until a stop is asked for


def train_on_other_meshes(folder: Path) -> None:
    """In a process with 64-bit floats: one run on 8 devices, and one that goes from mesh to mesh."""
    from gemma_jax.cli import main
    from gemma_jax.training import interruption

    class StopAfter:
        left: int | None = None

        @property
        def requested(self) -> bool:
            if StopAfter.left is not None:
                StopAfter.left -= 1
            return StopAfter.left == 0

        def __enter__(self) -> "StopAfter":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

    interruption.StopSignals = StopAfter  # type: ignore[assignment,misc]  # it stands for the signals
    wide = ["--compute.dtype", "float64", "--compute.param_dtype", "float64", "--checkpoint.every", "1000"]
    config = str(folder / "config.json")

    def train(run: str, devices: int) -> int:
        where = ["--run_dir", str(folder / run), "--mesh.cpu_devices", str(devices)]
        return main(["pretrain", config, *where, *wide])

    assert train("one-mesh", 8) == 0
    for devices, steps in LEGS:
        StopAfter.left = steps
        assert train("many-meshes", devices) == (0 if steps is None else 75)
    arrays = {run: last_arrays(folder / run) for run in ("one-mesh", "many-meshes")}
    for run, named in arrays.items():
        np.savez(folder / f"{run}.npz", **named)


def test_a_run_that_moves_to_other_meshes_ends_the_same(runs: Runs) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/commands'); "
        "import test_interruption; test_interruption.train_on_other_meshes(Path(sys.argv[1]))"
    )
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(runs.folder)],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    status, said = ended(process, 240)
    assert status == 0, said
    starts = [sum(steps or 0 for _, steps in LEGS[:i]) for i in range(1, len(LEGS))]
    for start in starts:
        assert f"resuming {runs.folder / 'many-meshes'} at step {start} of {STEPS}" in said
    one, many = (dict(np.load(runs.folder / f"{run}.npz")) for run in ("one-mesh", "many-meshes"))
    assert one.keys() == many.keys() and len(one) > 30
    for name, expected in one.items():
        assert expected.dtype in (np.float64, np.int32), name
        difference = np.linalg.norm(many[name] - expected) / max(np.linalg.norm(expected), 1e-300)
        assert difference < 1e-8, (name, difference)
    # No batch was lost or seen twice: each step once, with the loss of the undisturbed run.
    expected_losses, actual = dict(losses(runs, "one-mesh")), losses(runs, "many-meshes")
    assert collections.Counter(step for step, _ in actual) == dict.fromkeys(range(1, STEPS + 1), 1)
    for step, loss in actual:
        assert abs(loss - expected_losses[step]) < 1e-8 * expected_losses[step]
