"""Several processes, one per host: how they find each other, agree, are stopped, and end together.

With a single process nothing here does anything, but for SIGTERM, which asks a run to save itself and end.
"""

import os
import signal
import socket
import sys
import time
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

from lamini_jax.errors import PROCESS_LOST, UserError

_terminated = False


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Joins the other processes. TPU pods and SLURM say by themselves who they are; elsewhere the arguments do.

    Raises UserError (PROCESS_LOST) if the others cannot be reached within `timeout` seconds.
    """
    if coordinator and process_id:
        _reach(coordinator, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--multihost: the processes did not find each other ({reason})", PROCESS_LOST) from None


def _reach(coordinator: str, timeout: int) -> None:
    """Waits for the coordinator to listen: jax itself would end the process with a page of logs."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except ValueError:
            raise UserError(f"--coordinator={coordinator}: must be HOST:PORT") from None
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                message = f"--coordinator={coordinator}: not reached within {timeout} s ({reason})"
                raise UserError(message, PROCESS_LOST) from None
            time.sleep(0.5)


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, once for all processes."""
    if first():
        print(text, flush=True)


def agree(flag: bool) -> bool:
    """What the first process thinks."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(flag)))


def meet(name: str) -> None:
    """Waits for all the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def watch() -> None:
    """From now on a SIGTERM does not end the process: `terminated` tells of it."""

    def remember(*_):
        global _terminated
        _terminated = True

    if jax.process_count() == 1:  # otherwise jax watches, and finds the step at which all processes can stop
        signal.signal(signal.SIGTERM, remember)


def terminated(step: int) -> bool:
    """Whether to stop after this step, which all processes answer alike."""
    return _terminated if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


def lost(error: Exception) -> int | None:
    """The status of an error that the end of another process caused, with a line that says so; otherwise None."""
    if not jax.distributed.is_initialized():
        return None
    if not isinstance(error, jax.errors.JaxRuntimeError):
        traceback.print_exc()
        return 1
    reason = str(error).splitlines()[0]
    print(f"error: another process ended, and so does this one; start all of them again ({reason})", file=sys.stderr)
    return PROCESS_LOST


def end(status: int) -> None:
    """Exits. One of several that fails does not wait for the others, whom its silence tells."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
