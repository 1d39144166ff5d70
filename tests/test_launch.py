"""What launch/ and the page about long runs name is there, and the restarts restart."""

import dataclasses
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_jax.config import PretrainConfig
from gemma_jax.errors import RESTART_STATUS

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TEXTS = [*SCRIPTS, LAUNCH / "README.md", LAUNCH / "jobset.yaml", ROOT / "docs" / "pretraining.md"]


def options(config: Any, prefix: str = "--") -> set[str]:
    found = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= options(value, f"{prefix}{field.name}.")
        else:
            found.add(prefix + field.name)
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_option_and_config_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = options(PretrainConfig())
    # Ours are those with a section, and those without a dash that no other program here has.
    named = set(re.findall(r"(?<![\w-])--[a-z_]+\.[a-z_0-9]+", text))
    named |= set(re.findall(r"(?<![\w-])--(?:run_dir|steps|profile|existing_run)\b", text))
    assert named <= known, named - known
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")} | {"CONFIG"}
    used = set(re.findall(r"\bpretrain[\s-]+(gemma_\w+|CONFIG|demo)", text))
    assert used <= configs, used - configs
    for name in re.findall(r"`(stability|checkpoint|hosts|compute|mesh|data|logging)\.(\w+)`", text):
        assert f"--{'.'.join(name)}" in known or name[1] == "py", name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    assert os.access(path, os.X_OK)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_jobset_restarts_on_what_a_restart_mends() -> None:
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    ends = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and ends["operator"] == "In" and ends["values"] == [1, 2]
    assert RESTART_STATUS not in ends["values"] and ends["containerName"] == container["name"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # as podFailurePolicy demands
    assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    # 16 x 16 chips are 64 hosts of 4.
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns / chips
    # The process that trains is the one that gets the signal.
    assert container["command"][0] == "python"
    assert set(container["args"][2::2]) <= options(PretrainConfig())


def test_the_container_holds_what_training_needs() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"gemma_jax", "configs", "train.py", "setup.py", "pyproject.toml", "constraints"} <= set(copied)


def restart(tmp_path: Path, statuses: list[int], **environment: str) -> tuple[int, int]:
    """Run a command that ends with one of these statuses after the other; its last, and how often it ran."""
    script = f"""
n=$(cat {tmp_path}/count 2>/dev/null || echo 0)
echo $((n + 1)) > {tmp_path}/count
statuses=({" ".join(map(str, statuses))})
exit ${{statuses[$n]}}
"""
    done = subprocess.run(
        [str(LAUNCH / "restart.sh"), "bash", "-c", script], env={**os.environ, **environment}, timeout=60
    )
    return done.returncode, int((tmp_path / "count").read_text())


@pytest.mark.parametrize(
    ("statuses", "last", "runs"),
    [([0], 0, 1), ([75, 75, 0], 0, 3), ([134, 0], 0, 2), ([75, 2, 0], 2, 2), ([1, 0], 1, 1)],
)
def test_a_command_is_run_again_while_that_helps(
    tmp_path: Path, statuses: list[int], last: int, runs: int
) -> None:
    assert restart(tmp_path, statuses) == (last, runs)


def test_a_command_that_ends_quickly_again_and_again_is_given_up(tmp_path: Path) -> None:
    assert restart(tmp_path, [75] * 9, RESTART_LIMIT="3") == (75, 3)


def test_a_command_that_lasts_is_not_given_up(tmp_path: Path) -> None:
    statuses = [75] * 8 + [0]
    assert restart(tmp_path, statuses, RESTART_LIMIT="3", RESTART_QUICK_SECONDS="0") == (0, 9)


def test_a_signal_is_passed_on_and_ends_the_restarts(tmp_path: Path) -> None:
    said = tmp_path / "said"
    saves = f"trap 'sleep 0.5; echo saved >> {said}; exit 75' TERM"
    script = f"{saves}; echo up >> {said}; sleep 60 & wait"
    process = subprocess.Popen([str(LAUNCH / "restart.sh"), "bash", "-c", script])
    until = time.monotonic() + 30
    while not said.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert said.read_text().split() == ["up", "saved"]
