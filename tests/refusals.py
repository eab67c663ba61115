"""What a command says to many wrong command lines, each in a fork of one process that has imported its libraries.

    python refusals.py < COMMANDS > RESULTS

COMMANDS is a JSON list of lists of a module and its arguments, RESULTS one of [status, stdout, stderr].
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import helpers

from lamini_jax.errors import BAD_INPUT


def refuse(module: str, cases, cwd: Path = helpers.ROOT, status: int = BAD_INPUT) -> None:
    """Expects this status and one line of each case, a pair of arguments and the words that this line must have.

    The module is one of the project, or a file in `cwd`.
    """
    results = run_all([(module, *arguments) for arguments, _ in cases], cwd)
    for (arguments, words), (found, stdout, stderr) in zip(cases, results, strict=True):
        assert (found, stdout, stderr.count("\n")) == (status, "", 1), (arguments, stdout, stderr)
        assert stderr.startswith("error: "), (arguments, stderr)
        missing = [word for word in map(str, words) if word not in stderr]
        assert not missing, (arguments, stderr, missing)


def run_all(commands, cwd: Path = helpers.ROOT) -> list[tuple[int, str, str]]:
    """The status and the output of each command, a module and its arguments, run one after the other."""
    lines = json.dumps([list(map(str, command)) for command in commands])
    environment = {**os.environ, "PYTHONPATH": f"{helpers.ROOT}:{cwd}"}
    options = {"input": lines, "env": environment, "cwd": cwd, "stdout": subprocess.PIPE, "text": True, "timeout": 600}
    return json.loads(subprocess.run([sys.executable, __file__], check=True, **options).stdout)


def run(module: str, arguments: list[str]) -> tuple[int, str, str]:
    """What `python -m MODULE ARGUMENTS` exits with and prints, in a fork."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.argv = [module, *arguments]
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        stdout.seek(0)
        stderr.seek(0)
        return os.waitstatus_to_exitcode(status), stdout.read(), stderr.read()


if __name__ == "__main__":
    for name in ("api", "configure", "training", "question_files", "exports"):
        importlib.import_module(f"lamini_jax.{name}")
    print(json.dumps([run(module, arguments) for module, *arguments in json.load(sys.stdin)]))
