"""Setup before jax first uses a device: joins the other processes of a job, and caches compiled programs.

A job of several processes ends as a whole. A process that fails prints the reason and exits at once, without
the usual shutdown, which would wait for the others. The others notice this by a broken connection, or at the
latest after `hosts.heartbeat_seconds`, and exit too.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma_jax.config import HostsConfig
from gemma_jax.errors import RESTART_STATUS, UserError
from gemma_jax.paths import user_path

# Error codes at the start of a message that mean that a restart would fail again at the same place. Other
# codes mean broken connections or devices.
_OWN_FAULT = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")

# All processes detect most mistakes at the same time. When the first one exits, jax aborts the others, so
# each process waits this long before it exits, to let the others report their mistakes.
_PARTING_SECONDS = 2

_JOIN_SECONDS = 300  # time limit for the other processes of a job to start


@contextlib.contextmanager
def joined(config: HostsConfig, *, on_cpu: bool) -> Iterator[None]:
    """Context in which the process belongs to its job. Enter it before any use of a device.

    If the process has joined others, an exception that leaves the context ends the process: with status 2 for
    a UserError, with RESTART_STATUS if another process or a device is the likely cause, otherwise with 1. In
    a job of one process the exception is just raised.

    Args:
      config: How the processes of the job find each other.
      on_cpu: Whether the mesh must use CPU devices even if there are others.

    Raises:
      UserError: Pathways is requested, but its package is not installed; or jax was used before.
    """
    if "proxy" in os.environ.get("JAX_PLATFORMS", "") and not on_cpu:
        _start_pathways()
    arguments = join_arguments(config, os.environ, on_cpu=on_cpu)
    if arguments is None:
        yield
        return
    try:
        with _patience(arguments):
            jax.distributed.initialize(
                **arguments,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
                # After this time jax aborts the process with a page of C++ output; `_patience` exits earlier.
                initialization_timeout=_JOIN_SECONDS + 60,
            )
    except jax.errors.JaxRuntimeError as error:
        _end(error)
    except RuntimeError as error:
        raise UserError(
            f"the other processes of the job cannot be joined ({error}); start a new process, or set "
            "--hosts.count 1 if there are no others."
        ) from error
    try:
        yield
        # Waits for the other processes, so that none takes the end of this one for a failure.
        jax.distributed.shutdown()
    except BaseException as error:
        _end(error)


@contextlib.contextmanager
def _patience(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Context for joining the other processes: prints that it waits, and exits after _JOIN_SECONDS."""
    index, count = (arguments.get(name, "?") for name in ("process_id", "num_processes"))
    address = arguments.get("coordinator_address", "found by " + arguments["cluster_detection_method"])

    def give_up() -> None:
        who = "all others have not come" if index == 0 else "nobody answers"
        print(
            f"error: process {index} of {count} has waited {_JOIN_SECONDS} s for the job at {address}, and "
            f"{who}; check the address, that every process was started with its own index, and the network.",
            file=sys.stderr,
            flush=True,
        )
        # If the address was detected, this is not a mistake of the user: after a preemption the other
        # processes may start later.
        os._exit(2 if "coordinator_address" in arguments else RESTART_STATUS)

    print(f"process {index} of {count} waits for the others at {address}", file=sys.stderr, flush=True)
    timer = threading.Timer(_JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join_arguments(
    config: HostsConfig, environment: Mapping[str, str], *, on_cpu: bool
) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`, or None if there are no other processes.

    jax tries every kind of cluster that it knows, and treats any Kubernetes pod as part of a cluster. So the
    kind is selected here, by environment variables that only processes of that kind have.

    Args:
      config: Sets the processes explicitly, or leaves them to be detected.
      environment: The environment of this process, after jax was imported.
      on_cpu: Whether a TPU of this machine, if there is one, must not be used.
    """
    if config.coordinator:
        return {
            "coordinator_address": config.coordinator,
            "num_processes": config.count,
            "process_id": config.index,
            "cluster_detection_method": "deactivate",
        }
    if config.count == 1:
        return None
    # Slurm sets this within a step (srun), but not in the batch script around it.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return {"cluster_detection_method": "slurm"}
    if {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} <= environment.keys():
        return _torchrun_arguments(environment)
    # jax sets TPU_ML_PLATFORM if it finds TPU chips and their driver.
    if on_cpu or "TPU_ML_PLATFORM" not in environment or "proxy" in environment.get("JAX_PLATFORMS", ""):
        return None
    if "TPU_WORKER_HOSTNAMES" in environment or "TPU_PROCESS_ADDRESSES" in environment:
        return {"cluster_detection_method": "gketpu"}
    # A TPU VM of Compute Engine: its metadata server knows the others. A single VM is a job of one process.
    return None if "TPU_SKIP_MDS_QUERY" in environment else {"cluster_detection_method": "gcetpu"}


def _torchrun_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize` under torchrun and whatever sets its variables.

    With several processes on a machine each has one of its GPUs. torchrun itself listens at MASTER_PORT, so
    the processes meet at the next port (docs.pytorch.org/docs/stable/elastic/run.html).
    """
    count = int(environment["WORLD_SIZE"])
    if count == 1:
        return None
    found: dict[str, Any] = {
        "coordinator_address": f"{environment['MASTER_ADDR']}:{int(environment['MASTER_PORT']) + 1}",
        "num_processes": count,
        "process_id": int(environment["RANK"]),
        "cluster_detection_method": "deactivate",
    }
    is_given_one = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    if int(environment.get("LOCAL_WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in environment and not is_given_one:
        found["local_device_ids"] = [int(environment["LOCAL_RANK"])]
    return found


def _start_pathways() -> None:
    """Start Pathways: one process controls all devices of a cluster, which is one large host to jax."""
    try:
        import pathwaysutils
    except ImportError as error:
        raise UserError(
            f"JAX_PLATFORMS names the proxy of Pathways, which needs the package pathwaysutils ({error}); "
            "install it with `pip install pathwaysutils`, or unset JAX_PLATFORMS."
        ) from error
    pathwaysutils.initialize()


def _end(error: BaseException) -> NoReturn:
    who = f"process {os.getpid()} on {socket.gethostname()}"
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, UserError):
        status, reason = 2, " ".join(str(error).splitlines())
        time.sleep(_PARTING_SECONDS)
    elif isinstance(error, KeyboardInterrupt | SystemExit):
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
        reason = type(error).__name__
    else:
        traceback.print_exception(error)
        temporary = isinstance(error, jax.errors.JaxRuntimeError) and not first_line.startswith(_OWN_FAULT)
        status, reason = RESTART_STATUS if temporary else 1, first_line
        if temporary:
            reason = (
                f"{reason} (as when another process of the job has ended: if so, its own log says why, and "
                "the same command resumes from the last checkpoint)"
            )
    print(f"error: {who} ends, and the job with it: {reason}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    finally:  # even if standard output cannot be written, as on a full disk
        os._exit(status)


def wait_for_all(what: str) -> None:
    """Wait until every process of the job has reached this call. Returns at once in a job of one process.

    Args:
      what: A name for this call. jax raises an error if the processes pass different names.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Whether the flag of any process of the job is set. Every process must call this."""
    return jax.process_count() > 1 and bool(np.any(multihost_utils.process_allgather(np.array(flag)))) or flag


def keep_programs(folder: str, default: str = "") -> None:
    """Keeps compiled programs in a folder or bucket.

    If `folder` is empty, jax's own setting (jax_compilation_cache_dir) stays as it is. If that is not set
    either, programs are kept in `default`, or nowhere if this is empty.
    """
    folder = folder or (default if jax.config.values["jax_compilation_cache_dir"] is None else "")
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(user_path(folder)))
        # By default jax keeps only what took a second; there are more programs that take a little less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
