"""A memory of facts that come and go: the others stay bit for bit, and what is forgotten was never there."""

import dataclasses
import json
import os
import signal
import sqlite3

import helpers
import kinds
import numpy as np
import pytest
from helpers import CONFIG

from lamini_jax import edits
from lamini_jax.errors import UserError
from lamini_jax.fact_memory import FactMemory
from lamini_jax.memory import allocation, scope, store
from lamini_jax.memory.fact_table import FactTable

CONFIG = helpers.replace(
    CONFIG,
    memory={"num_experts": 4096, "top_k": 2, "dtype": "bfloat16"},
    router={"kind": "facts"},
    tuning={"epochs": 100},
)
FACTS = [{"question": fact.question, "answer": fact.answer} for fact in helpers.some_facts(12)]
OUTSIDE = ["Where does the ferry to Marstrand stop?", "Who?", "Name a river of the north, and another one."]


class WordJudge:
    """Scores a pair of questions by the share of words that they have in common: enough from 0.8 on."""

    identity = "words"

    def to_json(self):
        return self.identity

    def threshold(self, false_fires):
        return 0.8

    def scores(self, asked, candidates, cosine_K, statistics):
        def score(stored):
            x, y = set(asked.same.split()), set(stored.same.split())
            return np.inf if asked.same == stored.same else len(x & y) / len(x | y)

        return np.array([score(stored) for stored in candidates])


@pytest.fixture(scope="module", autouse=True)
def judged():
    with pytest.MonkeyPatch.context() as patch:
        width = CONFIG.backbone.embed_dim
        patch.setattr(scope, "load", lambda _: scope.Scope(WordJudge(), np.zeros(width), np.eye(width), 1))
        yield


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_model():
    return dataclasses.replace(helpers.make_model(CONFIG), fingerprint="weights")


@pytest.fixture(scope="module")
def memory(model, tmp_path_factory):
    """Eight facts, and four that came later."""
    memory = opened(model, tmp_path_factory.mktemp("memory") / "memory")
    memory.add(FACTS[:8])
    memory.before = everything(memory)
    change = memory.add(FACTS[8:])
    assert (change.facts, change.holding, change.added, change.recalled) == (12, 12, 4, 4)
    return memory


@pytest.fixture
def copied(memory, model, tmp_path):
    """A copy of it that may be changed."""
    memory.directory.joinpath("config.json").write_text("{}")
    memory.save(tmp_path / "copy")
    return opened(model, tmp_path / "copy")


def opened(model, directory):
    directory.mkdir(exist_ok=True, parents=True)
    return FactMemory(CONFIG, model, directory, create=True)


def everything(memory):
    """All that a memory has, as it would be read from its file: dates are of no account."""
    contents = memory.table.contents
    facts = [dataclasses.replace(fact, date="") for fact in contents.facts]
    return facts, [key.tobytes() for key in contents.keys], contents.rows


def said(memory, questions):
    return [(answer.text, answer.probability) for answer in memory.ask(questions, 8)]


def questions_of(facts):
    return [fact["question"] for fact in facts]


def test_what_is_added_leaves_the_others_bit_for_bit(memory):
    facts, keys, rows = everything(memory)
    assert (facts[:8], keys[:8]) == memory.before[:2]
    assert rows.items() >= memory.before[2].items() and len(rows) == 24
    assert [answer.text for answer in memory.ask(questions_of(FACTS))] == [fact["answer"] for fact in FACTS]
    assert all(answer.certified for answer in memory.ask(questions_of(FACTS)))


def test_a_memory_is_read_as_it_was_written(memory, model):
    again = opened(model, memory.directory)
    assert everything(again) == everything(memory)
    assert said(again, questions_of(FACTS)) == said(memory, questions_of(FACTS))


def test_outside_every_scope_the_backbone_is_alone(memory):
    """Bit for bit, whether other questions of the batch ask for facts or not."""
    bare = said(memory.bare(), OUTSIDE)
    assert said(memory, OUTSIDE) == bare and said(memory, [*questions_of(FACTS[:2]), *OUTSIDE])[2:] == bare
    refused = memory.ask([OUTSIDE[0], FACTS[0]["question"]], outside="refuse")
    assert [answer.text for answer in refused] == [None, FACTS[0]["answer"]]
    assert [answer.text for answer in memory.stream(OUTSIDE[0], outside="refuse")] == [None]


