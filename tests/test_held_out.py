"""Held-out questions are those that the backbone can answer, and none that a run was tuned on."""

import dataclasses

import helpers
import numpy as np
import pytest

from experiments.shared import held_out
from lamini_jax.backbone import answering
from lamini_jax.config import BackboneConfig, DataConfig
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.errors import UserError

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"


def test_unchanged_counts_answers_that_are_equal_to_the_letter(model):
    item = MultipleChoice("s", "q?", "Q: q?\nA:", (" yes", " no"), (True, False))
    free = [f"Question {number}?" for number in range(4)]
    before = answering.answers(model, answering.BARE, free, held_out.FREE_TOKENS)
    asked = held_out.HeldOut({"truthful_qa": [item], "none": []}, free, ["other", *before[1:]])
    found = held_out.judge(asked, model, answering.BARE)
    assert found["unchanged"] == 0.75 and found["none_accuracy"] is None
    assert found["truthful_qa_accuracy"] in (0.0, 1.0) and len(found["truthful_qa_interval"]) == 2


def test_a_real_backbone_is_judged_on_what_was_not_tuned(model, tmp_path):
    rows = "".join(f"T,C,Question {n}?,yes,yes; sure,no; never,S\n" for n in range(5))
    (tmp_path / "TruthfulQA.csv").write_text(HEADER + rows)
    data = DataConfig("truthful_qa", 2, str(tmp_path))
    config = dataclasses.replace(helpers.CONFIG, backbone=BackboneConfig(path="somewhere"), data=data)
    with pytest.raises(UserError, match="mmlu"):
        held_out.load(config, model, ["Question 0?"], 4)
    for part in ("dev", "test"):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        (tmp_path / "mmlu" / part / f"law_{part}.csv").write_text("Which?,a,b,c,d,B\n")
    asked = held_out.load(config, model, ["Question 0?"], 4)
    assert [item.question for item in asked.sets["truthful_qa"]] == [f"Question {n}?" for n in range(1, 5)]
    assert len(asked.sets["mmlu"]) == 1 and "Question 0?" not in asked.free
    assert np.array_equal(asked.before, answering.answers(model, answering.BARE, asked.free, held_out.FREE_TOKENS))


def test_the_backbone_that_ships_is_judged_on_its_world(model):
    kinds = held_out.world_kinds(helpers.CONFIG)
    asked = {qa.kind for qa in held_out.world_questions(helpers.CONFIG, 2)}
    assert asked and asked <= set(kinds)
    elsewhere = dataclasses.replace(helpers.CONFIG, backbone=BackboneConfig(path="somewhere"))
    assert held_out.world_questions(elsewhere, 2) == []
