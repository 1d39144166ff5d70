"""What must come before jax's first use of a device: joining the other processes of a job, and the cache
of compiled programs.

A job of several processes ends as one. A process that fails says why and leaves at once, without the usual
farewells, which would wait for the others; they notice that it is gone, by a broken connection or at the
latest after `hosts.heartbeat_seconds`, and end too.
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

# Codes that begin the messages of errors which would come again at the same place. The others are those of
# broken connections and devices.
_OWN_FAULT = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")

# Most mistakes are found by all processes at once. When the first one ends, jax aborts the others: each is
# given the time to report its mistake.
_PARTING_SECONDS = 2

_JOIN_SECONDS = 300  # that the other processes of a job have for their start


@contextlib.contextmanager
def joined(config: HostsConfig, *, on_cpu: bool) -> Iterator[None]:
    """Within this context the process belongs to its job; to be entered before any use of a device.

    An exception that leaves the context ends the process where it has joined others: with status 2 for a
    UserError, RESTART_STATUS where another process or a device is the likely cause, else 1. Without others
    it is just raised.

    Args:
      config: of the job.
      on_cpu: the mesh is to be of CPU devices, whatever else there is.

    Raises:
      UserError: Pathways is asked for, but its package is not installed; or jax was used before.
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
                # When this has passed, jax aborts the process with a page of C++; `_patience` ends before it.
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
        # Waits for the others, so that none takes this end for a failure.
        jax.distributed.shutdown()
    except BaseException as error:
        _end(error)


@contextlib.contextmanager
def _patience(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within this context the other processes are waited for, which is said, but not for ever."""
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
        # An address that was found is no mistake of the user: after a preemption others may start later.
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
    """What `jax.distributed.initialize` needs to find the other processes; None where there are none.

    jax asks every kind of cluster that it knows, and takes any pod of Kubernetes for a part of one. So the
    kind is chosen here, by what only such a process has in its environment.

    Args:
      config: names the processes, or leaves them to be found.
      environment: of this process, after jax was imported.
      on_cpu: a TPU of this machine, if it has one, is not to be used.
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
    # Set within a step (srun), but not in the batch script around it.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return {"cluster_detection_method": "slurm"}
    # jax sets TPU_ML_PLATFORM where it finds TPU chips and their driver.
    if on_cpu or "TPU_ML_PLATFORM" not in environment or "proxy" in environment.get("JAX_PLATFORMS", ""):
        return None
    if "TPU_WORKER_HOSTNAMES" in environment or "TPU_PROCESS_ADDRESSES" in environment:
        return {"cluster_detection_method": "gketpu"}
    # A TPU VM of Compute Engine, whose metadata server knows the others; a single one is a job of one.
    return None if "TPU_SKIP_MDS_QUERY" in environment else {"cluster_detection_method": "gcetpu"}


def _start_pathways() -> None:
    """One process commands all devices of a Pathways cluster, which looks to jax like one large host."""
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
    finally:  # also where standard output is full
        os._exit(status)


def wait_for_all(what: str) -> None:
    """Return when every process of the job has come to this call; at once where there is one.

    Args:
      what: the same in all of them, or jax raises an error.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Whether the flag of any process of the job is set; all must call this."""
    return jax.process_count() > 1 and bool(np.any(multihost_utils.process_allgather(np.array(flag)))) or flag


def keep_programs(folder: str) -> None:
    """Keep compiled programs in a folder or bucket, and find them there; nothing changes if it is empty."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(user_path(folder)))
