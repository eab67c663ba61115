"""The TPU compiler's verdict, where it is installed; what is read from its programs, everywhere."""

import importlib.util
import json
import os
import subprocess
import sys

import helpers
import pytest

from experiments import compile_ahead
from lamini_jax.errors import BAD_INPUT, DEVICES, DOES_NOT_FIT, UserError

LIBTPU = helpers.ROOT / ".venv" / "libtpu"  # where launch/test.sh installs it, apart from all else
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not LIBTPU.is_dir(),
    reason="needs libtpu, the TPU compiler: pip install -e .[compile]",
)

PROGRAM = """
  %all-gather.1 = s32[256,32]{1,0:T(8,128)} all-gather(%ids), channel_id=1, replica_groups={{0,1}}
  %all-reduce.2 = (f32[4,8]{1,0}, bf16[16]{0}) all-reduce(%a, %b), channel_id=2, to_apply=%sum
  %start = (bf16[2,3]{1,0}, bf16[8,3]{1,0}) all-gather-start(%c), channel_id=3
  %done = bf16[8,3]{1,0} all-gather-done(%start)
  %piece.1 = f32[1024]{0} reduce-scatter(%d), channel_id=4
  %piece.2 = f32[1024]{0} reduce-scatter(%d), channel_id=4
  %other = f32[1024]{0} reduce-scatter(%e), channel_id=5
  %add.3 = f32[4,8]{1,0} add(%x, %y)
"""


def test_collectives_of_a_program():
    assert compile_ahead.collectives(PROGRAM) == [
        {"op": "all-gather", "bytes": 8 * 3 * 2, "count": 1},
        {"op": "all-gather", "bytes": 256 * 32 * 4, "count": 1},
        {"op": "all-reduce", "bytes": 4 * 8 * 4 + 16 * 2, "count": 1},
        {"op": "reduce-scatter", "bytes": 4096, "count": 2},
    ]


def call(workdir, *arguments):
    command = [sys.executable, "-m", "experiments.compile_ahead", f"--workdir={workdir}", *arguments]
    # libtpu has not all flags of XLA, and ends with one that it does not know.
    environment = {**os.environ, "PYTHONPATH": f"{helpers.ROOT}:{LIBTPU}", "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=helpers.ROOT, env=environment, capture_output=True, text=True)


@needs_libtpu
def test_more_experts_mean_no_more_traffic(tmp_path):
    """The tiny backbone on a v5e:4x4, from 2^20 experts to 2^22: it fits, and no collective grows."""
    result = call(tmp_path, "--topology=v5e:4x4", "--num_experts=1048576,4194304")
    assert result.returncode == 0, result.stderr
    few, many = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert few["fits"] and many["fits"] and few["devices"] == 16
    assert few["collectives"] == many["collectives"] != []
    assert few["largest_collective_bytes"] == many["largest_collective_bytes"] > 0
    assert many["temporaries"]["step"] <= 1.05 * few["temporaries"]["step"]
    assert many["bytes"]["experts"] == 4 * few["bytes"]["experts"] == 4 * 2**20 * 1024 * 4 // 16
    assert many["bytes"]["backbone"] == few["bytes"]["backbone"]


@needs_libtpu
@pytest.mark.parametrize(
    "arguments, status, told",
    [
        (("--topology=v5e:3x5",), DEVICES, "--topology=v5e:3x5: no such slice"),
        (("--topology=v5e:4x4", "--config.execution.mesh.data=5"), DEVICES, "there are 16 devices"),
        (("--topology=v5e:2x2", "--num_experts=67108864"), DOES_NOT_FIT, "GB per device are missing"),
        (("--topology=v5e:2x2", "--num_experts=no"), BAD_INPUT, "--num_experts=no"),
    ],
)
def test_refuses(tmp_path, arguments, status, told):
    result = call(tmp_path, *arguments)
    assert result.returncode == status and told in result.stderr.splitlines()[-1], result.stderr


def test_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(compile_ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e .\[compile\]"):
        compile_ahead.topology("v5e:4x4")
