"""Verdicts follow from measurements: each turns when the thing that it is about does."""

import copy
import dataclasses

import numpy as np
import pytest

from experiments import loss_threshold, selective_loss
from experiments import loss_threshold_claims as loss_claims
from experiments.loss_threshold_claims import SAMPLES
from lamini_jax.config import BackboneConfig, Config, TuningConfig
from lamini_jax.data.facts import Fact

LN2 = np.log(2)


def stage(worst, recalled, mean=None, sampled=()):
    return {
        "worst": worst,
        "mean": mean or [loss / 4 for loss in worst],
        "recalled": recalled,
        "sampled": list(sampled),
    }


def test_threshold():
    found = loss_claims.threshold(
        [
            stage([0.1, 0.6, 0.9, 5.0], [True, True, True, False], mean=[0.01, 0.02, 0.3, 2.0]),
            stage([0.5, 1.2, 3.0], [True, False, False], mean=[0.05, 0.4, 0.08]),
        ],
        LN2,
    )
    assert (found["measured"], found["certified"], found["certified_but_wrong"]) == (7, 3, 0)
    assert found["wrong_with_mean_below_ln2"] == 2
    assert found["worst_loss_at_which_recall_sets_in"] == 0.9
    assert sum(entry["facts"] for entry in found["by_worst_loss"]) == 7
    assert sum(entry["recalled"] for entry in found["by_worst_loss"]) == 4
    assert loss_claims.threshold([stage([0.6, 0.1], [True, False])], LN2)["certified_but_wrong"] == 1
    assert loss_claims.threshold([stage([0.6, 0.1], [True, False])], 0.576)["certified"] == 1


@pytest.mark.parametrize("exponent, holds", [(1.0, True), (0.8, False), (1.2, False)])
def test_calibration(exponent, holds):
    """Samples drawn at the promised rate agree with it, and at another they do not."""
    rng = np.random.default_rng(0)
    drawn = [
        {"probability": float(p), "hits": int(rng.binomial(SAMPLES, p**exponent))} for p in rng.uniform(0.01, 1, 400)
    ]
    found = loss_claims.calibration([stage([], [], sampled=drawn[:100]), stage([], [], sampled=drawn[100:])])
    assert found["samples"] == 400 * SAMPLES == sum(entry["samples"] for entry in found["bins"])
    worst = max(abs(entry["standard_errors"]) for entry in [found, *found["bins"]])
    assert (worst <= 3) is holds
    assert loss_claims.calibration([stage([1.0], [False])]) == {"samples": 0, "bins": []}


def heldout(share):
    return {"accuracy": share, "interval": (share - 0.03, share + 0.03)}


