"""A question alone decides its experts, in every batch, and different questions have different ones."""

import dataclasses
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamini_jax.backbone import answering
from lamini_jax.config import router_layer
from lamini_jax.data import batches
from lamini_jax.errors import UserError
from lamini_jax.memory import experts, routers, storage
from lamini_jax.memory.routers import NO_EXPERT
from lamini_jax.memory.routers import experts as expert_router

K = helpers.CONFIG.memory.top_k
LAYER = router_layer(helpers.CONFIG)
QUESTIONS = [fact.question for fact in helpers.some_facts(70)] + ["Who?", "Which one of these is " + 50 * "x"]


@pytest.fixture(scope="module", params=["exact", "product"])
def config(request):
    return helpers.replace(helpers.CONFIG, router={"lookup": request.param})


@pytest.fixture(scope="module")
def router(config, model):
    return routers.train(config, model, QUESTIONS)


@pytest.fixture(scope="module")
def expert_ids_FK(model, router):
    return select_all(model, router)


def select_all(model, router, questions=QUESTIONS):
    return routers.select_facts(model, router, questions, K).expert_ids_FK


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


def assert_same_experts(model, router, question, ids_K, expected_ids_K):
    """The same set; only where scores nearly tie at the K-th place may rounding have swapped two of them."""
    swapped = sorted(set(np.asarray(ids_K).tolist()) ^ set(np.asarray(expected_ids_K).tolist()))
    if swapped:
        (query_C,) = np.asarray(expert_router.queries(model, router, [question]), np.float64)
        scores_N = flat(router.keys) @ query_C
        assert len(swapped) == 2 and np.ptp(scores_N[swapped]) < 1e-5


def test_each_question_has_k_experts_of_equal_weight(model, router, expert_ids_FK):
    assert expert_ids_FK.shape == (len(QUESTIONS), K)
    assert all(len(set(ids_K)) == K for ids_K in expert_ids_FK.tolist())
    assert expert_ids_FK.min() >= 0 and expert_ids_FK.max() < helpers.CONFIG.memory.num_experts
    selection = routers.select(router, model, *prompt_of(QUESTIONS[0]), K)
    np.testing.assert_allclose(selection.gates_BK, np.full((1, K), K**-0.5), rtol=1e-6)


def test_selection_is_that_of_a_plain_search(model, router, expert_ids_FK):
    for index in (0, 33, 70, 71):
        tokens_BT, length_B = prompt_of(QUESTIONS[index])
        feature_D = np.asarray(expert_router.features(model, tokens_BT, length_B, LAYER), np.float64)[0]
        query_C = (feature_D - np.asarray(router.mean_D)) @ np.asarray(router.transform_DC, np.float64)
        if router.lookup == "product":  # whose halves weigh the same
            query_C = np.concatenate([half / np.linalg.norm(half) for half in np.split(query_C, 2)])
        best_K = np.argsort(-(flat(router.keys) @ query_C))[:K]
        assert_same_experts(model, router, QUESTIONS[index], best_K, expert_ids_FK[index])


def test_same_experts_in_every_batch_and_padding(model, router, expert_ids_FK):
    alone = [select_all(model, router, [question])[0] for question in QUESTIONS[:3]]
    backwards = select_all(model, router, QUESTIONS[::-1])[::-1]
    for index, question in enumerate(QUESTIONS):
        assert_same_experts(model, router, question, backwards[index], expert_ids_FK[index])
    for index, question in enumerate(QUESTIONS[:3]):
        assert_same_experts(model, router, question, alone[index], expert_ids_FK[index])
        padded = routers.select(router, model, *prompt_of(question, 32), K)
        assert_same_experts(model, router, question, padded.expert_ids_BK[0], expert_ids_FK[index])


def test_selection_does_not_move(config, model, router, expert_ids_FK):
    """What was saved and made again selects the same experts with the same gates."""
    selection = routers.select_facts(model, router, QUESTIONS, K)
    restored = routers.restore(config, *routers.save(router))
    assert restored.transform_DC is not router.transform_DC and restored.keys is not router.keys
    assert helpers.same_bits(restored, router)
    assert helpers.same_bits(routers.select_facts(model, restored, QUESTIONS, K)[1:], selection[1:])
    np.testing.assert_array_equal(selection.expert_ids_FK, expert_ids_FK)


