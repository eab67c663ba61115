"""The study of router training: frozen routers change no selection, one that is not does, and rows stay behind."""

import itertools

import helpers
import numpy as np
import pytest

from experiments import router_training
from lamini_jax.memory import routers
from lamini_jax.memory.routers import experts as expert_router

CONFIG = helpers.replace(helpers.CONFIG, router={"learning_rate": 0.1}, tuning={"epochs": 40})
FACTS, QUESTIONS = helpers.FACTS[:6], helpers.QUESTIONS[:6]


@pytest.fixture(scope="module")
def features_QD(model):
    return expert_router.calibration_features(CONFIG, model, QUESTIONS)


def selections(model, features_QD, name, epochs):
    config = helpers.replace(CONFIG, tuning={"epochs": epochs})
    return router_training.selections(config, model, router_training.ROUTERS[name], features_QD, QUESTIONS)


def stacked(selected):
    return np.stack([selection.expert_ids_FK for selection in selected])


def test_the_packages_own_router_is_ours(model, features_QD):
    (ours,) = selections(model, features_QD, "ours", 3)
    own = routers.train(CONFIG, model, QUESTIONS)
    assert helpers.same_bits(ours.router, own)
    assert helpers.same_bits(ours[1:], routers.select_facts(model, own, QUESTIONS, CONFIG.memory.top_k)[1:])


def test_untrained_is_before_the_first_epoch_and_each_epoch_moves_it(features_QD):
    made = itertools.islice(expert_router.projections(CONFIG, features_QD), 4)
    means, transforms = zip(*made, strict=True)
    assert all(helpers.same_bits(mean_D, means[0]) for mean_D in means)
    assert not any(helpers.same_bits(*pair) for pair in itertools.combinations(transforms, 2))
    (raw_mean_D, raw_DC) = next(expert_router.projections(CONFIG, features_QD, whiten=False))
    _, white_DD = expert_router.whitening(features_QD, CONFIG.router.ridge)
    assert not raw_mean_D.any()
    np.testing.assert_allclose(transforms[0], white_DD @ raw_DC, rtol=1e-4, atol=1e-5)


def test_only_a_router_that_is_not_frozen_changes_selections(model, features_QD):
    for name, training in router_training.ROUTERS.items():
        selected = selections(model, features_QD, name, 3)
        assert len(selected) == (1 if training.frozen else 3)
        assert (router_training.changed(stacked(selected)) == 0) is training.frozen


def test_changed_by_hand():
    ids_EFK = np.array([[[1, 2], [3, 4]], [[2, 1], [3, 5]], [[2, 1], [3, 5]], [[6, 7], [8, 9]]])
    assert router_training.changed(ids_EFK) == 3 / 6  # the order of experts is no change


def test_what_was_trained_is_lost_with_its_selection(model, features_QD):
    """The same facts hold with a fixed selection, and none does once every fact has been given experts of others."""
    (ours,) = selections(model, features_QD, "ours", 1)
    fixed = router_training.memorize(CONFIG, model, FACTS, [ours], "fixed")
    assert fixed["recall"] == 1 and fixed["certified"][-1] == 1 and fixed["epochs"] < 40
    assert fixed["changed"] == 0 and fixed["experts_used"] == np.unique(ours.expert_ids_FK).size
    # As many epochs, but before the last one all select experts that nobody has trained.
    count, ids_FK = fixed["epochs"], ours.expert_ids_FK
    unused = np.setdiff1d(np.arange(CONFIG.memory.num_experts), ids_FK)[: ids_FK.size].reshape(ids_FK.shape)
    config = helpers.replace(CONFIG, tuning={"epochs": count})
    others = helpers.select(CONFIG, unused, ours.router)
    moved = router_training.memorize(config, model, FACTS, [ours] * count + [others], "moved")
    assert moved["certified"][:-1] == fixed["certified"][:-1] and moved["certified"][-1] == 0
    assert moved["lost"] > 0


def result(recall, epochs, changed=0.0, since=0.0):
    rest = {"changed_since": since, "experts_used": 5, "lost": 0}
    return {"recall": recall, "epochs": epochs, "changed": changed, **rest}


def verdicts(**changes):
    found = dict.fromkeys(router_training.ROUTERS, result(1.0, 20))
    return [claim.verdict for claim in router_training.claims({"routers": found | changes})]


def test_verdicts_follow_the_measurements():
    whole, partly, never = "reproduced", "reproduced in part", "not reproduced"
    assert verdicts() == [partly, never, never]
    lost = {"never": result(0.5, 40, 0.9), "raw": result(0.9, 40), "whitened": result(1.0, 30)}
    assert verdicts(**lost) == [whole, whole, whole]
    assert verdicts(**lost | {"whitened": result(1.0, 21)}) == [whole, whole, partly]  # about as many epochs
    assert verdicts(**lost | {"ours": result(0.4, 5, 0.1)})[:2] == [partly, never]
    assert verdicts(**lost | {"ours": result(1.0, 20, since=0.1)})[0] == partly  # another selection after tuning
