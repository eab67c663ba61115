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
import kinds
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
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {helpers.HURRIED}",
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
        (1, f"process 0, at localhost:{port}, was not reached within 1 s"),
        (0, "only 1 of 3 processes came within 1 s"),
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


CLUSTERS = {
    "SLURM": {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost,elsewhere[2-3]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{0}",
        "SLURM_LOCALID": "{0}",
    },
    "Open MPI": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{0}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{0}",
    },
}


def task(cluster, index, port, *command):
    """Starts one of two tasks of a cluster."""
    own = {name: value.format(index) for name, value in CLUSTERS[cluster].items()}
    environment = {**os.environ, **own, "JAX_COORDINATOR_PORT": str(port), "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("cluster", kinds.cases({"processes: alone": dict(zip(CLUSTERS, CLUSTERS, strict=True))}))
def test_a_task_of_a_cluster_that_stays_alone(cluster, tmp_path):
    """One line, soon."""
    flags = ["--facts=none.jsonl", f"--workdir={tmp_path / 'run'}", "--multihost", "--join_timeout=2"]
    for index, told in ((0, "only 1 of 2 processes came within 2 s"), (1, "was not reached within 2 s")):
        started = time.monotonic()
        result = helpers.finish(task(cluster, index, free_port(), "-m", "lamini_jax.tune", *flags))
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (PROCESS_LOST, "", 1), result.stderr
        assert result.stderr.startswith("error: --multihost: ") and told in result.stderr
        assert time.monotonic() - started < 30 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_tasks_of_a_cluster_find_each_other(cluster):
    script = (
        "import jax; from lamini_jax.runtime import processes; processes.start(None, None, None, 60);"
        "processes.barrier('x'); print(jax.process_index(), jax.process_count(), processes.broadcast(True))"
    )
    port = free_port()
    both = [task(cluster, index, port, "-c", script) for index in range(2)]
    for index, result in enumerate(map(helpers.finish, both)):
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"{index} 2 True"


def test_no_cluster_is_bad_input():
    """Also where the place of jax's detection is no longer known."""
    script = (
        "import sys; from jax._src import clusters; from lamini_jax.runtime import processes\n"
        "if sys.argv[1:]: del clusters.ClusterEnv.auto_detect_unset_distributed_params\n"
        "assert processes._detect('a:1', 2, None, 1) == ('a:1', 2, None)\n"
        "if not sys.argv[1:]: processes.start(None, None, None, 1)"
    )
    for arguments, told in (([], "UserError: --multihost: the processes cannot find each other"), (["moved"], "")):
        command = [sys.executable, "-c", script, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert told in result.stderr and (result.returncode == 0) == (not told), result.stderr
