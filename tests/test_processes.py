"""Several processes are one run: the same numbers, stopped and continued, and no one waits for the dead."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import numpy as np
import pytest

from lamini_jax.errors import PREEMPTED, PROCESS_LOST, UserError
from lamini_jax.runtime import processes

HERE = Path(__file__).parent
EPOCHS = 4  # of three steps each


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def launch(directory, who, *arguments, port=0):
    devices = 1 if who == "alone" else 4
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }
    command = [sys.executable, str(HERE / "worker.py"), str(directory), str(EPOCHS), str(port), who]
    command += map(str, arguments)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(directory, *arguments):
    """Two processes; the arguments are the second's. Their statuses and what they said."""
    port = free_port()
    both = launch(directory, "0", port=port), launch(directory, "1", *arguments, port=port)
    done = [helpers.finish(process) for process in both]
    return [result.returncode for result in done], "".join(result.stdout + result.stderr for result in done)


def read(directory):
    """What the last checkpoint holds of each trained expert, and the progress."""
    saved = helpers.latest(directory)
    return helpers.by_expert(saved.arrays["expert_ids_S"], saved.tables), helpers.progress_of(saved)


def assert_nearly_the_same_run(directory, expected):
    """To float tolerance, because other processes sum in another order."""
    ((ids_X, _), progress), ((expected_ids_X, _), expected) = read(directory), read(expected)
    np.testing.assert_array_equal(ids_X, expected_ids_X)
    np.testing.assert_allclose(progress.loss, expected.loss, rtol=1e-4)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two processes that nobody stopped."""
    directory = tmp_path_factory.mktemp("straight")
    statuses, said = together(directory)
    assert statuses == [0, 0], said
    assert said.count("at the end") == 1  # one of them speaks
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """One whose second process got a SIGTERM in the middle of an epoch."""
    directory = tmp_path_factory.mktemp("stopped")
    statuses, said = together(directory, int(signal.SIGTERM), 5)
    assert statuses == [PREEMPTED, PREEMPTED], said
    assert said.count("run again to continue") == 2
    _, progress = read(directory)
    assert 5 <= progress.steps < 3 * EPOCHS
    return directory


def test_two_processes_are_one_run(straight, tmp_path):
    alone = launch(tmp_path, "alone")
    assert helpers.finish(alone).returncode == 0
    assert_nearly_the_same_run(tmp_path, straight)


def test_stopped_and_continued_on_two(straight, stopped, tmp_path):
    """Bit for bit."""
    directory = shutil.copytree(stopped, tmp_path / "run")
    statuses, said = together(directory)
    assert statuses == [0, 0], said
    (found, progress), (expected, expected_progress) = read(directory), read(straight)
    assert helpers.same_bits(found, expected)
    assert helpers.same_bits(progress.total_F, expected_progress.total_F)
    assert (progress.loss, progress.steps) == (expected_progress.loss, expected_progress.steps)


def test_stopped_and_continued_on_one(straight, stopped, tmp_path):
    directory = shutil.copytree(stopped, tmp_path / "run")
    result = helpers.finish(launch(directory, "alone"))
    assert result.returncode == 0, result.stderr
    assert_nearly_the_same_run(directory, straight)


def test_one_that_dies_ends_the_other(tmp_path):
    started = time.monotonic()
    statuses, said = together(tmp_path, int(signal.SIGKILL), 4)
    assert statuses == [PROCESS_LOST, -signal.SIGKILL], said
    assert "error: another process ended" in said
    assert time.monotonic() - started < 90


def test_who_waits_in_vain_says_so():
    port = free_port()
    for process_id, told in (
        (1, f"--coordinator=localhost:{port}: not reached"),
        (0, "--num_processes=3: only 1 came"),
    ):
        with pytest.raises(UserError) as error:
            processes.start(f"localhost:{port}", 3, process_id, timeout=1)
        assert told in str(error.value) and error.value.status == PROCESS_LOST
    with pytest.raises(UserError, match="HOST:PORT"):
        processes.start("localhost", 2, 1, timeout=1)


def test_they_wait_for_the_last(monkeypatch):
    """Nobody goes on before all are there."""
    joined, port = [], free_port()
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: joined.append(time.monotonic()))
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    threads = [threading.Thread(target=processes.start, args=(f"localhost:{port}", 3, i, 20)) for i in (2, 0, 1)]
    threads[0].start()
    threads[1].start()
    time.sleep(1.5)
    assert not joined
    last = time.monotonic()
    threads[2].start()
    for thread in threads:
        thread.join()
    assert len(joined) == 3 and min(joined) >= last
