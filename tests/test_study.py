"""What all studies share: what was measured is measured once, and a directory belongs to one configuration."""

import json

import helpers
import numpy as np
import pytest

from experiments.parts import study
from experiments.parts.claims import claim
from lamini_jax.errors import UserError


def test_what_was_measured_is_not_measured_again(tmp_path):
    first = study.kept(tmp_path / "a.json", lambda: {"value": 1})
    assert first["value"] == 1 and first["seconds"] >= 0
    assert study.kept(tmp_path / "a.json", lambda: pytest.fail("measured again")) == first


def test_nothing_is_kept_of_what_failed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        study.kept(tmp_path / "a.json", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_a_directory_belongs_to_one_configuration_on_any_mesh(tmp_path):
    workdir = str(tmp_path / "study")
    study.directory_of(workdir, helpers.CONFIG, facts="abc")
    study.directory_of(workdir, helpers.replace(helpers.CONFIG, mesh={"model": 2}), facts="abc")
    with pytest.raises(UserError, match="tuning.epochs: 4 -> 5"):
        study.directory_of(workdir, helpers.replace(helpers.CONFIG, tuning={"epochs": 5}), facts="abc")
    with pytest.raises(UserError, match="facts: "):
        study.directory_of(workdir, helpers.CONFIG, facts="others")


def test_certificates_are_counted_with_those_that_were_wrong():
    certified_F, exact_F = np.array([True, True, False, False]), np.array([True, False, True, False])
    one = study.certificates(certified_F, exact_F)
    assert one == {"certified": 2, "certified_but_wrong": 1}
    assert study.added([one, one]) == {"certified": 4, "certified_but_wrong": 2}


def test_a_study_ends_in_results_a_picture_and_verdicts(tmp_path, capsys):
    drawn = []
    results = {"claims": [claim("said", "seen", True)], "seconds": 2.0}
    study.finish(tmp_path, results, "a table", lambda results, path: drawn.append(path))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["table"] == "a table" and saved["claims"] == results["claims"] and "jax" in saved["environment"]
    assert drawn == [tmp_path / "figures.png"]
    assert "a table\nreproduced: Said.\n    Seen.\n2 s" in capsys.readouterr().out