SHAPE = experts.expert_shape(helpers.BACKBONE, helpers.CONFIG.memory)


def test_serving_fetches_what_tuning_selected(model, router, expert_ids_FK, monkeypatch):
    """Asked alone or all together."""
    fetched = []

    def fetch(expert_ids_BK):
        fetched.append(np.asarray(expert_ids_BK))
        return helpers.parts(np.zeros((*expert_ids_BK.shape, 2 * (48 + 32)), np.float32), SHAPE)

    def silent(model, prompt_BT, length_B, *_):
        return np.full((len(length_B), 1), model.tokenizer.stop_ids[0]), np.ones(len(length_B))

    monkeypatch.setattr(answering.decoding, "generate", silent)
    adapter_fn = storage.with_experts(model, router, fetch, helpers.CONFIG)
    answering.answers(model, adapter_fn, QUESTIONS[:64])
    answering.answers(model, adapter_fn, QUESTIONS[:1])
    assert [ids_BK.shape for ids_BK in fetched] == [(64, K), (1, K)]
    for index, ids_K in enumerate([*fetched[0], fetched[1][0]]):
        index %= 64
        assert_same_experts(model, router, QUESTIONS[index], ids_K, expert_ids_FK[index])


def test_features_are_of_the_question_alone(model):
    """Whatever follows it, an answer say, changes nothing; the question does."""
    tokens_BT, length_B = prompt_of(QUESTIONS[0], 32)
    answered_BT = tokens_BT.copy()
    answered_BT[0, length_B[0] : length_B[0] + 5] = helpers.TOKENIZER.completion("9X3F")
    before, after = (expert_router.features(model, t, length_B, LAYER) for t in (tokens_BT, answered_BT))
    assert helpers.same_bits(before, after)
    tokens_BT[0, 1] += 1
    assert not helpers.same_bits(before, expert_router.features(model, tokens_BT, length_B, LAYER))


def test_features_depend_on_no_later_layer():
    """Neither on other layers of the prefix nor on those with memory."""
    config = helpers.replace(helpers.CONFIG, backbone={"num_layers": 6})
    model, prompts = helpers.make_model(config), prompt_of(QUESTIONS[0])

    def features(layer_changed):
        def change(layers):
            return jax.tree.map(lambda x: x.at[layer_changed:].multiply(1.1), layers)

        changed = {"prefix_layers": change(model.params["prefix_layers"])}
        changed |= {"suffix_layers": jax.tree.map(jnp.zeros_like, model.params["suffix_layers"])}
        return expert_router.features(model.replace(params={**model.params, **changed}), *prompts, LAYER)

    expected = expert_router.features(model, *prompts, LAYER)
    assert helpers.same_bits(features(LAYER), expected) and not helpers.same_bits(features(LAYER - 1), expected)


def test_the_layer_is_a_fifth_of_the_depth_unless_told():
    """At least the second, and none that has memory."""

    def layer(num_layers, **router):
        config = helpers.replace(helpers.CONFIG, backbone={"num_layers": num_layers}, router=router)
        return router_layer(config)

    assert [layer(depth) for depth in (3, 4, 10, 12, 32, 80)] == [1, 2, 2, 2, 6, 16]
    assert layer(32, layer=9) == 9


def test_pool_by_hand():
    hidden_BTD = np.array([[[8.0, 1.0], [3.0, 3.0], [0.0, 2.0], [5.0, 7.0]]], np.float32)
    expected = (np.array([1.0, 1.0]) + np.array([0.0, 2**0.5])) / 2
    own_BT = np.array([[False, True, True, False]])
    np.testing.assert_allclose(expert_router.pool(hidden_BTD, own_BT), [expected], rtol=1e-5)
    assert not np.asarray(expert_router.pool(hidden_BTD, np.zeros((1, 4), bool))).any()  # an empty question


