"""Every mistake on a command line is one line and a status; a run's directory keeps to one configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamini_jax import command
from lamini_jax.errors import UserError

ROOT = Path(__file__).parents[1]

COMMAND = '''"""Prints a field or two."""

from absl import flags

from lamini_jax import command
from lamini_jax.config import from_config_dict
from lamini_jax.errors import UserError

_CONFIG = command.define_config()
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
    command.run(main)
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


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--nope=1"], "nope"),
        (["--workdri=a"], "workdir"),
        (["stray"], "stray"),
        (["--config.memory.nope=1"], "--config.memory.nope: no such field; config.memory has num_experts,"),
        (["--config.num_experts=1"], "did you mean --config.memory.num_experts?"),
        (["--config.memory={}"], "--config.memory: no such field"),
        (["--config.memory.num_experts=abc"], "--config.memory.num_experts=abc"),
        (["--config.memory.num_experts=1.5"], "--config.memory.num_experts=1.5"),
        (["--config.router.ridge=x"], "--config.router.ridge=x"),
        (["--config.memory.num_experts"], "--config.memory.num_experts"),
        (["--config.memory.selected=2000000"], "--config.memory.selected=2000000"),
        (["--config=missing.py"], "--config=missing.py: no such file"),
        (["--config=bad_python.py"], "bad_python.py: not Python"),
        (["--config=no_config.py"], "get_config()"),
        (["--config=wrong_config.py"], "--config=wrong_config.py"),
        (["--config=raising_config.py"], "oops"),
        (["--flagfile=missing"], "missing"),
    ],
)
def test_bad_flag_is_one_line(call, tmp_path, arguments, told):
    (tmp_path / "bad_python.py").write_text("for\n")
    (tmp_path / "no_config.py").write_text("x = 1\n")
    (tmp_path / "wrong_config.py").write_text("def get_config(): return {'seed': 1}\n")
    (tmp_path / "raising_config.py").write_text("def get_config(): raise ValueError('oops')\n")
    result = call(*arguments, "--workdir=a")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert told in result.stderr


def test_required_flag(call):
    result = call()
    assert (result.returncode, result.stderr) == (2, "error: --workdir is required\n")


def test_what_main_raises(call):
    result = call("--workdir=user error")
    assert (result.returncode, result.stderr) == (3, "error: no facts\n")
    result = call("--workdir=interrupt")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    result = call("--workdir=bug")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


def test_help_needs_no_flags(call):
    result = call("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for told in ("Prints a field or two.", "--workdir: Directory", "--config.memory.num_experts=1048576"):
        assert told in result.stdout


def test_write_json_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "results.json"
    command.write_json(path, {"share": 0.5})
    assert path.read_text() == '{\n "share": 0.5\n}\n'
    with pytest.raises(ValueError):
        command.write_json(path, {"share": float("nan")})
    assert json.loads(path.read_text()) == {"share": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_open_workdir_keeps_to_one_identity(tmp_path):
    workdir = str(tmp_path / "runs" / "one")
    identity = {"config": {"seed": 0, "memory": {"num_experts": 64}}, "facts": "a1", "mesh": (1, 2)}
    assert command.open_workdir(workdir, identity) == Path(workdir)
    assert command.open_workdir(workdir, identity) == Path(workdir)

    saved = (Path(workdir) / "config.json").read_bytes()
    other = {**identity, "config": {"seed": 0, "memory": {"num_experts": 65}}, "extra": True}
    with pytest.raises(UserError) as caught:
        command.open_workdir(workdir, other)
    assert "config.memory.num_experts: 64 -> 65, extra: (absent) -> true;" in str(caught.value)
    assert "--workdir" in str(caught.value) and "seed" not in str(caught.value)
    assert (Path(workdir) / "config.json").read_bytes() == saved


def test_open_workdir_refuses_what_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for workdir in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below"), str(tmp_path / "broken")):
        with pytest.raises(UserError, match="--workdir"):
            command.open_workdir(workdir, {})
