"""Several processes, one per host: how they find each other, agree, are stopped, and end together.

With a single process nothing here has an effect, except SIGTERM and Ctrl-C, which ask a run to save itself and end.
"""

import contextlib
import contextvars
import ctypes
import importlib.util
import inspect
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from lamini_jax.errors import PROCESS_LOST, UserError

_PATIENCE = 20  # seconds that a failing process waits for the others
LONG_SECONDS = 5  # seconds after which progress is worth showing, as the `delay` of a bar
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_preempted = False
_background: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("background", default=None)


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    """Joins the other processes. In a cluster that jax knows it finds them; elsewhere the arguments name them.

    Raises UserError: PROCESS_LOST if they have not found each other within `timeout` seconds, BAD_INPUT if it is not
    known where they are.
    """
    try:
        whole = _detect(coordinator, num_processes, process_id, timeout)
        if None not in whole:
            _assemble(*whole, timeout)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(*whole, local_device_ids=_local_devices(), initialization_timeout=timeout)
    except ValueError as error:
        named = "name --coordinator, --num_processes and --process_id"
        raise UserError(f"--multihost: the processes cannot find each other ({_first_line(error)}); {named}") from None
    except RuntimeError as error:
        reason = _first_line(error)
        raise UserError(f"--multihost: the processes did not find each other ({reason})", PROCESS_LOST) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _detect(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> tuple[str | None, int | None, int | None]:
    """These three, with what is None taken from the cluster (SLURM, Open MPI, TPU pods, Kubernetes) if there is one.

    It is jax's own detection, so that both always mean the same processes. No public function has it; where this one
    is no longer found, jax fills in what is None, and tells less well who did not come.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = coordinator, num_processes, process_id
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        arguments = inspect.signature(detect).bind(*given, None, None, timeout)
    except (ImportError, AttributeError, TypeError):
        return given
    return detect(*arguments.args)[:3]


def _local_devices() -> list[int] | None:
    """The devices of this process, where jax would guess wrongly: it takes SLURM's index of a task within its node.

    That counts all GPUs of the node, also where each task sees only its own (`srun --gpus-per-task=1`).
    """
    visible, index = os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.environ.get("SLURM_LOCALID", "")
    count = len(visible.split(",")) if visible else 0
    return list(range(count)) if index.isdecimal() and 0 < count <= int(index) else None


def _assemble(coordinator: str, num_processes: int, process_id: int, timeout: int) -> None:
    """Waits until all have come: jax would end a process that waits in vain with a page of stack traces."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--coordinator={coordinator}: must be HOST:PORT")
    if process_id >= num_processes:
        raise UserError(f"--process_id={process_id}: must be below the number of processes, {num_processes}")
    deadline = time.monotonic() + timeout
    if process_id:
        failure = f"--multihost: process 0, at {coordinator}, was not reached within {timeout} s"
        _report_to(host.strip("[]"), int(port), deadline, failure)
        return
    try:
        with _server(int(port)) as server, contextlib.ExitStack() as present:
            for count in range(1, num_processes):
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    present.enter_context(server.accept()[0])
                except TimeoutError:
                    message = f"--multihost: only {count} of {num_processes} processes came within {timeout} s"
                    raise UserError(message, PROCESS_LOST) from None
    except OSError as error:
        raise UserError(f"--multihost: {coordinator} cannot be used ({error.strerror})", PROCESS_LOST) from None


def _server(port: int) -> socket.socket:
    """Listens at a port of all addresses of this host, as jax does afterwards: of both kinds, where it has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _report_to(host: str, port: int, deadline: float, failure: str) -> None:
    """Connects to the coordinator and waits until it closes the connection, which it does when all have come."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                connection.recv(1)
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"{failure} ({error.strerror or error})", PROCESS_LOST) from None
            time.sleep(0.5)


def keep_freed_memory() -> None:
    """Makes the C library, where it is glibc, keep up to 2 GB of what is freed for what is allocated next.

    XLA allocates what a step needs at once and frees it after it. Otherwise that goes back to the system, which hands
    it out anew page by page, zeroed: a quarter of a step of a small model on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def compile_quickly_for_gpus() -> None:
    """Makes XLA leave matrix products on GPUs to cuBLAS, unless XLA_FLAGS says otherwise; before any device is used.

    By default it writes kernels for them in many ways and times each, at every new shape. On an H100 (jax 0.11.2) a
    step beside the tiny backbone then compiles in 15 s and takes 0.69 ms; with this in 1.4 s and 0.67 ms. In the shape
    of SmolLM2 it is not compiled after 70 s; with this after 2.4 s. In that of Llama 3 8B it takes 1% longer.
    """
    installed = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    flag, given = "--xla_gpu_enable_triton_gemm", os.environ.get("XLA_FLAGS", "")
    if installed and flag not in given:
        os.environ["XLA_FLAGS"] = f"{given} {flag}=false".strip()


def is_primary() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints in the first process only."""
    if is_primary():
        print(f"{text}\n", end="", flush=True)  # in one piece, whatever other threads print


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm.tqdm:
    """A progress bar of the first process: twice a second on a terminal, every ten seconds in a file."""
    interval, hidden = 0.5 if sys.stderr.isatty() else 10.0, _background.get() is not None or not is_primary()
    return tqdm.tqdm(iterable, mininterval=interval, disable=hidden, **options)


def broadcast(flag: bool) -> bool:
    """The first process's value, in every process."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(flag)))


def barrier(name: str) -> None:
    """Waits until all processes have come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def preemption_guard():
    """Inside this context a SIGTERM or Ctrl-C does not end the process: `preempted` reports it. A second one does.

    Signals are the main thread's; in another one this has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def remember(number, _):
        global _preempted
        _preempted = True
        signal.signal(number, before[number])
        if jax.process_count() > 1:  # jax watches for SIGTERM, and finds the step at which all processes can stop
            os.kill(os.getpid(), signal.SIGTERM)

    watched = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, remember) for number in watched}
    try:
        yield
    finally:
        for number in watched:
            signal.signal(number, before[number])


@contextlib.contextmanager
def in_background(ending: threading.Event):
    """Inside this context, in this thread, runs show no progress, and end as after a SIGTERM when the event is set."""
    token = _background.set(ending)
    try:
        yield
    finally:
        _background.reset(token)


def preempted(step: int) -> bool:
    """Whether to stop after this step; the same in all processes."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    ending = _background.get()
    return _preempted or (ending is not None and ending.is_set())


def lost_process_status(error: Exception) -> int | None:
    """Of an error in one of several processes: prints what it was and returns the status. None for a single process.

    An error of jax's runtime means that another process ended; for any other one the traceback is printed.
    """
    if not jax.distributed.is_initialized():
        return None
    # jax raises the same failure as a ValueError where it waits for all processes, as it does while saving.
    if not isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" not in str(error):
        traceback.print_exc()
        return 1
    reason = str(error).splitlines()[0]
    print(f"error: another process ended, and so does this one; start all of them again ({reason})", file=sys.stderr)
    return PROCESS_LOST


def exit_process(status: int) -> None:
    """Exits. If one of several processes fails, it waits a little for others that may end for the same reason."""
    if not status or not jax.distributed.is_initialized():
        sys.exit(status)
    if status != PROCESS_LOST:
        together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        together.start()
        together.join(_PATIENCE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
