"""Commands in forks of one process that has imported their libraries, which else takes each of them a second.

As a program, it answers lines of JSON: [directory, environment, commands, stdin] with [[status, stdout, stderr], ...].
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that a command may take
GARBAGE = 50_000, 20, 50  # `gc.set_threshold`: tracing makes many objects, of which most stay


@functools.cache
def _server() -> subprocess.Popen:
    """The process, which ends with this one."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
    atexit.register(server.communicate)
    return server


def run_all(commands, cwd: Path = ROOT, stdin: str = "") -> list[tuple[int, str, str]]:
    """The status and the output of each command, a module and its arguments, run one after the other in `cwd`.

    A module is one of the project, or a file in `cwd`. Each reads the same `stdin`.
    """
    server = _server()
    commands = [list(map(str, command)) for command in commands]
    print(json.dumps([str(cwd), dict(os.environ), commands, stdin]), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def run(module: str, arguments: list[str], prepare=lambda: None, stdin: str = "") -> tuple[int, str, str]:
    """What `python -m MODULE ARGUMENTS` exits with and prints, in a fork; `prepare` is called in it before."""
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        given.write(stdin)
        given.seek(0)
        child = os.fork()
        if child == 0:
            for number, file in enumerate((given, stdout, stderr)):
                os.dup2(file.fileno(), number)
            sys.argv = [module, *arguments]
            try:
                prepare()
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


def _serve(line: str) -> list[tuple[int, str, str]]:
    cwd, environment, commands, stdin = json.loads(line)

    def prepare():
        os.chdir(cwd)
        sys.path.insert(0, cwd)
        os.environ.clear()
        os.environ.update(environment | {"PYTHONPATH": f"{ROOT}:{cwd}"})
        signal.alarm(SECONDS)  # which ends it

    return [run(module, arguments, prepare, stdin) for module, *arguments in commands]


if __name__ == "__main__":
    gc.set_threshold(*GARBAGE)
    for name in ("api", "configure", "training", "question_files", "exports"):
        importlib.import_module(f"lamini_jax.{name}")
    for line in sys.stdin:
        print(json.dumps(_serve(line)), flush=True)
