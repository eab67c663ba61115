"""What needs several devices, `tests/devices`, in a process of its own: on a CPU that counts as eight."""

import os
import subprocess
import sys
from pathlib import Path

import helpers


def test_on_eight_devices():
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {helpers.HURRIED}"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(Path(__file__).parent / "devices")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
