"""What all studies share: how they start, what they keep, and that verdicts follow from what was measured."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

from experiments.shared import study
from experiments.shared.claims import IN_PART, NOT, REPRODUCED, Claim
from lamini_jax.config import MeshConfig
from lamini_jax.errors import UserError

STUDIES = [path.stem for path in Path(study.__file__).parents[1].glob("*.py") if "__main__" in path.read_text()]


def test_what_was_measured_is_not_measured_again(tmp_path):
    first = study.cached(tmp_path / "a.json", lambda: {"value": 1})
    assert first["value"] == 1 and first["seconds"] >= 0
    assert study.cached(tmp_path / "a.json", lambda: pytest.fail("measured again")) == first


def test_nothing_is_kept_of_what_failed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        study.cached(tmp_path / "a.json", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_a_directory_belongs_to_one_configuration_however_it_is_executed(model, tmp_path):
    parts = model, helpers.FACTS
    workdir = str(tmp_path / "study")
    study.open_study(workdir, helpers.CONFIG, *parts, steps=1)
    elsewhere = helpers.replace(helpers.CONFIG, execution={"mesh": MeshConfig(model=2), "cache_gb": 1.0})
    study.open_study(workdir, elsewhere, *parts, steps=1)
    with pytest.raises(UserError, match="tuning.epochs: 4 -> 5"):
        study.open_study(workdir, helpers.replace(helpers.CONFIG, tuning={"epochs": 5}), *parts, steps=1)
    with pytest.raises(UserError, match="steps: 1 -> 2"):
        study.open_study(workdir, helpers.CONFIG, *parts, steps=2)
    with pytest.raises(UserError, match="facts: "):
        study.open_study(workdir, helpers.CONFIG, model, helpers.FACTS[:3], steps=1)
    with pytest.raises(UserError, match='backbone: "" -> "abc"'):
        study.open_study(workdir, helpers.CONFIG, model.replace(fingerprint="abc"), helpers.FACTS, steps=1)


def test_certificates_are_counted_with_those_that_were_wrong():
    certified_F, exact_F = np.array([True, True, False, False]), np.array([True, False, True, False])
    one = study.certificates(certified_F, exact_F)
    assert one == {"certified": 2, "certified_but_wrong": 1}
    assert study.sum_certificates([one, one]) == {"certified": 4, "certified_but_wrong": 2}


@pytest.mark.parametrize(
    "conditions, verdict, failed",
    [
        ({"a": True}, REPRODUCED, []),
        ({"a": True, "b": True}, REPRODUCED, []),
        ({"a": True, "b": False}, IN_PART, ["b"]),
        ({"a": False, "b": False}, NOT, ["a", "b"]),
    ],
)
def test_a_verdict_follows_from_named_conditions(conditions, verdict, failed):
    claim = Claim("Said", "Seen", conditions)
    assert claim.verdict == verdict and claim.failed == failed
    assert str(claim).startswith(f"{verdict}: Said.\n    Seen.")
    assert [name for name in conditions if name in str(claim).partition("Does not hold: ")[2]] == failed


def test_a_claim_without_conditions_is_an_error():
    with pytest.raises(ValueError, match="without conditions: Said"):
        Claim("Said", "Seen", {})


def test_a_study_ends_in_results_a_picture_and_verdicts(tmp_path, capsys):
    """The results hold what was measured and no verdict; table, claims and figure are made of them as they are read."""
    drawn = []

    def claims(results):
        return [Claim("Said", "Seen", {"two": results["measured"] == [1, 2]})]  # a tuple before it was written

    def draw(results, path):
        drawn.append(path)

    study.finish(tmp_path, {"measured": (1, 2), "seconds": 2.0}, lambda results: "a table", claims, draw)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert set(saved) == {"measured", "seconds", "command", "environment"} and "jax" in saved["environment"]
    assert drawn == [tmp_path / "figures.png"]
    assert "a table\nreproduced: Said.\n    Seen.\n2 s" in capsys.readouterr().out


def test_importing_studies_defines_no_flags():
    assert {"capacity", "compile_ahead", "report"} < set(STUDIES)
    program = f"""
import importlib
from absl import flags
for name in {STUDIES}:
    importlib.import_module(f"experiments.{{name}}")
defined = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith("experiments.")]
assert not defined and not {{"config", "workdir"}} & set(flags.FLAGS), defined
"""
    subprocess.run([sys.executable, "-c", program], cwd=helpers.ROOT, check=True)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_says_how_it_is_run(name):
    assert f"python -m experiments.{name} " in importlib.import_module(f"experiments.{name}").__doc__


def test_all_studies_start_alike(tmp_path):
    """A study has its own flags, the config and those of several processes, which one that computes nothing has not."""
    shown = helpers.call("experiments.loss_threshold", "--help").stdout
    assert "Which loss ends hallucination" in shown and "--config.memory.num_experts" in shown
    assert all(f"--{name}:" in shown for name in ("once", "workdir", "config", "coordinator"))
    result = helpers.call("experiments.report", f"--workdir={tmp_path}", "--multihost")
    assert result.returncode == 2 and "multihost" in result.stderr and result.stderr.count("\n") == 1
