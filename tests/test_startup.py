"""How a process finds the others of its job, and how it leaves them."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gemma_jax import startup
from gemma_jax.config import HostsConfig
from gemma_jax.errors import UserError
from tests.messages import naming

TPU = {"TPU_ML_PLATFORM": "JAX"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        # Any pod of Kubernetes has this, whatever it runs.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # the batch script, outside of srun
        (TPU, "gcetpu"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # no chips here
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (TPU | {"JAX_PLATFORMS": "proxy"}, None),  # Pathways commands all hosts from one process
    ],
)
def test_others_are_looked_for_where_there_are_some(environment: dict[str, str], found: str | None) -> None:
    arguments = startup.join_arguments(HostsConfig(), environment, on_cpu=False)
    assert arguments == (None if found is None else {"cluster_detection_method": found})
    # A user who says that there are no others is believed.
    assert startup.join_arguments(HostsConfig(count=1), environment, on_cpu=False) is None
    # CPU devices of a TPU machine have nothing to do with its pod.
    on_cpu = startup.join_arguments(HostsConfig(), environment, on_cpu=True)
    assert on_cpu == (arguments if found == "slurm" else None)


def test_a_coordinator_that_is_named_goes_before_what_is_found() -> None:
    config = HostsConfig(coordinator="10.0.0.7:8476", count=4, index=2)
    assert startup.join_arguments(config, SLURM, on_cpu=False) == {
        "coordinator_address": "10.0.0.7:8476",
        "num_processes": 4,
        "process_id": 2,
        "cluster_detection_method": "deactivate",
    }


TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "RANK": "5", "WORLD_SIZE": "16"}


def test_the_variables_of_torchrun_are_understood() -> None:
    """torchrun listens at its port itself. Of the GPUs of a machine each process has one."""
    found = startup.join_arguments(HostsConfig(), TORCHRUN, on_cpu=False)
    joined = {"coordinator_address": "10.0.0.1:29501", "num_processes": 16, "process_id": 5}
    assert found == joined | {"cluster_detection_method": "deactivate"}
    on_machine = TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}
    found = startup.join_arguments(HostsConfig(), on_machine, on_cpu=False)
    assert found and found["local_device_ids"] == [5]
    assert startup.join_arguments(HostsConfig(), TORCHRUN | {"WORLD_SIZE": "1"}, on_cpu=False) is None


LEAVES = """
import jax
from gemma_jax.config import HostsConfig
from gemma_jax.errors import UserError
from gemma_jax.startup import joined

jax.distributed.initialize = lambda **arguments: None
with joined(HostsConfig("localhost:1", 2, 1), on_cpu=True):
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ('UserError("the disk is\\nfull.")', 2, "the disk is full."),
        ('jax.errors.JaxRuntimeError("UNAVAILABLE: gone")', 75, "UNAVAILABLE: gone"),
        ('jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9G")', 1, "RESOURCE_EXHAUSTED: 9G"),
    ],
)
def test_a_process_of_a_job_leaves_with_its_reason(error: str, status: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES.format(error=error)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert ("Traceback" in done.stderr) == (status in (1, 75))


def test_a_job_cannot_be_joined_after_jax_was_used() -> None:
    jax.devices()
    config = HostsConfig("localhost:1", 2, 1)
    with pytest.raises(UserError, match="--hosts.count 1"), startup.joined(config, on_cpu=True):
        pass


def test_a_process_without_others_just_raises() -> None:
    with pytest.raises(ValueError, match="a bug"), startup.joined(HostsConfig(count=1), on_cpu=True):
        raise ValueError("a bug")
    startup.wait_for_all("nothing")
    assert startup.any_process(True) and not startup.any_process(False)


WAITS = """
from gemma_jax import startup
from gemma_jax.config import HostsConfig

startup._JOIN_SECONDS = 3
with startup.joined(HostsConfig("localhost:1", 2, {index}), on_cpu=True):
    pass
"""


@pytest.mark.parametrize("index", [0, 1])
def test_others_that_do_not_come_are_not_waited_for_for_ever(index: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITS.format(index=index).replace("localhost:1", f"localhost:{_free_port()}")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    first, last = done.stderr.strip().splitlines()
    assert re.search(naming(index, 2, "localhost"), first)
    assert last.startswith("error: ") and "localhost" in last


PATIENCE = """
import time
from gemma_jax import startup
startup._JOIN_SECONDS = 0.1
with startup._patience({"cluster_detection_method": "gcetpu"}):
    time.sleep(60)
"""
FULL = """
from gemma_jax import startup, streams
streams.guard_streams()
print("something")
startup._end(ValueError("a bug"))
"""


@pytest.mark.parametrize(("program", "status"), [(PATIENCE, 75), (FULL, 1)])
def test_a_pod_is_waited_for_again_and_a_full_output_does_not_keep_a_process(
    program: str, status: int
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == status and done.stderr.splitlines()[-1].startswith("error: "), done.stderr


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port
