"""The scope: an equal wording fires, what is forgotten leaves nothing, and one question is judged as many are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamini_jax import config as config_lib
from lamini_jax.backbone import frozen_model
from lamini_jax.configure import configure
from lamini_jax.data import question_pairs, world, world_pairs
from lamini_jax.errors import UserError
from lamini_jax.memory import scope
from lamini_jax.memory.routers import experts
from lamini_jax.memory.scope import fitting
from lamini_jax.memory.scope.features import NAMES, edits, features
from lamini_jax.memory.scope.judge import Judge
from lamini_jax.memory.scope.wordings import Statistics, Words, normalized, read

STORED = ("Which code opens the vault of Azeru Dekipe?", "Spell ular backwards.", "Who wrote The River of Nind?")
ODD = (
    "",
    "?",
    "\n \n",
    "a",
    "É",
    "🙂🙂 🙂",
    "東京の人口は何人ですか",
    "1999 EF5",
    "x" * 500,
    "A. B. C. d? E! " * 20,
    "\0",
)


@pytest.fixture(scope="module")
def model():
    return frozen_model.load(configure(config_lib.to_config_dict(config_lib.tiny())))


@pytest.fixture(scope="module")
def words(model):
    return Words(model)


@pytest.fixture(scope="module")
def shipped(model):
    return scope.load(model.fingerprint)


def statistics_of(words, texts=STORED):
    statistics = Statistics(words)
    statistics.add(texts)
    return statistics


def scores(judge, words, asked, stored=STORED, cosine=0.5):
    candidates = [read(text) for text in stored]
    return judge.scores(read(asked), candidates, np.full(len(stored), cosine), statistics_of(words, stored))


@pytest.mark.parametrize("text", ["spell ULAR  backwards", " Spell ular backwards?", "Spell ular backwards."])
def test_an_equal_wording_always_fires(shipped, words, text):
    score_K = scores(shipped.judge, words, text, cosine=-1.0)
    assert np.isposinf(score_K).tolist() == [False, True, False]


def test_what_is_removed_leaves_nothing(words):
    statistics, never = statistics_of(words), statistics_of(words)
    others = ("Who wrote The Stone of Weart?", "Spell spell ular.", "")
    statistics.add(others)
    assert statistics.weight("wrote") != never.weight("wrote")
    statistics.remove(others)
    assert vars(statistics) == vars(never)


def test_one_candidate_is_judged_as_among_many(shipped, words):
    asked, cosine_K = read("Who is the author of The River of Nind?"), np.array([0.1, 0.2, 0.9])
    candidates, statistics = [read(text) for text in STORED], statistics_of(words)
    together = shipped.judge.scores(asked, candidates, cosine_K, statistics)
    for i, candidate in enumerate(candidates):
        assert shipped.judge.scores(asked, [candidate], cosine_K[i : i + 1], statistics)[0] == together[i]
    assert shipped.judge.scores(asked, [], np.zeros(0), statistics).shape == (0,)


@pytest.mark.parametrize("asked", ODD)
def test_features_of_any_text_are_finite(words, asked):
    feature_KX = features(read(asked), [read(text) for text in (*ODD, *STORED)], np.zeros(14), statistics_of(words))
    assert feature_KX.shape == (14, len(NAMES))
    assert np.isfinite(feature_KX).all()


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_features_of_random_texts_are_finite(words, asked, stored):
    assert np.isfinite(features(read(asked), [read(stored)], np.zeros(1), statistics_of(words, [stored]))).all()


@settings(max_examples=100, deadline=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edits_are_a_distance(a, b):
    """The same as by the whole table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            ways = table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            swapped = i > 1 and j > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]
            table[i, j] = min(*ways, table[i - 2, j - 2] + 1) if swapped else min(ways)
    assert edits(a, b, 2) == edits(b, a, 2) == min(table[-1, -1], 3)


def _feature(words, name, asked, stored):
    return features(read(asked), [read(stored)], np.array([0.5]), statistics_of(words, [stored]))[0, NAMES.index(name)]


def test_a_possessive_is_its_owners_name(words):
    for asked in ("Give me Anna Berg's phone number.", "Give me Anna Berg’s phone number."):
        assert _feature(words, "stored_names", asked, "What is the phone number of Anna Berg?") == 0


def test_without_a_name_a_wording_is_about_its_last_noun_phrase(words):
    stored = "Where is the spare key of the boat shed?"
    assert _feature(words, "stored_names", "where do you keep the boat shed's spare key", stored) == 0
    assert _feature(words, "stored_names", "Where is the spare key of the library?", stored) == 1


