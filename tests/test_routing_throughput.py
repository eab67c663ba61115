"""The routing benchmark measures every lookup, and refuses what cannot be looked up in one line."""

import json
import os
import subprocess
import sys

import helpers
import pytest

SMALL = (
    "--num_experts=4096",
    "--batches=1,8",
    "--key_width=16",
    "--selected=4",
    "--answering=64,1024",
    "--seconds=0.02",
)


def run(workdir, *arguments):
    command = [sys.executable, "-m", "experiments.routing_throughput", f"--workdir={workdir}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_small(tmp_path):
    result = run(tmp_path / "bench", *SMALL)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert (tmp_path / "bench" / "figures.png").stat().st_size > 10_000
    rows = {(row["lookup"], row["num_experts"], row["batch"]): row for row in found["rows"]}
    for name in ("exact", "product", "approximate", "matmul_max", "gather"):
        for batch in (1, 8):
            row = rows[name, 4096, batch]
            assert row["queries_per_second"] == pytest.approx(batch / row["seconds"]) and row["key_width"] == 16
            assert row["selected"] == 4 and row["ceiling_ratio"] is None or row["ceiling_ratio"] > 0
            assert f"{name} " in result.stdout
            if name in ("exact", "product"):
                assert row["recall"] == 1.0
    for row in found["rows"]:
        assert row["lookup"] not in ("faiss_flat", "torch_flat", "torch_product") or row["recall"] == 1.0
    answering = [(row["lookup"], row["num_experts"]) for row in found["answering"]]
    assert answering == [("exact", 64), ("exact", 1024), ("product", 64), ("product", 1024)]
    assert all(0 < row["routing_share"] < 1 for row in found["answering"])


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--num_experts=1000"], "--num_experts=1000: must be a square"),
        (["--num_experts=16", "--selected=32"], "--selected=32: more than --num_experts=16"),
        (["--key_width=127"], "--key_width=127: must be even"),
        (["--lookups=exact,nearest"], "no lookup 'nearest'"),
        (["--batches=0"], "--batches=0: '0' is not a positive whole number"),
        (["--num_experts=many"], "--num_experts=many: 'many'"),
        (["--selected=0"], "--selected"),
    ],
)
def test_bad_input(tmp_path, arguments, told):
    result = run(tmp_path / "bench", *arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and told in result.stderr, result.stderr
    assert not (tmp_path / "bench").exists()
