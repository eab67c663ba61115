"""The page of all experiments: what failed is named, what has finished is kept, verdicts follow from measurements."""

import json
import time

import helpers
import pytest

from experiments.parts.claims import IN_PART, NOT, REPRODUCED, claim

report = helpers.without_flags("experiments.report")


@pytest.mark.parametrize(
    "holds, verdict",
    [((True,), REPRODUCED), ((True, False), IN_PART), ((False, False), NOT), ((True, True), REPRODUCED)],
)
def test_a_verdict_follows_from_what_holds(holds, verdict):
    assert claim("said", "Seen.", *holds) == {"paper": "Said.", "measured": "Seen.", "verdict": verdict}


def test_a_failure_is_a_gap_with_its_last_line(tmp_path, capfd):
    part = report.run("step_cost", tmp_path / "step_cost", ["--config.memory.nope=1"], "experiment 1 of 1")
    assert "no such field" in part["failure"] and part["failure"].startswith("error: --config.memory.nope")
    assert not (tmp_path / "step_cost" / "results.json").exists()
    assert "--config.memory.nope" in capfd.readouterr().err


def test_what_has_finished_is_not_run_again(tmp_path):
    """And the page says of it what it says itself now."""
    done = {"command": "c", "seconds": 1.0, "table": "", "claims": [], "environment": {}}
    (tmp_path / "results.json").write_text(json.dumps(done | {"cells": []}))
    assert report.run("capacity", tmp_path, [], "") == done | {"name": "capacity"}


def test_the_page_has_claims_figures_and_gaps(tmp_path):
    (tmp_path / "randomization_test").mkdir()
    (tmp_path / "randomization_test" / "figures.png").write_bytes(b"picture")
    told = claim("it <holds>", "it did", True)
    parts = [
        {"name": "randomization_test", "command": "c", "seconds": 61.0, "table": "a < b", "claims": [told]},
        {"name": "step_cost", "command": "d", "failure": "error: no room"},
    ]
    parts[0] |= {"environment": {"jax": "1.2.3"}, "certificates": {"certified": 1234, "certified_but_wrong": 1}}
    html, markdown = report.page(parts, tmp_path)
    for page in (html, markdown):
        assert "(61 s)" in page and page.count(" s)") == 1
        assert "1 reproduced, 0 reproduced in part, 0 not reproduced." in page
        assert "certified 1,234 times" in page and "1 of those were not recalled" in page.replace("\n", " ")
        assert "It did." in page and "error: no room" in page and "jax 1.2.3" in page
    assert "It &lt;holds&gt;." in html and "a &lt; b" in html and "data:image/png;base64,cGljdHVyZQ==" in html
    assert "| randomization_test | It <holds>. | reproduced | It did. |" in markdown


def test_the_page_names_what_has_not_run(tmp_path):
    for text in report.page([], tmp_path):
        assert f"Not run yet: {', '.join(report.EXPERIMENTS)}." in text


@pytest.mark.parametrize(
    "given, kept",
    [
        ("--workdir=x --config=a.py --config.memory.layers=1", ["--config=a.py", "--config.memory.layers=1"]),
        ("--config a.py --only capacity", ["--config", "a.py"]),
        ("--config.mesh.data -1 -config.seed 3", ["--config.mesh.data", "-1", "-config.seed", "3"]),
        ("--noconfig.tuning.rematerialize --workdir x", ["--noconfig.tuning.rematerialize"]),
        ("--config.tuning.rematerialize --configure=1", ["--config.tuning.rematerialize"]),
    ],
)
def test_experiments_get_the_config_as_it_was_given(given, kept):
    assert report.overrides(given.split()) == kept


def test_some_experiments_more_and_a_sigterm(tmp_path):
    """The page of one more experiment keeps the others'; one that is terminated is no failure of it."""
    done = {"command": "c", "seconds": 1.0, "table": "the table", "claims": [], "environment": {}}
    (tmp_path / "capacity").mkdir()
    (tmp_path / "capacity" / "results.json").write_text(json.dumps(done))
    options = "--only=compute_requirements", "--config.memory.num_experts=16384"
    process = helpers.start("experiments.report", f"--workdir={tmp_path}", *options)
    while "compute_requirements" not in process.stdout.readline():
        pass
    while not (tmp_path / "compute_requirements" / "config.json").exists():
        time.sleep(0.1)
    process.terminate()
    result = helpers.finish(process)
    assert result.returncode == 75 and result.stderr.endswith("run again to go on\n")
    assert not (tmp_path / "compute_requirements" / "results.json").exists()
    again = helpers.call("experiments.report", f"--workdir={tmp_path}", *options)
    assert again.returncode == 0, again.stderr
    page = (tmp_path / "report.md").read_text()
    assert "the table" in page and "## compute_requirements" in page


def test_bad_input(tmp_path):
    result = helpers.call("experiments.report", f"--workdir={tmp_path / 'page'}", "--only=nothing")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--only=nothing" in result.stderr and "capacity" in result.stderr
