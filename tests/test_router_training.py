"""The study of router training: frozen routers change no selection, one that is not does, and rows stay behind."""

import itertools

import helpers
import numpy as np
import pytest

from lamini_jax import model, router

study = helpers.without_flags("experiments.router_training")
CONFIG = helpers.replace(helpers.CONFIG, router={"learning_rate": 0.1}, tuning={"epochs": 40})
FACTS = helpers.FACTS[:6]
QUESTIONS = [fact.question for fact in FACTS]


@pytest.fixture(scope="module")
def features_QD(base):
    return model.calibration_features(CONFIG, base, QUESTIONS)


def chosen(base, features_QD, name, epochs):
    config = helpers.replace(CONFIG, tuning={"epochs": epochs})
    return study.selections(config, base, study.ROUTERS[name], features_QD, QUESTIONS)


def test_the_packages_own_router_is_ours(base, features_QD):
    (ours,), ids_EFK = chosen(base, features_QD, "ours", 3)
    own = model.make_router(CONFIG, base, QUESTIONS)
    assert helpers.same_bits(ours, own)
    np.testing.assert_array_equal(ids_EFK[0], model.select_all(base, own, QUESTIONS, CONFIG.memory.selected))


def test_untrained_is_before_the_first_epoch_and_each_epoch_moves_it(features_QD):
    means, transforms = zip(*itertools.islice(router.projections(CONFIG, features_QD), 4), strict=True)
    assert all(helpers.same_bits(mean_D, means[0]) for mean_D in means)
    assert not any(helpers.same_bits(*pair) for pair in itertools.combinations(transforms, 2))
    (raw_mean_D, raw_DC) = next(router.projections(CONFIG, features_QD, whiten=False))
    mean_D, white_DD = router.whitening(features_QD, CONFIG.router.ridge)
    assert not raw_mean_D.any()
    np.testing.assert_allclose(transforms[0], white_DD @ raw_DC, rtol=1e-4, atol=1e-5)


def test_only_a_router_that_is_not_frozen_changes_selections(base, features_QD):
    for name, training in study.ROUTERS.items():
        routers, ids_EFK = chosen(base, features_QD, name, 3)
        assert len(routers) == len(ids_EFK) == (1 if training.frozen else 3)
        assert (study.changed(ids_EFK) == 0) is training.frozen


def test_changed_by_hand():
    ids_EFK = np.array([[[1, 2], [3, 4]], [[2, 1], [3, 5]], [[2, 1], [3, 5]], [[6, 7], [8, 9]]])
    assert study.changed(ids_EFK) == 3 / 6  # the order of experts is no change


def test_what_was_trained_is_lost_with_its_selection(base, features_QD):
    """The same facts hold with a fixed selection, and none does once every fact has been given experts of others."""
    routers, ids_EFK = chosen(base, features_QD, "ours", 1)
    fixed = study.memorize(CONFIG, base, FACTS, routers, ids_EFK, "fixed")
    assert fixed["recall"] == 1 and fixed["certified"][-1] == 1 and fixed["epochs"] < 40
    assert fixed["changed"] == 0 and fixed["experts_touched"] == np.unique(ids_EFK).size
    # As many epochs, but before the last one all select experts that nobody has trained.
    unused = np.setdiff1d(np.arange(CONFIG.memory.num_experts), ids_EFK)[: ids_EFK[0].size].reshape(ids_EFK[0].shape)
    count = fixed["epochs"]
    ids_EFK = np.concatenate([np.repeat(ids_EFK, count, axis=0), unused[None]])
    config = helpers.replace(CONFIG, tuning={"epochs": count})
    moved = study.memorize(config, base, FACTS, routers * (count + 1), ids_EFK, "moved")
    assert moved["certified"][:-1] == fixed["certified"][:-1] and moved["certified"][-1] == 0
    assert moved["lost"] > 0


def result(recall, epochs, changed=0.0, since=0.0):
    rest = {"changed_since": since, "experts_used": 5, "lost": 0}
    return {"recall": recall, "epochs": epochs, "changed": changed, **rest}


def verdicts(**changes):
    found = dict.fromkeys(study.ROUTERS, result(1.0, 20))
    return [claim["verdict"] for claim in study.claims(found | changes)]


def test_verdicts_follow_the_measurements():
    whole, partly, never = "reproduced", "reproduced in part", "not reproduced"
    assert verdicts() == [partly, never, never]
    lost = {"never": result(0.5, 40, 0.9), "raw": result(0.9, 40), "whitened": result(1.0, 30)}
    assert verdicts(**lost) == [whole, whole, whole]
    assert verdicts(**lost | {"whitened": result(1.0, 21)}) == [whole, whole, partly]  # about as many epochs
    assert verdicts(**lost | {"ours": result(0.4, 5, 0.1)})[:2] == [partly, never]
    assert verdicts(**lost | {"ours": result(1.0, 20, since=0.1)})[0] == partly  # another selection after tuning
