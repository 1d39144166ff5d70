"""The ways to start a run in launch/: their commands are accepted, and restarts do what is promised."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from gemma_jax.commands.data_preview import PreviewOptions
from gemma_jax.commands.plan import PlanOptions
from gemma_jax.commands.replay import ReplayOptions
from gemma_jax.commands.runs import RunsOptions
from gemma_jax.config import (
    ChatConfig,
    ConvertConfig,
    FinetuneConfig,
    PretrainConfig,
    SampleConfig,
    VerifyConfig,
    load,
    parse,
    validate,
)
from gemma_jax.errors import RESTART_STATUS

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", LAUNCH / "README.md", *sorted(DOCS.glob("*.md")))
OPTIONS = {
    "sample": SampleConfig(),
    "chat": ChatConfig(),
    "convert": ConvertConfig(),
    "verify": VerifyConfig(),
    "runs": RunsOptions(),
    "replay": ReplayOptions(),
    "inspect": PretrainConfig(),
    "plan": PlanOptions(),
    "data-preview": PreviewOptions(),
}
TRAINING = {"pretrain": (PretrainConfig, "demo"), "finetune": (FinetuneConfig, "finetune_tiny")}


def check_command(command: str, arguments: Sequence[str]) -> None:
    """What follows `pretrain` or `finetune` in a command is accepted."""
    name, *options = ({"N": "2", "I": "0"}.get(word, word) for word in arguments)  # placeholders
    kind, example = TRAINING[command]
    if not name.startswith("runs/"):
        config, _ = load(name.replace("CONFIG", example), kind)
        validate(parse(config, options, name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_command_of_the_pages_is_accepted(page: Path) -> None:
    blocks = page.read_text(encoding="utf-8").replace("\\\n", " ").split("```")[1::2]
    lines = [line.replace('"', "") for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if "[" not in line]
    for words in commands:
        if trains := TRAINING.keys() & words:
            check_command(*trains, words[words.index(*trains) + 1 :])
        elif "sample.py" in words or ("gemma" in words and "=" not in words):  # not a line of Python
            name = "sample" if "sample.py" in words else words[words.index("gemma") + 1]
            options = words[next((i for i, word in enumerate(words) if word.startswith("--")), len(words)) :]
            parse(OPTIONS[name], options, name)


def test_the_jobset_trains_and_restarts_on_what_a_restart_mends() -> None:
    (replicated,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == [
        "python",
        "-u",
        "train.py",
    ]  # no shell, which would keep SIGTERM to itself
    assert container["args"][0] == "pretrain"
    check_command("pretrain", container["args"][1:])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and RESTART_STATUS not in rule["onExitCodes"]["values"]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("statuses", "environment", "last", "runs"),
    [
        ([0], {}, 0, 1),
        ([75, 75, 0], {}, 0, 3),
        ([134, 0], {}, 0, 2),
        ([75, 2, 0], {}, 2, 2),
        ([1, 0], {}, 1, 1),
        ([75] * 9, {"RESTART_LIMIT": "3"}, 75, 3),  # ends quickly again and again
        ([75] * 8 + [0], {"RESTART_LIMIT": "3", "RESTART_QUICK_SECONDS": "0"}, 0, 9),
    ],
)
def test_a_command_is_run_again_while_that_helps(
    tmp_path: Path, statuses: list[int], environment: dict[str, str], last: int, runs: int
) -> None:
    script = f"""
echo >> {tmp_path}/runs
statuses=({" ".join(map(str, statuses))})
exit ${{statuses[$(wc -l < {tmp_path}/runs) - 1]}}
"""
    command = [str(LAUNCH / "restart.sh"), "bash", "-c", script]
    done = subprocess.run(command, env={**os.environ, **environment}, timeout=60)
    assert (done.returncode, len((tmp_path / "runs").read_text())) == (last, runs)


def test_a_signal_is_passed_on_and_ends_the_restarts(tmp_path: Path) -> None:
    said = tmp_path / "said"
    saves = f"trap 'sleep 0.5; echo saved >> {said}; exit 75' TERM"
    script = f"{saves}; echo up >> {said}; while true; do sleep 0.1; done"
    process = subprocess.Popen([str(LAUNCH / "restart.sh"), "bash", "-c", script])
    until = time.monotonic() + 30
    while not said.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert said.read_text().split() == ["up", "saved"]
