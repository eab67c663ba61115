"""The page of all experiments: what failed is named, what has finished is kept, verdicts follow from measurements."""

import json

import helpers
import pytest

from experiments.parts.claims import IN_PART, NOT, REPRODUCED, claim

report = helpers.without_flags("experiments.report")


@pytest.mark.parametrize(
    "holds, verdict",
    [((True,), REPRODUCED), ((True, False), IN_PART), ((False, False), NOT), ((True, True), REPRODUCED)],
)
def test_a_verdict_follows_from_what_holds(holds, verdict):
    assert claim("said", "seen", *holds) == {"paper": "said", "measured": "seen", "verdict": verdict}


def test_a_failure_is_a_gap_with_its_last_line(tmp_path, capfd):
    part = report.run("step_cost", tmp_path / "step_cost", ["--config.memory.nope=1"], "experiment 1 of 1")
    assert "no such field" in part["failure"] and part["failure"].startswith("error: --config.memory.nope")
    assert not (tmp_path / "step_cost" / "report.json").exists()
    assert "--config.memory.nope" in capfd.readouterr().err


def test_what_has_finished_is_not_run_again(tmp_path):
    done = {"name": "capacity", "command": "c", "seconds": 1.0, "table": "", "claims": [], "environment": {}}
    (tmp_path / "report.json").write_text(json.dumps(done))
    assert report.run("capacity", tmp_path, [], "") == done


def test_the_page_has_claims_figures_and_gaps(tmp_path):
    (tmp_path / "randomization_test").mkdir()
    (tmp_path / "randomization_test" / "figures.png").write_bytes(b"picture")
    told = claim("it <holds>", "it did", True)
    parts = [
        {"name": "randomization_test", "command": "c", "seconds": 61.0, "table": "a < b", "claims": [told]},
        {"name": "step_cost", "command": "d", "seconds": 2.0, "failure": "error: no room"},
    ]
    parts[0]["environment"] = {"jax": "1.2.3"}
    html, markdown = report.page(parts, tmp_path)
    for page in (html, markdown):
        assert "1 reproduced, 0 reproduced in part, 0 not reproduced." in page
        assert "it did" in page and "error: no room" in page and "jax 1.2.3" in page
    assert "it &lt;holds&gt;" in html and "a &lt; b" in html and "data:image/png;base64,cGljdHVyZQ==" in html
    assert "| randomization_test | it <holds> | it did | reproduced |" in markdown


def test_bad_input(tmp_path):
    result = helpers.call("experiments.report", f"--workdir={tmp_path / 'page'}", "--only=nothing")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--only=nothing" in result.stderr and "capacity" in result.stderr