@pytest.mark.parametrize(
    ("asked", "is_slip"),
    [
        ("What is the phone number fo Anna Berg?", True),
        ("What is the phon enumber of Anna Brg?", True),
        ("What is the phone number ofA nna Berg?", True),
        ("What is the phone number of Otto Berg?", False),
    ],
)
def test_slips_of_letters_and_spaces_are_told_from_other_names(words, asked, is_slip):
    assert (_feature(words, "slips", asked, "What is the phone number of Anna Berg?") > 0) == is_slip


def test_in_a_short_name_another_letter_is_another_name(words):
    assert _feature(words, "slips", "Where is room B3 of hall Q?", "Where is room B3 of hall Z?") == 0


def test_a_look_alike_scores_below_a_rephrasing(shipped, model, words):
    records = world_pairs.related(40, seed=3)
    stored = [record.question for record in records]
    statistics = statistics_of(words, stored)

    def keys(texts):
        features_FD = experts.question_features(model, texts, 2)
        return np.asarray(experts.query(shipped.mean_D, shipped.transform_DC, features_FD, 1))

    def score(texts):
        cosine_F = (keys(texts) * keys(stored)).sum(axis=1)
        pairs = zip(texts, stored, cosine_F, strict=True)
        return np.array([shipped.judge.scores(read(a), [read(b)], np.array([c]), statistics)[0] for a, b, c in pairs])

    rephrased, alike = score([r.rephrased[0] for r in records]), score([r.others[0] for r in records])
    assert (rephrased > alike).mean() > 0.95


def test_a_judge_is_read_as_it_was_written(shipped, tmp_path):
    assert Judge.from_json(shipped.judge.to_json()) == shipped.judge
    assert scope.write(tmp_path / "again.npz", shipped).judge.identity == shipped.judge.identity
    other = dataclasses.replace(shipped.judge, thresholds=tuple(x + 1 for x in shipped.judge.thresholds))
    assert other.identity != shipped.judge.identity


def test_fewer_false_fires_take_a_higher_threshold(shipped):
    thresholds = [shipped.judge.threshold(rate) for rate in (0.2, 0.03, 0.01, 0.001)]
    assert thresholds == sorted(thresholds)
    with pytest.raises(UserError, match="was measured from 0.001 to 0.2"):
        shipped.judge.threshold(1e-5)


def test_what_is_no_scope_is_refused(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="bad.npz: is not a scope"):
        scope.read(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="python -m lamini_jax.train_scope"):
        scope.load("0" * 16)
    for text in ("{", "[]", '{"format": 1}'):
        with pytest.raises(UserError, match="is not a judge"):
            Judge.from_json(text)


def test_a_regression_finds_what_made_its_labels():
    """Also that a feature which speaks against its direction is left out."""
    rng = np.random.default_rng(0)
    feature_PX = rng.normal(size=(2000, len(NAMES)))
    key, meaning = (feature_PX[:, NAMES.index(name)] for name in ("key", "meaning"))
    right_P = ((key > -0.5) & (meaning > -0.5) & (feature_PX[:, NAMES.index("letters")] < 2)).astype(float)
    judge = fitting.regress(feature_PX, right_P, np.ones(len(right_P)), "")
    assert ((judge.log_odds(feature_PX) > 0) == (right_P > 0)).mean() > 0.95
    assert dict(zip(judge.subject.names, judge.subject.weights, strict=True))["letters"] == 0


def test_generated_records():
    records = question_pairs.related(300, seed=0)
    assert records[:100] == question_pairs.related(100, seed=0)
    for record in records:
        same = {normalized(text) for text in (record.question, *record.rephrased)}
        assert len(same) == 3 and not same & {normalized(text) for text in record.others}
    rng = np.random.default_rng(0)
    assert all(question_pairs.typo(rng, record.question) != record.question for record in records)
    assert question_pairs.typo(rng, "of it") == "of it"


def test_every_question_of_the_world_has_other_words():
    rng = np.random.default_rng(0)
    stream = world.training_stream(0)
    for question in [next(stream).question for _ in range(1000)] + [world.once(1, 0)[0].question]:
        assert len(set(world_pairs.reworded(rng, question)) - {question}) >= 2


def test_files_of_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "a", "rephrased": ["b"], "others": ["c"]}\n' * 50)
    assert question_pairs.read(str(path))[0] == question_pairs.Related("a", ("b",), ("c",))
    path.write_text('{"question": "a", "rephrased": "b"}\n')
    with pytest.raises(UserError, match="pairs.jsonl, line 1: is not a question with others"):
        question_pairs.read(str(path))
