"""A run that is killed, or whose disk fails, loses nothing: at some of its writes; faults/inject.py tries all."""

import shutil
import subprocess
import sys

import helpers
import pytest


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, to make single system calls fail")
def test_nothing_is_lost_wherever_a_run_is_disturbed():
    command = [sys.executable, helpers.ROOT / "tests" / "faults" / "inject.py", "--runs=3", "--first=60", "--every=90"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("; 0 lost") == 3
