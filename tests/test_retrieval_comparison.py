"""The comparison with retrieval asks what it says, refuses where that earns most, and judges by what was answered."""

import itertools
import json

import helpers
import numpy as np
import pytest

from experiments import retrieval_comparison as comparison
from experiments import retrieval_comparison_systems as retrieval
from experiments.retrieval_comparison_systems import Reply
from lamini_jax.backbone import answering
from lamini_jax.data.datasets import phone_book
from lamini_jax.data.facts import Fact, fact_id
from lamini_jax.errors import UserError
from lamini_jax.memory import routers
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.runtime import cli
from lamini_jax.training import MemoryMethod

BOOK = list(itertools.islice(phone_book.pairs(0), 180))
FACTS = [Fact(fact_id(question), question, answer) for question, answer in BOOK[:60]]
STRANGERS = [Fact(fact_id(question), question, answer) for question, answer in BOOK[60:]]
TEXTS = [fact.question for fact in FACTS]
KINDS = ("verbatim", "typos", "rephrased", "unknown")


def distance(a: str, b: str) -> int:
    """Characters to insert, leave out or replace (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@pytest.fixture(scope="module")
def systems(model, router):
    return {
        "b_tree": retrieval.b_tree(FACTS),
        "tfidf_words": retrieval.tfidf(FACTS, "word"),
        "tfidf_letters": retrieval.tfidf(FACTS, "char_wb"),
        "bm25": retrieval.bm25(FACTS),
        "vector": retrieval.vector(FACTS, lambda texts: expert_router.queries(model, router, texts)),
    }


def test_retrieval_returns_what_was_stored(systems):
    assert tuple(systems) == comparison.RETRIEVAL
    for name, system in systems.items():
        assert [reply.text for reply in system.answer(TEXTS)] == [fact.answer for fact in FACTS], name
        assert system.size > sum(len(fact.answer) for fact in FACTS), name


def test_only_the_b_tree_needs_every_letter(systems):
    texts = [text.replace("phone number", "fone number").replace("?", " now?") for text in TEXTS]
    assert [reply.text for reply in systems["b_tree"].answer(texts)] == [None] * len(texts)
    for name in ("tfidf_words", "tfidf_letters", "bm25"):
        assert [reply.text for reply in systems[name].answer(texts)] == [fact.answer for fact in FACTS], name


def test_scores_fall_for_strangers(systems):
    strangers = [fact.question for fact in STRANGERS]
    for name in comparison.RETRIEVAL:
        known = min(reply.score for reply in systems[name].answer(TEXTS))
        assert np.median([reply.score for reply in systems[name].answer(strangers)]) < known, name


def test_questions():
    test, calibration = comparison.questions(FACTS, STRANGERS, 0)
    again, _ = comparison.questions(FACTS, STRANGERS, 0)
    assert test == again
    assert [len(test[kind]) for kind in KINDS] == [60] * 4 == [len(calibration[k]) for k in KINDS]
    assert test["verbatim"] == [(fact.question, fact.answer) for fact in FACTS]
    for kind in KINDS[1:]:
        asked = [text for text, _ in test[kind]]
        assert not set(asked) & set(TEXTS), kind
        assert not set(asked) & {text for text, _ in calibration[kind]}, kind
    for fact, (typo, same), (rephrased, too) in zip(FACTS, test["typos"], test["rephrased"], strict=True):
        assert same == too == fact.answer
        assert 1 <= distance(fact.question, typo) <= 4  # two swaps are four of its steps
        assert fact.question.removeprefix("What is the phone number of ")[:-1] in rephrased
    assert {answer for _, answer in test["unknown"]} == {None}


def test_what_asks_for_no_name_is_not_rephrased():
    facts = [Fact("1", "Is water wet?", "Yes"), *FACTS[:2]]
    test, calibration = comparison.questions(facts, STRANGERS[:5], 0)
    assert list(test) == list(calibration) == ["verbatim", "typos", "unknown"]
    assert [len(calibration[kind]) for kind in calibration] == [3, 3, 2]


def test_an_edit_makes_a_new_question():
    rng = np.random.default_rng(0)
    taken = {"code", "ode", "cde", "coe", "ocde", "cdoe", "coed"}  # with one letter left out or two swapped
    found = [comparison.edited("code", rng, taken) for _ in range(200)]
    assert not taken & set(found) and len(set(found)) > 100
    assert all(distance("code", text) <= 4 for text in found)


def test_threshold_earns_most():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.integers(0, 6, 12) / 4
        replies = [
            Reply("a" if right else "b", score) for right, score in zip(rng.random(12) < scores, scores, strict=True)
        ]
        replies.append(Reply(None, 9.0))

        def earned(least, replies=replies):
            counts = comparison.judge(replies, ["a"] * 13, least)
            return counts["exact"] - counts["wrong"]

        found = comparison.threshold(replies, ["a"] * 13)
        everywhere = {least: earned(least) for least in np.arange(-0.1, 2, 0.05)}
        assert earned(found) == max(*everywhere.values(), 0)
        assert earned(found) > 0 or comparison.judge(replies, ["a"] * 13, found)["none"] == 13


def test_judge():
    replies = [Reply("1", 0.9), Reply("2", 0.8), Reply("", 0.7), Reply(None, 0.6), Reply("5", 0.1)]
    answers = ["1", "x", "3", None, None]
    counts = comparison.judge(replies, answers, None)
    assert counts == {"questions": 5, "exact": 1, "wrong": 2, "none": 2}
    assert comparison.judge(replies, answers, 0.5)["wrong"] == 1
    assert comparison.judge(replies, answers, 0.85) | counts | {"wrong": 0, "none": 4} == comparison.judge(
        replies, answers, 0.85
    ) | {"exact": 1}


def test_a_models_replies(model):
    system = comparison.model_system(model, answering.BARE, FACTS[:3], size=30)
    replies = system.answer(TEXTS[:3])
    longest = 2 + len(FACTS[0].answer)  # the stop token, and one more
    assert [reply.text for reply in replies] == answering.answers(model, answering.BARE, TEXTS[:3], longest)
    assert all(0 < reply.score <= 1 and reply.known is None for reply in replies)


def test_a_memory_knows_its_own_experts(model, router):
    """All of what a question selects is trained if its own fact did, a part of it if only another fact did."""
    selection = routers.select_facts(model, router, TEXTS[:3], helpers.CONFIG.memory.top_k)
    method = MemoryMethod.create(helpers.CONFIG, model, FACTS[:3], selection)
    ids_FK = selection.expert_ids_FK
    adapted = method.adapter(method.init())
    system = comparison.model_system(*adapted, FACTS[:3], size=30, trained_ids=np.unique(ids_FK[:2]))
    known = [reply.known for reply in system.answer(TEXTS[:3])]
    assert known == [1.0, 1.0, np.isin(ids_FK[2], ids_FK[:2]).mean()] and known[2] < 1


def outcome(wrong: dict[str, int], exact: int = 0):
    """A system with so many of 1,000 answers of each kind wrong."""
    sets = {
        kind: {
            "questions": 1000,
            "exact": exact,
            "wrong": wrong.get(kind, 0),
            "none": 1000 - exact - wrong.get(kind, 0),
        }
        for kind in KINDS
    }
    return {"sets": sets}


@pytest.mark.parametrize(
    "verbatim, unknown, indexes, expected",
    [
        (0, 0, 100, ["reproduced", "reproduced", "reproduced", "reproduced in part"]),
        (5, 50, 100, ["reproduced in part", "reproduced", "reproduced in part", "reproduced"]),
        (20, 900, 100, ["not reproduced", "reproduced", "not reproduced", "reproduced"]),
        (0, 900, 0, ["reproduced", "not reproduced", "not reproduced", "reproduced"]),
        (0, 900, 1000, ["reproduced", "not reproduced", "reproduced in part", "reproduced"]),
    ],
)
def test_verdicts_follow_from_the_counts(verbatim, unknown, indexes, expected):
    systems = {name: outcome({"unknown": indexes}) for name in comparison.RETRIEVAL}
    mome = outcome({"verbatim": verbatim, "unknown": unknown})
    mome["sets"]["verbatim"]["exact"] = 1000 - verbatim
    systems |= {"lora": outcome({"unknown": 500}), "lora" + comparison.REFUSING: outcome({}), "mome": mome}
    systems["mome" + comparison.REFUSING] = outcome({})
    systems["mome" + comparison.KNOWN] = outcome({}, exact=1000)
    systems |= {"facts": outcome({}), "facts" + comparison.REFUSING: outcome({})}
    assert [claim.verdict for claim in comparison.claims({"systems": systems})] == expected


def test_a_missing_extra_is_named():
    cli.require("report", "json")
    with pytest.raises(UserError, match=r"no_such_module not installed: pip install -e \.\[report\]"):
        cli.require("report", "json", "no_such_module")


def test_a_killed_run_goes_on(tmp_path):
    """Systems that have answered are not asked again: these replies could not have come from any model."""
    facts = FACTS[:4]
    test, calibration = comparison.questions(facts, [*FACTS, *STRANGERS][4:12], 0)
    for name in (*comparison.MODELS, "facts"):
        replies = {
            part: {
                kind: [Reply(answer or "7", *([0.9, 1.0] if answer else [0.1, 31 / 32])) for _, answer in pairs]
                for kind, pairs in asked.items()
            }
            for part, asked in (("test", test), ("calibration", calibration))
        }
        training = {
            "epochs": 1,
            "certificates": {"certified": 4, "certified_but_wrong": 0},
            "tuning_seconds": 1.0,
            "experts_used": 5,
        }
        rest = {"latency_seconds": 0.1, "bytes_per_fact": 10.0, "seconds": 1.0}
        (tmp_path / f"replies_{name}.json").write_text(json.dumps(replies | training | rest))
    flags = "--facts=4", "--config.memory.num_experts=4096", "--config.router.calibration_questions=64"
    result = helpers.call("experiments.retrieval_comparison", f"--workdir={tmp_path}", *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert not (tmp_path / "lora").exists() and (tmp_path / "figures.png").stat().st_size > 10_000
    models = ["lora", "lora + refusal", "mome", "mome + refusal"]
    others = ["facts", "mome + known experts", "facts + refusal"]
    assert sorted(found["systems"]) == sorted([*comparison.RETRIEVAL, *models, *others])
    assert found["systems"]["mome"]["sets"]["unknown"]["wrong"] == 4
    assert found["systems"]["mome + refusal"]["sets"]["unknown"]["none"] == 4
    assert found["systems"]["mome + known experts"]["sets"]["unknown"]["none"] == 4
    assert found["systems"]["mome + known experts"]["sets"]["verbatim"]["exact"] == 4
    assert found["systems"]["b_tree"]["sets"]["typos"]["none"] == 4
    assert "\nreproduced: Memory experts return the facts" in result.stdout and "bm25 " in result.stdout