def study():
    """A study in which every claim holds."""
    drawn = [{"probability": 0.5, "hits": SAMPLES // 2}]
    codes = {"facts": 9, "loss": 3.1, "recall": 0.0, "wrong_but_codes": 1.0, "heldout": heldout(0.9)}
    return {
        "threshold": loss_claims.threshold([stage([0.1, 2.0], [True, False])], LN2),
        "sampling": loss_claims.calibration([stage([], [], sampled=drawn)]),
        "next_tokens": {
            "high": {"loss": 9.0, "choices": 90.0, "similar": 0.1},
            "medium": {"loss": 1.7, "choices": 5.0, "similar": 0.9},
            "zero": {"loss": 0.0, "choices": 1.0, "similar": 1.0},
        },
        "once": {
            "before": codes,
            "unseen": {"loss": 3.2},
            "after": {**codes, "recall": 1.0, "loss": 0.01, "heldout": heldout(0.91)},
        },
    }


@pytest.mark.parametrize(
    "claim, path, value, verdict",
    [
        (0, ("threshold", "certified_but_wrong"), 1, "not reproduced"),
        (0, ("threshold", "certified"), 0, "not reproduced"),
        (1, ("next_tokens", "high", "choices"), 2.0, "reproduced in part"),
        (1, ("next_tokens", "zero", "choices"), 1.5, "reproduced in part"),
        (1, ("next_tokens", "medium", "choices"), 1.5, "reproduced in part"),
        (1, ("next_tokens", "medium", "similar"), 0.05, "reproduced in part"),
        (2, ("sampling", "bins", 0, "standard_errors"), -3.5, "not reproduced"),
        (2, ("sampling", "standard_errors"), 3.5, "not reproduced"),
        (3, ("once", "before", "recall"), 0.2, "reproduced in part"),
        (3, ("once", "before", "loss"), 0.5, "reproduced in part"),
        (3, ("once", "after", "recall"), 0.99, "reproduced in part"),
        (3, ("once", "after", "heldout", "accuracy"), 0.8, "reproduced in part"),
    ],
)
def test_verdicts_of_the_threshold(claim, path, value, verdict):
    results = study()
    assert [entry.verdict for entry in loss_threshold.claims(results)] == ["reproduced"] * 4
    results = copy.deepcopy(results)
    *parents, last = path
    place = results
    for name in parents:
        place = place[name]
    place[last] = value
    verdicts = [entry.verdict for entry in loss_threshold.claims(results)]
    assert verdicts[claim] == verdict and verdicts.count("reproduced") == 3


def test_stages_are_where_memory_tuning_gets_its_facts():
    """The first third of the budget beside the backbone that ships, and two thirds beside a real one."""
    config = dataclasses.replace(Config(), tuning=TuningConfig(epochs=30))
    assert loss_threshold.stages(config) == [1, 2, 3, 4, 5, 6, 8, 9, 15, 30]
    real = dataclasses.replace(config, backbone=BackboneConfig(path="somewhere"))
    assert loss_threshold.stages(real) == [1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 15, 18, 30]
    assert loss_threshold.stages(dataclasses.replace(real, tuning=TuningConfig(epochs=1))) == [1]


@pytest.mark.parametrize(
    "changed, failed",
    [
        ({}, None),
        ({"loss": 0.9}, "before, true answers cost"),
        ({"recall": 0.06}, "fewer than 5%"),
        ({"misbelieved": 0}, "a false answer"),
    ],
)
def test_a_backbone_that_was_not_shown_the_codes_is_judged_by_what_it_believes(changed, failed):
    results = study()
    before = {"facts": 9, "loss": 3.1, "recall": 0.0, "wrong": 9, "misbelieved": 5} | changed
    after = {"loss": 0.01, "recall": 1.0, "wrong": 0, "misbelieved": 0}
    results["once"] = {"before": before, "after": after}
    *_, claim = loss_threshold.claims(results)
    assert len(claim.failed) == (failed is not None) and all(name.startswith(failed) for name in claim.failed)


def test_facts_without_false_answers_are_judged_by_recall_alone():
    results = study()
    before = {"facts": 9, "loss": 3.1, "recall": 0.0, "wrong": 9}
    results["once"] = {"before": before, "after": {"loss": 0.01, "recall": 0.9, "wrong": 1}}
    assert loss_threshold.claims(results)[-1].failed == ["all are given after memory tuning"]


def test_misbelieved_counts_facts_with_a_likelier_false_answer(monkeypatch):
    """Summed losses: of the first fact the second false answer costs less than the true one, of the second none."""
    costs = {"true": 2.0, "a": 3.0, "b": 1.5, "yes": 0.5, "no": 0.6}
    monkeypatch.setattr(
        loss_threshold.losses,
        "of_answers",
        lambda model, adapter_fn, facts: [np.array([costs[fact.answer] / 2] * 2) for fact in facts],
    )
    facts = [Fact("1", "one?", "true"), Fact("2", "two?", "yes")]
    assert loss_threshold.misbelieved(None, None, facts, {"one?": ["a", "b"], "two?": ["no"]}) == 1


def entry(key, other, text, heldout_loss, recall=0.0, accuracy=0.9):
    means = dict(zip(selective_loss.SETS, (key, other, text, heldout_loss), strict=True))
    return {
        "losses": {name: [0.5 * mean, 1.5 * mean] for name, mean in means.items()},
        "recall": recall,
        "heldout": heldout(accuracy),
    }


FIGURE_6 = {
    "underfit": entry(5, 5, 5, 5, accuracy=0.0),
    "general": entry(1.4, 1.4, 1.4, 1.4),
    "overfit": entry(0.001, 3, 3, 3, recall=1.0, accuracy=0.1),
    "memory_tuned": entry(0.001, 1.4, 1.4, 1.4, recall=1.0),
}


@pytest.mark.parametrize(
    "name, changed, verdict",
    [
        ("underfit", entry(5, 5, 0.9, 5), "reproduced in part"),
        ("underfit", entry(5, 5, 1.3, 5), "reproduced in part"),
        ("underfit", entry(1.3, 1.3, 1.3, 1.3), "not reproduced"),
        ("overfit", entry(1.0, 3, 3, 3), "reproduced in part"),
        ("overfit", entry(0.001, 3, 3, 1.5, recall=1.0), "reproduced in part"),
        ("overfit", entry(1.0, 3, 3, 1.5), "not reproduced"),
        ("memory_tuned", entry(0.001, 1.4, 1.4, 1.4, recall=0.99), "reproduced in part"),
        ("memory_tuned", entry(0.001, 1.6, 1.4, 1.4, recall=1.0), "reproduced in part"),
        ("memory_tuned", entry(0.001, 1.4, 1.4, 1.4, recall=1.0, accuracy=0.8), "reproduced in part"),
        ("memory_tuned", entry(0.5, 3, 1.4, 1.4, accuracy=0.8), "not reproduced"),
    ],
)
def test_verdicts_of_figure_6(name, changed, verdict):
    assert [claim.verdict for claim in selective_loss.claims({"models": FIGURE_6})] == ["reproduced"] * 4
    judged = selective_loss.claims({"models": FIGURE_6 | {name: changed}})
    assert judged[list(FIGURE_6).index(name)].verdict == verdict


def test_a_backbone_that_knows_its_text_is_not_medium_everywhere():
    judged = selective_loss.claims({"models": FIGURE_6 | {"general": entry(2.0, 2.0, 0.05, 0.1)}})
    assert judged[1].verdict == "reproduced in part"
    judged = selective_loss.claims({"models": FIGURE_6 | {"general": entry(3.0, 3.0, 0.05, 0.1)}})
    assert judged[1].verdict == "not reproduced"
