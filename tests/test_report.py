"""The page of all experiments: what failed is named, what has finished is kept, verdicts follow from measurements."""

import json
import time

import helpers
import pytest

from experiments import report, selective_loss
from experiments.shared import study
from experiments.shared.claims import Claim
from lamini_jax.config import LLAMA3_8B, from_config_dict, large, one_accelerator, tiny, to_config_dict
from lamini_jax.errors import UserError
from lamini_jax.runtime import cli


def finished(directory):
    """The results of a `selective_loss` that has finished, under whose four models everything costs 2 nats."""
    heldout = {"accuracy": 0.9, "interval": [0.87, 0.93]}
    losses = {subset: [1.0, 3.0] for subset in selective_loss.SETS}
    models = {name: {"losses": losses, "recall": 1.0, "heldout": heldout} for name in selective_loss.ABOUT}
    directory.mkdir()
    rest = {"command": "c", "seconds": 1.0, "environment": {}}
    (directory / "results.json").write_text(json.dumps({"models": models, **rest}))


def test_a_failure_is_a_gap_with_its_last_line(tmp_path, capfd):
    directory = tmp_path / "capacity"
    part = report.run("capacity", directory, ["--config.memory.nope=1"], "experiment 1 of 1")
    assert "no such field" in part["failure"] and part["failure"].startswith("error: --config.memory.nope")
    assert not (directory / "results.json").exists()
    assert "--config.memory.nope" in capfd.readouterr().err


def test_a_changed_rule_reaches_the_page_without_another_run(tmp_path, monkeypatch):
    """What has finished is not run again, and the page says of it what today's table and rules make of its results."""
    finished(tmp_path / "selective_loss")
    part = report.run("selective_loss", tmp_path / "selective_loss", [], "")
    assert part["table"].startswith("nats per token") and part["about"] == selective_loss.__doc__.splitlines()[0]
    assert [claim.verdict for claim in part["claims"]][:2] == ["not reproduced", "reproduced"]
    monkeypatch.setattr(selective_loss, "HIGH", 1.5)
    part = report.run("selective_loss", tmp_path / "selective_loss", [], "")
    assert [claim.verdict for claim in part["claims"]][:2] == ["reproduced", "not reproduced"]
    assert "not reproduced" not in (tmp_path / "selective_loss" / "results.json").read_text()


def test_the_page_has_claims_figures_and_gaps(tmp_path):
    (tmp_path / "randomization_test").mkdir()
    (tmp_path / "randomization_test" / "figures.png").write_bytes(b"picture")
    claims = [Claim("It <holds>", "It did", {"a": True}), Claim("It is", "Partly", {"b": True, "c <d": False})]
    parts = [
        {"name": "randomization_test", "command": "c", "seconds": 61.0, "table": "a < b", "claims": claims},
        {"name": "capacity", "command": "d", "failure": "error: no room"},
    ]
    parts[0] |= {"environment": {"jax": "1.2.3"}, "certificates": {"certified": 1234, "certified_but_wrong": 1}}
    html, markdown, verdicts = report.pages(parts, tmp_path).values()
    for page in (html, markdown):
        assert "(61 s)" in page and page.count(" s)") == 1
        assert "It did." in page and "error: no room" in page and "jax 1.2.3" in page
    for page in (html, markdown, verdicts):
        assert "1 reproduced, 1 reproduced in part, 0 not reproduced." in page
        assert "certified 1,234 times" in page and "1 of those were not recalled" in page.replace("\n", " ")
    assert "It &lt;holds&gt;." in html and "a &lt; b" in html and "data:image/png;base64,cGljdHVyZQ==" in html
    assert "Does not hold: c &lt;d." in html and "Does not hold: c <d." in markdown
    assert verdicts in markdown and "| `randomization_test` | It <holds> | reproduced |  |" in verdicts
    assert "| `randomization_test` | It is | reproduced in part | c <d |" in verdicts


def test_the_page_names_what_has_not_run(tmp_path):
    for text in report.pages([], tmp_path).values():
        assert f"Not run yet: {', '.join(report.EXPERIMENTS)}." in text


@pytest.mark.parametrize("config", [tiny(), large(LLAMA3_8B, 2**20), one_accelerator("a/b")])
def test_experiments_get_the_config_as_it_was_given(config):
    """Whatever file it came from: what is not as by default is handed on as flags."""
    values = to_config_dict(tiny())
    for override in study.config_overrides(to_config_dict(config)):
        name, _, text = override.removeprefix("--config.").partition("=")
        kind = type(dict(cli.flatten(values.to_dict()))[name])
        values.update_from_flattened_dict({name: text == "True" if kind is bool else kind(text)})
    assert from_config_dict(values) == config
    assert study.config_overrides(to_config_dict(tiny())) == []


def test_some_experiments_more_and_a_sigterm(tmp_path):
    """The page of one more experiment keeps the others'; one that is terminated is no failure of it."""
    finished(tmp_path / "selective_loss")
    options = "--only=compute_requirements", "--config.memory.num_experts=16384", "--config.tuning.batch_size=4"
    process = helpers.start("experiments.report", f"--workdir={tmp_path}", *options)
    while "compute_requirements" not in process.stdout.readline():
        pass
    while not (tmp_path / "compute_requirements" / "config.json").exists():
        time.sleep(0.1)
    process.terminate()
    result = helpers.finish(process)
    assert result.returncode == 75 and result.stderr.endswith("run again to continue\n")
    assert not (tmp_path / "compute_requirements" / "results.json").exists()
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n<!-- verdicts -->\nstale\n<!-- /verdicts -->\nAfter.\n")
    again = helpers.call("experiments.report", f"--workdir={tmp_path}", *options, f"--update={readme}")
    assert again.returncode == 0, again.stderr
    page, readme = (tmp_path / "report.md").read_text(), readme.read_text()
    assert "nats per token" in page and "## compute_requirements" in page
    assert readme.startswith("Before.\n<!-- verdicts -->\n12 claims: ") and "stale" not in readme
    assert readme.endswith(".\n<!-- /verdicts -->\nAfter.\n") and "| `compute_requirements` |" in readme


def test_a_file_without_a_place_for_verdicts(tmp_path):
    (tmp_path / "README.md").write_text("<!-- verdicts -->\n")
    for name in ("README.md", "missing.md"):
        with pytest.raises(UserError, match=f"--update=.*{name}: has no lines <!-- verdicts -->"):
            report.update(tmp_path / name, "verdicts")


def test_bad_input(tmp_path):
    result = helpers.call("experiments.report", f"--workdir={tmp_path / 'page'}", "--only=nothing")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--only=nothing" in result.stderr and "capacity" in result.stderr
