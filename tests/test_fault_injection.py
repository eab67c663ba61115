"""A run that is killed, or whose disk fails, loses nothing: at some of its writes; faults/inject.py tries all."""

import shutil
import subprocess
import sys

import helpers
import pytest


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, to make single system calls fail")
@pytest.mark.parametrize("router, first", [("experts", 60), ("facts", 20)])
def test_nothing_is_lost_wherever_a_run_is_disturbed(router, first):
    inject = helpers.ROOT / "tests" / "faults" / "inject.py"
    command = [sys.executable, inject, "--runs=3", f"--first={first}", f"--router={router}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("; 0 lost") == 3
