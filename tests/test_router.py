"""A question alone decides its experts, in every batch, and different questions have different ones."""

import dataclasses

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax import bank, model, recall, router
from lamini_jax.data import batches
from lamini_jax.errors import UserError

K = helpers.CONFIG.memory.selected
QUESTIONS = [fact.question for fact in helpers.some_facts(70)] + ["Who?", "Which one of these is " + 50 * "x"]


@pytest.fixture(scope="module", params=["exact", "product"])
def routing(base, request):
    return model.make_router(helpers.replace(helpers.CONFIG, router={"lookup": request.param}), base, QUESTIONS)


@pytest.fixture(scope="module")
def expert_ids_FK(base, routing):
    return model.select_all(base, routing, QUESTIONS, K)


def prompt_of(question, more_padding=0):
    (bucket,) = batches.prompts([question], helpers.TOKENIZER)
    padding = ((0, 0), (0, more_padding))
    return np.pad(bucket.tokens_FT, padding, constant_values=helpers.TOKENIZER.pad_id), bucket.length_F


def flat(keys):
    """keys_NC; of half-keys, all pairs of them."""
    keys = np.asarray(keys, np.float64)
    if keys.ndim == 2:
        return keys
    size = keys.shape[1]
    return np.concatenate([np.repeat(keys[0], size, axis=0), np.tile(keys[1], (size, 1))], axis=1)


def assert_same_experts(base, routing, question, ids_K, expected_ids_K):
    """The same set; only where scores nearly tie at the K-th place may rounding have swapped two of them."""
    swapped = sorted(set(np.asarray(ids_K).tolist()) ^ set(np.asarray(expected_ids_K).tolist()))
    if swapped:
        feature_BD = np.asarray(model.features(base.decoder, base.params, *prompt_of(question)))
        query_BC = np.asarray(
            router.query(routing.mean_D, routing.transform_DC, feature_BD, routing.lookup), np.float64
        )
        scores_N = flat(routing.keys) @ query_BC[0]
        assert len(swapped) == 2 and np.ptp(scores_N[swapped]) < 1e-5


def test_each_question_has_k_experts_of_equal_weight(base, routing, expert_ids_FK):
    assert expert_ids_FK.shape == (len(QUESTIONS), K)
    assert all(len(set(ids_K)) == K for ids_K in expert_ids_FK.tolist())
    assert expert_ids_FK.min() >= 0 and expert_ids_FK.max() < helpers.CONFIG.memory.num_experts
    selection = model.select(base.decoder, base.params, routing, *prompt_of(QUESTIONS[0]), K)
    np.testing.assert_allclose(selection.gates_BK, np.full((1, K), K**-0.5), rtol=1e-6)


def test_selection_is_that_of_a_plain_search(base, routing, expert_ids_FK):
    for index in (0, 33, 70, 71):
        tokens_BT, length_B = prompt_of(QUESTIONS[index])
        feature_D = np.asarray(model.features(base.decoder, base.params, tokens_BT, length_B), np.float64)[0]
        query_C = (feature_D - np.asarray(routing.mean_D)) @ np.asarray(routing.transform_DC, np.float64)
        if routing.lookup == "product":  # whose halves weigh the same
            query_C = np.concatenate([half / np.linalg.norm(half) for half in np.split(query_C, 2)])
        best_K = np.argsort(-(flat(routing.keys) @ query_C))[:K]
        assert_same_experts(base, routing, QUESTIONS[index], best_K, expert_ids_FK[index])


def test_same_experts_in_every_batch_and_padding(base, routing, expert_ids_FK):
    alone = [model.select_all(base, routing, [question], K)[0] for question in QUESTIONS[:3]]
    backwards = model.select_all(base, routing, QUESTIONS[::-1], K)[::-1]
    for index, question in enumerate(QUESTIONS):
        assert_same_experts(base, routing, question, backwards[index], expert_ids_FK[index])
    for index, question in enumerate(QUESTIONS[:3]):
        assert_same_experts(base, routing, question, alone[index], expert_ids_FK[index])
        padded = model.select(base.decoder, base.params, routing, *prompt_of(question, 32), K)
        assert_same_experts(base, routing, question, padded.expert_ids_BK[0], expert_ids_FK[index])


def test_selection_does_not_move(base, routing, expert_ids_FK):
    assert helpers.same_bits(model.select_all(base, routing, QUESTIONS, K), expert_ids_FK)


SHAPE = bank.row_shape(helpers.BACKBONE, helpers.CONFIG.memory)


def test_serving_fetches_what_tuning_selected(base, routing, expert_ids_FK, monkeypatch):
    """Asked alone or all together."""
    fetched = []

    def fetch(expert_ids_BK):
        fetched.append(np.asarray(expert_ids_BK))
        return helpers.parts(np.zeros((*expert_ids_BK.shape, 2 * (48 + 32)), np.float32), SHAPE)

    def silent(decoder, params, prompt_BT, length_B, longest, stop_ids, *_):
        return np.full((len(length_B), 1), stop_ids[0]), np.ones(len(length_B))

    monkeypatch.setattr(recall.decoding, "generate", silent)
    adapt = recall.with_memory(base, routing, fetch, helpers.CONFIG.memory)
    recall.answers(base, adapt, QUESTIONS[:64])
    recall.answers(base, adapt, QUESTIONS[:1])
    assert [ids_BK.shape for ids_BK in fetched] == [(64, K), (1, K)]
    for index, ids_K in enumerate([*fetched[0], fetched[1][0]]):
        index %= 64
        assert_same_experts(base, routing, QUESTIONS[index], ids_K, expert_ids_FK[index])