def test_forgotten_is_never_stored(copied, memory):
    """The memory after forgetting is what it was before the facts came; and so is the next one that is added."""
    assert copied.forget(questions=questions_of(FACTS[8:])).facts == 8
    assert everything(copied) == memory.before
    content = (copied.directory / store.NAME).read_bytes()
    assert not any(fact["answer"].encode() in content for fact in FACTS[8:])
    assert said(copied, questions_of(FACTS[8:])) == said(copied.bare(), questions_of(FACTS[8:]))
    assert said(copied, questions_of(FACTS[:8])) == said(memory, questions_of(FACTS[:8]))
    copied.add(FACTS[8:])
    assert everything(copied) == everything(memory)


def test_any_of_the_facts_may_be_forgotten(copied, memory, model):
    gone = [copied.facts()[i].id for i in (0, 5)]
    copied.forget(ids=gone)
    left = [fact for fact in memory.table.contents.facts if fact.id not in gone]
    assert copied.table.contents.facts == left == opened(model, copied.directory).table.contents.facts
    assert copied.table.contents.rows.keys() == {expert for fact in left for expert in fact.experts}
    assert all(memory.table.contents.rows[expert] == row for expert, row in copied.table.contents.rows.items())


def test_a_change_is_answered_and_the_old_answer_is_gone(copied, memory):
    change = copied.change([{"question": FACTS[3]["question"], "answer": "7Q"}])
    assert (change.changed, change.added, change.facts, change.recalled) == (1, 0, 12, 1)
    assert copied.ask(FACTS[3]["question"]).text == "7Q"
    others = questions_of(FACTS[:3] + FACTS[4:])
    assert said(copied, others) == said(memory, others)
    assert FACTS[3]["answer"].encode() not in (copied.directory / store.NAME).read_bytes()
    with pytest.raises(UserError, match="'Who\\?' is not in the memory"):
        copied.change([{"question": "Who?", "answer": "7Q"}])


def test_what_is_the_same_is_kept(copied, memory):
    plan = copied.plan([*FACTS[:3], {"question": "Who?", "answer": "Ida"}], replace=True)
    assert tuple(map(len, plan)) == (1, 0, 0, 3, 9)
    assert str(plan) == "1 new, 3 the same, 9 to forget"
    change = copied.add(FACTS)
    assert (change.same, change.asked, change.epochs) == (12, 0, 0) and everything(copied) == everything(memory)
    assert copied.failing() == []


def test_other_wordings_find_the_fact(copied):
    fact = {"question": "Who keeps bees?", "answer": "Ida", "also": ["The bees are kept by whom?"]}
    assert copied.add([fact]).recalled == 1
    answers = copied.ask([fact["question"], *fact["also"], "the bees are kept by whom"])
    assert [answer.text for answer in answers] == ["Ida"] * 3 and len({answer.fact for answer in answers}) == 1
    assert all(answer.certified for answer in answers)


def test_facts_that_cannot_be_told_apart_are_named(copied):
    """Both hold, in their own wordings."""
    pair = [close := "What is the code of box 001 now?", FACTS[1]["question"]]
    change = copied.add([{"question": close, "answer": "B7"}])
    assert change.conflicts == (tuple(sorted(found.fact for found in copied.find(pair))),)
    assert said(copied, [close, FACTS[1]["question"]])[0][0] == "B7"
    with pytest.raises(UserError, match="asks the same as"):
        copied.add([{"question": FACTS[1]["question"].lower(), "answer": "B8"}])
    with pytest.raises(UserError, match="has no words"):
        copied.add([{"question": "?!", "answer": "B8"}])


def test_equal_wordings_with_other_answers_are_refused(copied):
    """Also in one list, and for each of several facts that had one answer."""
    pair = [{"question": "Who keeps bees?", "answer": "Ida"}, {"question": "who keeps bees", "answer": "Ida"}]
    with pytest.raises(UserError, match="asks the same as"):
        copied.plan([pair[0], {**pair[1], "answer": "Ole"}])
    copied.add(pair)
    for fact in pair:
        with pytest.raises(UserError, match="asks the same as"):
            copied.plan([{**fact, "answer": "Ole"}])
    assert len(copied.plan([{**fact, "answer": "Ole"} for fact in pair]).changed) == 2


def test_a_full_memory_shares_experts_and_all_facts_hold(model, tmp_path):
    """The ledger says how many facts share one; who is hurt by a new fact is tuned again."""
    memory = opened(model, tmp_path / "full")
    memory.config = helpers.replace(memory.config, memory={"num_experts": 8})
    memory.table = FactTable.of(memory.config, model, memory.table.router.scope, memory.table.contents)
    memory.add(FACTS[:4])
    assert [fact.shared for fact in memory.facts()] == [0] * 4
    change = memory.add(FACTS[4:6])
    assert change.holding == 6 and [fact.shared for fact in memory.facts()] == [2, 2, 0, 0, 2, 2]
    assert memory.failing() == []


