"""A real server, as a process of its own, beside a memory that is empty at first."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import helpers
import httpx

from lamini_jax import api
from lamini_jax import config as config_lib
from lamini_jax.config import to_config_dict
from lamini_jax.configure import configure

_START = 240  # seconds, on a machine that has compiled nothing yet


def make_memory(directory: Path) -> Path:
    """A memory beside the tiny backbone, without facts."""
    api.open_memory(str(directory), configure(to_config_dict(config_lib.facts())))
    return directory


@contextlib.contextmanager
def serving(directory: Path, *arguments: str, **environment: str) -> Iterator["Served"]:
    """A server of this memory, which is ready; in the end it is told to end."""
    server = Served(directory, arguments, environment)
    try:
        server.start()
        yield server
    finally:
        server.end(signal.SIGTERM)


class Served:
    """A server that may be killed and started again."""

    def __init__(self, directory: Path, arguments: tuple[str, ...], environment: dict[str, str]):
        self.directory, self._arguments = directory, arguments
        self._environment = {**os.environ, **environment, "PYTHONPATH": str(helpers.ROOT)}
        self.url, self._port, self._process, self._log = "", 0, None, None

    def start(self) -> None:
        """Returns when it is ready: the second time at the same port."""
        self._log = self.directory.with_suffix(".log").open("ab")
        flags = [f"--workdir={self.directory}", f"--port={self._port}", *self._arguments]
        command = [sys.executable, "-m", "lamini_jax.serve", *flags]
        options = {"env": self._environment, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
        self._process = subprocess.Popen(command, **options)
        end = time.monotonic() + _START
        for line in self._process.stdout:
            if line.startswith("ready at "):
                self.url = line.split()[2].rstrip("/")
                self._port = int(self.url.rpartition(":")[2])
                break
            assert time.monotonic() < end
        assert self.url, self.log()
        # Nobody reads on: what it writes from now on must have somewhere to go.
        subprocess.Popen(["cat"], stdin=self._process.stdout, stdout=self._log)
        assert httpx.get(f"{self.url}/readyz").status_code == 200

    def end(self, number: signal.Signals) -> int:
        """Sends it a signal and waits for its end; its status."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        status = self._process.wait(60)
        self._process = None
        self._log.close()
        return status

    def log(self) -> str:
        """What it has written so far."""
        return self.directory.with_suffix(".log").read_text()