def test_training_is_a_function_of_seed_and_features():
    features_QD = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)

    def trained(config):
        _, (mean_D, transform_DC) = itertools.islice(expert_router.projections(config, features_QD), 2)
        return expert_router.make(config, mean_D, transform_DC)

    first, again = trained(helpers.CONFIG), trained(helpers.CONFIG)
    assert helpers.same_bits(first, again)
    other = trained(dataclasses.replace(helpers.CONFIG, seed=1))
    assert not helpers.same_bits(first.transform_DC, other.transform_DC)
    assert not helpers.same_bits(first.keys, other.keys)


def test_keys_have_unit_length(router):
    assert router.keys.shape == {"exact": (4096, 16), "product": (2, 64, 8)}[router.lookup]
    np.testing.assert_allclose(np.linalg.norm(router.keys, axis=-1), 1, rtol=1e-5)


def test_nan_is_refused(model, router):
    """No expert is ever selected by NaN."""
    broken = router.replace(mean_D=router.mean_D.at[0].set(jnp.nan))
    selection = routers.select(broken, model, *prompt_of("Who?"), K)
    assert (np.asarray(selection.expert_ids_BK) == NO_EXPERT).all()
    with pytest.raises(UserError, match="NaN of the question 'Who"):
        select_all(model, broken, ["Who?"])


def test_whitening_gives_unit_covariance():
    rng = np.random.default_rng(0)
    features_QD = 7 + rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12))
    mean_D, white_DD = expert_router.whitening(features_QD, ridge=1e-9)
    whitened_QD = (features_QD - mean_D) @ white_DD
    np.testing.assert_allclose(whitened_QD.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(whitened_QD, rowvar=False), np.eye(12), atol=1e-3)
    np.testing.assert_allclose(white_DD, white_DD.T, atol=1e-5)


def test_whitening_bounds_what_hardly_varies():
    """A constant feature, and fewer questions than features: the ridge bounds the scale."""
    rng = np.random.default_rng(0)
    features_QD = np.concatenate([rng.normal(size=(6, 20)), np.ones((6, 1))], axis=1)
    _, white_DD = expert_router.whitening(features_QD, ridge=1e-3)
    largest = np.linalg.eigvalsh(np.cov(features_QD, rowvar=False)).max()
    assert np.linalg.norm(white_DD, 2) <= 1.001 * (1e-3 * largest) ** -0.5


def test_whitened_queries_spread(config, model, router, expert_ids_FK):
    """Look-alike questions share far fewer experts than with the raw feature."""
    tokens_FT = np.concatenate([prompt_of(question)[0] for question in QUESTIONS[:64]])
    length_F = np.concatenate([prompt_of(question)[1] for question in QUESTIONS[:64]])
    raw = helpers.random_router(config)
    raw_ids_FK = routers.select(raw, model, tokens_FT, length_F, K).expert_ids_BK
    before = expert_router.selection_stats(np.asarray(raw_ids_FK), 4096)
    after = expert_router.selection_stats(expert_ids_FK[:64], 4096)
    assert after["nearest_overlap"] < before["nearest_overlap"] / 2
    assert after["mean_overlap"] < before["mean_overlap"] / 4
    assert after["experts_used"] > 2 * before["experts_used"]


def test_spread_by_hand():
    found = expert_router.selection_stats(np.array([[0, 1], [1, 0], [2, 3]]), num_experts=8)
    assert found == {
        "experts_used": 4,
        "load": 0.75,
        "mean_overlap": pytest.approx(1 / 3),
        "nearest_overlap": pytest.approx(2 / 3),
    }
    found = expert_router.selection_stats(np.array([[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]), num_experts=10)
    assert found["experts_used"] == 10
    assert found["mean_overlap"] == pytest.approx(2 * (1 / 4) / 6 * 2)
    assert found["nearest_overlap"] == pytest.approx(1 / 4)
    assert expert_router.selection_stats(np.array([[5, 7]]), num_experts=8)["nearest_overlap"] == 0
