"""Every mistake on a command line is one line and a status."""

import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import kinds
import pytest
from helpers import ROOT
from refusals import refuse

import lamini_jax.__main__
from lamini_jax.runtime import processes

COMMAND = '''"""Prints a field or two."""

from absl import flags

from lamini_jax.config import from_config_dict
from lamini_jax.errors import UserError
from lamini_jax.runtime import cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main():
    if _WORKDIR.value == "interrupt":
        raise KeyboardInterrupt
    if _WORKDIR.value == "user error":
        raise UserError("no facts", status=3)
    if _WORKDIR.value == "bug":
        raise ZeroDivisionError
    config = from_config_dict(_CONFIG.value)
    print(config.memory.num_experts, config.router.ridge, config.seed)


if __name__ == "__main__":
    cli.run(main)
'''


@pytest.fixture
def call(tmp_path):
    """Runs a small command, which imports no jax, with these arguments."""
    (tmp_path / "small.py").write_text(COMMAND)

    def call_with(*arguments):
        return subprocess.run(
            [sys.executable, "small.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    return call_with


def test_overrides_and_files(call, tmp_path):
    (tmp_path / "seed.py").write_text(
        "from lamini_jax import config\ndef get_config(): return config.to_config_dict(config.Config(seed=5))\n"
    )
    assert call("--workdir=a").stdout == "1048576 0.001 0\n"
    result = call("--config.memory.num_experts=65536", "--workdir", "a", "--config.router.ridge", "1")
    assert result.stdout == "65536 1.0 0\n"
    assert call("--workdir=a", "--config=seed.py", "--config.memory.num_experts=64").stdout == "64 0.001 5\n"
    assert result.stderr == ""


# kind -> the arguments and the words of the message
BAD_FLAGS = {
    "flags: unknown": [
        (["--nope=1"], ["nope"]),
        (["--workdri=a"], ["workdir"]),
        (["stray"], ["stray"]),
        (["--config.memory.nope=1"], ["--config.memory.nope: no such field; config.memory has num_experts,"]),
        (["--config.num_experts=1"], ["did you mean --config.memory.num_experts?"]),
        (["--config.memory={}"], ["--config.memory: no such field"]),
        (["--flagfile=missing"], ["missing"]),
    ],
    "flags: a wrong value": [
        (["--config.memory.num_experts=abc"], ["--config.memory.num_experts=abc"]),
        (["--config.memory.num_experts=1.5"], ["--config.memory.num_experts=1.5"]),
        (["--config.memory.num_experts=2147483648"], ["--config.memory.num_experts=2147483648: must be below"]),
        (["--config.router.key_dim=1" + 30 * "0"], ["--config.router.key_dim=1000"]),
        (["--config.seed=4294967296"], ["--config.seed=4294967296"]),
        (["--config.router.ridge=x"], ["--config.router.ridge=x"]),
        (["--config.router.ridge=nan"], ["--config.router.ridge=nan: must be a finite number"]),
        (["--config.memory.num_experts"], ["--config.memory.num_experts"]),
        (["--config.memory.top_k=2000000"], ["--config.memory.top_k=2000000"]),
    ],
    "flags: a config file": [
        (["--config=missing.py"], ["--config=missing.py: no such file"]),
        (["--config=bad_python.py"], ["bad_python.py: not Python"]),
        (["--config=no_config.py"], ["get_config()"]),
        (["--config=wrong_config.py"], ["--config=wrong_config.py"]),
        (["--config=raising_config.py"], ["oops"]),
    ],
}
for kind, cases in BAD_FLAGS.items():
    kinds.instances(kind, (" ".join(arguments) for arguments, _ in cases))


def test_bad_flags_are_one_line(call, tmp_path):
    (tmp_path / "bad_python.py").write_text("for\n")
    (tmp_path / "no_config.py").write_text("x = 1\n")
    (tmp_path / "wrong_config.py").write_text("def get_config(): return {'seed': 1}\n")
    (tmp_path / "raising_config.py").write_text("def get_config(): raise ValueError('oops')\n")
    cases = (case for cases in BAD_FLAGS.values() for case in cases)
    refuse("small", [([*arguments, "--workdir=a"], told) for arguments, told in cases], cwd=tmp_path)


def test_required_flag(call):
    result = call()
    assert (result.returncode, result.stderr) == (2, "error: --workdir is required\n")


def test_what_main_raises(call):
    result = call("--workdir=user error")
    assert (result.returncode, result.stderr) == (3, "error: no facts\n")
    result = call("--workdir=interrupt")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    result = call("--workdir=bug")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    line = re.fullmatch(r"error: unexpected ZeroDivisionError: .*; please report it with (\S+) .*\n", result.stderr)
    kept = Path(line[1]).read_text()
    assert "Traceback" in kept and "raise ZeroDivisionError" in kept and "--workdir=bug" in kept
    Path(line[1]).unlink()
    result = call("--workdir=bug", "--traceback")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


def test_help_needs_no_flags(call):
    result = call("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for told in (
        "Prints a field or two.",
        "--workdir: Directory",
        "--config.memory.num_experts=1048576  (must be at least 1)\n",
        "--config.backbone.dtype=float32  (must be one of float32, bfloat16)\n",
    ):
        assert told in result.stdout


def test_console_script():
    """`lamini-jax COMMAND` is `python -m lamini_jax COMMAND` is `python -m lamini_jax.COMMAND`."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, place = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    assert name == "lamini-jax"
    assert importlib.metadata.EntryPoint(name, place, "console_scripts").load() is lamini_jax.__main__.main

    usage = helpers.call("lamini_jax.__main__")
    assert (usage.returncode, usage.stderr) == (0, "")
    for command in ("tune", "ask", "export"):
        assert f"\n  {command} " in usage.stdout
    told = helpers.call("lamini_jax.__main__", "ask", "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("Answers questions with a memory") and "--[no]details" in told.stdout


def test_console_script_refuses_what_commands_refuse(tmp_path):
    cases = (
        (["nope"], ["'nope'", "tune, ask, forget, facts"]),
        (["ask"], ["--workdir", "--memory"]),
        (["tune", f"--workdir={tmp_path}"], ["--facts is required"]),
        (["export", f"--output={tmp_path / 'out'}"], ["--workdir"]),
    )
    refuse("lamini_jax", cases)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("given", ["", "--xla_other=1", "--xla_gpu_enable_triton_gemm=true"])
def test_products_on_gpus_are_left_to_cublas(given, installed, monkeypatch):
    """Only where jax is installed for GPUs, and not against what the user says."""
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    processes.compile_quickly_for_gpus()
    added = "--xla_gpu_enable_triton_gemm=false"
    wanted = [*given.split(), added] if installed and "triton" not in given else given.split()
    assert os.environ["XLA_FLAGS"].split() == wanted
