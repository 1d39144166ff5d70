"""Runs that are stopped or killed, or that lose files, as real processes."""

import json
import random
import re
import signal
import subprocess
import time

import pytest

from tests.commands.processes import STEPS, Arrays, Runs, assert_same_bits, ended, losses, wait_for
from tests.messages import naming
from tests.tiny_run import WORDS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Arrays:
    runs.finish("undisturbed")
    return runs.arrays("undisturbed")


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
    assert status == 75 and re.search(naming(number.name, "saving"), said) and "Traceback" not in said
    saved = runs.checkpoints(run)
    assert len(saved) == 1 and re.search(naming("stopped", f"step {saved[0]}"), said)
    resumed = runs.finish(run, "--checkpoint.every", "1000")
    assert re.search(naming("resuming", saved[0], STEPS), resumed)
    assert_same_bits(runs.arrays(run), undisturbed)
    assert losses(runs, run) == losses(runs, "undisturbed")


def test_a_second_interrupt_ends_at_once(runs: Runs, cleanup: list[subprocess.Popen[str]]) -> None:
    """Steps take seconds here, and Python handles no signal while it waits for one."""
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
    assert status in (130, -signal.SIGINT) and re.search(naming("SIGINT", "saving"), said)
    assert "Traceback" not in said and runs.checkpoints(run) == []


def test_signals_while_the_step_is_compiled_or_the_loss_is_evaluated(
    runs: Runs, undisturbed: Arrays, cleanup: list[subprocess.Popen[str]]
) -> None:
    for run, every, cache, moment in (
        ("compiling", "1000", "none", lambda said: "starting" in said),
        ("evaluating", "1", "programs", lambda said: "held out loss" in said),
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
    assert status == 75 and re.search(naming(number.name, "ending"), said) and "Traceback" not in said, said
    assert not (runs.folder / run).exists()