def test_features_are_of_the_question_alone(base):
    """Whatever follows it, an answer say, changes nothing; the question does."""
    tokens_BT, length_B = prompt_of(QUESTIONS[0])
    answered_BT = tokens_BT.copy()
    answered_BT[0, length_B[0] : length_B[0] + 5] = helpers.TOKENIZER.completion("9X3F")
    before, after = (model.features(base.decoder, base.params, t, length_B) for t in (tokens_BT, answered_BT))
    assert helpers.same_bits(before, after)
    tokens_BT[0, 1] += 1
    assert not helpers.same_bits(before, model.features(base.decoder, base.params, tokens_BT, length_B))


def test_pool_by_hand():
    hidden_BTD = np.array([[[3.0, 3.0], [0.0, 2.0], [5.0, 7.0]]], np.float32)
    expected = (np.array([1.0, 1.0]) + np.array([0.0, 2**0.5])) / 2
    np.testing.assert_allclose(router.pool(hidden_BTD, np.array([2])), [expected], rtol=1e-5)


def test_training_is_a_function_of_seed_and_features():
    features_QD = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)
    first, again = (router.train(helpers.CONFIG, features_QD) for _ in range(2))
    assert helpers.same_bits(first, again)
    other = router.train(dataclasses.replace(helpers.CONFIG, seed=1), features_QD)
    assert not helpers.same_bits(first.transform_DC, other.transform_DC)
    assert not helpers.same_bits(first.keys, other.keys)


@pytest.mark.parametrize("lookup, shape", [("exact", (4096, 16)), ("product", (2, 64, 8))])
def test_keys_have_unit_length(lookup, shape):
    keys = router.keys(helpers.replace(helpers.CONFIG, router={"lookup": lookup}))
    assert keys.shape == shape
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-5)


def test_nan_is_refused(base, routing):
    """No expert is ever selected by NaN."""
    broken = routing.replace(mean_D=routing.mean_D.at[0].set(jnp.nan))
    with pytest.raises(UserError, match="NaN of the question 'Who"):
        model.select_all(base, broken, ["Who?"], K)


def test_whitening_gives_unit_covariance():
    rng = np.random.default_rng(0)
    features_QD = 7 + rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12))
    mean_D, white_DD = router.whitening(features_QD, ridge=1e-9)
    whitened_QD = (features_QD - mean_D) @ white_DD
    np.testing.assert_allclose(whitened_QD.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(whitened_QD, rowvar=False), np.eye(12), atol=1e-3)
    np.testing.assert_allclose(white_DD, white_DD.T, atol=1e-5)


def test_whitening_bounds_what_hardly_varies():
    """A constant feature, and fewer questions than features: the ridge bounds the scale."""
    rng = np.random.default_rng(0)
    features_QD = np.concatenate([rng.normal(size=(6, 20)), np.ones((6, 1))], axis=1)
    _, white_DD = router.whitening(features_QD, ridge=1e-3)
    largest = np.linalg.eigvalsh(np.cov(features_QD, rowvar=False)).max()
    assert np.linalg.norm(white_DD, 2) <= 1.001 * (1e-3 * largest) ** -0.5


def test_whitened_queries_spread(base, routing, expert_ids_FK):
    """Look-alike questions share far fewer experts than with the raw feature."""
    tokens_FT = np.concatenate([prompt_of(question)[0] for question in QUESTIONS[:64]])
    length_F = np.concatenate([prompt_of(question)[1] for question in QUESTIONS[:64]])
    raw = helpers.random_router(helpers.replace(helpers.CONFIG, router={"lookup": routing.lookup}))
    raw_ids_FK = model.select(base.decoder, base.params, raw, tokens_FT, length_F, K).expert_ids_BK
    before = router.spread(np.asarray(raw_ids_FK), 4096)
    after = router.spread(expert_ids_FK[:64], 4096)
    assert after["nearest_overlap"] < before["nearest_overlap"] / 2
    assert after["mean_overlap"] < before["mean_overlap"] / 4
    assert after["experts_used"] > 2 * before["experts_used"]


def test_spread_by_hand():
    found = router.spread(np.array([[0, 1], [1, 0], [2, 3]]), num_experts=8)
    assert found == {
        "experts_used": 4,
        "load": 0.75,
        "mean_overlap": pytest.approx(1 / 3),
        "nearest_overlap": pytest.approx(2 / 3),
    }
    found = router.spread(np.array([[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]), num_experts=10)
    assert found["experts_used"] == 10
    assert found["mean_overlap"] == pytest.approx(2 * (1 / 4) / 6 * 2)
    assert found["nearest_overlap"] == pytest.approx(1 / 4)
    assert router.spread(np.array([[5, 7]]), num_experts=8)["nearest_overlap"] == 0