def test_least_loaded_experts_are_given_out():
    assert allocation.give_out(np.array([1, 0, 1, 0, 0, 0, 0, 0]), 2, 2).tolist() == [[1, 3], [4, 5]]
    assert allocation.give_out(np.array([1, 2, 1]), 2, 2).tolist() == [[0, 2], [0, 1]]
    assert allocation.give_out(np.zeros(2, int), 0, 2).shape == (0, 2)


def test_a_fact_that_does_not_hold_does_not_answer(model, tmp_path):
    """It stays in the memory, and is tuned further when it is added again."""
    memory = opened(model, tmp_path / "short")
    memory.config = helpers.replace(memory.config, tuning={"epochs": 1})
    memory.table = dataclasses.replace(memory.table, config=memory.config)
    change = memory.add(FACTS[:2])
    assert (change.facts, change.holding) == (2, 0) and not memory.facts()[0].certified
    assert said(memory, questions_of(FACTS[:2])) == said(memory.bare(), questions_of(FACTS[:2]))
    again = opened(model, tmp_path / "short")
    assert again.add(FACTS[:2]).holding == 2


def test_damage_is_noticed(copied, model):
    with sqlite3.connect(copied.directory / store.NAME) as connection:
        connection.execute("UPDATE facts SET answer = 'other' WHERE number = 2")
    with pytest.raises(UserError, match="is damaged"):
        opened(model, copied.directory)


def test_a_memory_that_somebody_else_has_changed_is_not_overwritten(copied, model):
    other = opened(model, copied.directory)
    other.forget(questions=questions_of(FACTS[:1]))
    with pytest.raises(UserError, match="changed by another process"):
        copied.forget(questions=questions_of(FACTS[1:2]))
    assert len(opened(model, copied.directory).facts()) == 11


FAILURES = {
    "memory.sqlite: cannot be written": {
        "full disk": ("PRAGMA max_page_count = 1", "the disk is full; nothing has changed"),
        "read-only": ("PRAGMA query_only = ON", "readonly database.; nothing has changed"),
    }
}


@pytest.mark.parametrize("pragma, words", kinds.cases(FAILURES))
def test_a_file_that_cannot_be_written(copied, model, memory, pragma, words):
    copied._store._connection.execute(pragma)
    large = store.StoredFact("0" * 16, "Who?", "x" * 100_000)
    with pytest.raises(UserError, match=words):
        copied._store.write([(large, np.zeros((1, CONFIG.backbone.embed_dim), np.float16))])
    assert everything(opened(model, copied.directory)) == everything(memory)


def test_facts_that_are_not_stored(copied):
    (fact,) = copied.facts("BOX 003")
    (answer,) = copied.ask_about(["Who?"], [fact.id])
    assert (answer.fact, answer.certified) == (fact.id, True)
    for ask in (lambda: copied.ask_about(["Who?"], ["x"]), lambda: copied.fact("x"), lambda: copied.forget(["x"])):
        with pytest.raises(UserError, match="the id x is not in the memory"):
            ask()
    assert len(copied.facts()) == 12


def test_of_another_backbone_or_judge(copied, model, monkeypatch):
    with pytest.raises(UserError, match="another backbone"):
        opened(dataclasses.replace(model, fingerprint="others"), copied.directory)
    monkeypatch.setattr(WordJudge, "identity", "letters")
    with pytest.raises(UserError, match="another judge"):
        opened(model, copied.directory)


def test_a_kill_while_writing_leaves_the_old_memory_or_the_new_one(copied, model, memory):
    """Wherever in the transaction it comes."""
    edit = edits.forgetting(copied.table, [copied.facts()[0].id])
    for statement in range(1, 12):
        pid = os.fork()
        if not pid:
            kill_at(statement, copied._store._connection)
            copied._write(edit)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found = opened(model, copied.directory)
        count = len(found.facts())
        assert count in (12, 11) and (os.WIFSIGNALED(status) or count == 11)
        if count == 11:
            assert not os.WIFSIGNALED(status) or statement > 3
            break
        assert everything(found) == everything(memory)
    assert count == 11


def kill_at(statement, connection):
    """Kills this process before so many statements of SQL."""
    counted = iter(range(1, 10**6))
    connection.set_trace_callback(lambda _: next(counted) == statement and os.kill(os.getpid(), signal.SIGKILL))


def test_searching(memory):
    assert [fact.question for fact in memory.facts("BOX 003")] == [FACTS[3]["question"]]
    assert json.dumps([vars(fact) for fact in memory.facts()])
