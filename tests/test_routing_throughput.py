"""The routing benchmark measures every lookup, and refuses what cannot be looked up in one line."""

import json
import subprocess

import helpers
import numpy as np
import pytest
from absl import flags
from refusals import refuse

from experiments import routing_throughput

SMALL = (
    "--num_experts=4096",
    "--batches=1,8",
    "--key_dim=16",
    "--top_k=4",
    "--answering=64,1024",
    "--seconds=0.02",
)


# Questions are answered twice, and not eight times.
FEWER = "from experiments import routing_throughput_serving; routing_throughput_serving.TURNS = 1"


def test_small(tmp_path):
    command = [*helpers.changed("experiments.routing_throughput", FEWER), f"--workdir={tmp_path / 'bench'}", *SMALL]
    result = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert (tmp_path / "bench" / "figures.png").stat().st_size > 10_000
    rows = {(row["lookup"], row["num_experts"], row["batch"]): row for row in found["rows"]}
    for name in ("exact", "product", "approximate", "matmul_max", "gather"):
        for batch in (1, 8):
            row = rows[name, 4096, batch]
            assert row["queries_per_second"] == pytest.approx(batch / row["seconds"])
            assert (row["key_dim"], row["top_k"]) == (16, 4)
            assert row["ceiling_ratio"] is None if name == "matmul_max" else row["ceiling_ratio"] > 0
            assert f"{name} " in result.stdout
            if name in ("exact", "product"):
                assert row["recall"] == 1.0
    for row in found["rows"]:
        assert row["lookup"] not in ("faiss_flat", "torch_flat", "torch_product") or row["recall"] == 1.0
    answering = [(row["lookup"], row["num_experts"]) for row in found["answering"]]
    assert answering == [("exact", 64), ("exact", 1024), ("product", 64), ("product", 1024)]
    assert all(0 < row["routing_share"] < 1 for row in found["answering"])


def test_the_share_of_experts_found():
    """Of three queries, one with all of its experts in another order, one with half of them, one with none."""
    reference_BK = np.array([[1, 2], [3, 4], [5, 6]])
    shares = routing_throughput.share_found(np.array([[2, 1], [9, 4], [7, 8]]), reference_BK)
    assert shares == pytest.approx((1 / 2, 1 / 3))


def test_importing_defines_no_flags():
    assert "num_experts" not in flags.FLAGS and "lookups" not in flags.FLAGS


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--num_experts=1000"], "--num_experts=1000: must be a square"),
        (["--num_experts=16", "--top_k=32"], "--top_k=32: more than --num_experts=16"),
        (["--key_dim=127"], "--key_dim=127: must be even for product keys (or leave product out of --lookups)"),
        (["--lookups=exact,nearest"], "no lookup 'nearest'"),
        (["--batches=0"], "--batches=0: '0' is not a positive whole number"),
        (["--answering=31"], "--answering=31: must be at least 32"),
        (["--num_experts=many"], "--num_experts=many: 'many'"),
        (["--top_k=0"], "--top_k"),
    ],
)
def test_bad_input(tmp_path, arguments, told):
    refuse("experiments.routing_throughput", [([f"--workdir={tmp_path / 'bench'}", *arguments], [told])])
    assert not (tmp_path / "bench").exists()
