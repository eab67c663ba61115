"""The study of a living memory: its questions, its thresholds, what it keeps when it is killed, and what it judges."""

import dataclasses
import json
import subprocess
import types
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

from experiments import editing, editing_judging, editing_memory, editing_page, editing_questions, editing_rivals
from experiments.editing_judging import Found
from experiments.editing_questions import NO_FACT, Row
from experiments.shared import study
from lamini_jax import UserError, api
from lamini_jax.backbone import answering
from lamini_jax.config import tiny
from lamini_jax.training import FullMethod, LoraMethod, dense_methods

ROWS = editing_questions.generated(12, 0)


def test_a_threshold_lets_no_more_through_than_it_says():
    rng = np.random.default_rng(0)
    for size in (1, 7, 100, 1000):
        scores = rng.integers(0, size // 2 + 1, size) / 4  # with ties
        for rate in (0, *editing_judging.RATES, 0.5, 1):
            least = editing_judging.threshold_at(scores, rate)
            assert (scores > least).sum() <= rate * size
            lower = np.unique(scores)[np.unique(scores) < least]
            if lower.size:  # the next threshold below lets more through
                assert (scores > lower[-1]).sum() > rate * size
    assert editing_judging.threshold_at([], 0.01) == -np.inf
    assert editing_judging.threshold_at([3.0, 3.0, 3.0], 0.4) == 3.0


def test_recall_at_a_rate_counts_what_is_above_its_threshold_and_right():
    others = list(range(100))
    asked, right = [100.0, 97.0, 97.0, 94.0], [True, True, False, True]
    found = editing_judging.recall_at(others, asked, right)
    assert found == {
        "0.05": [True, True, False, False],
        "0.01": [True, False, False, False],
        "0.001": [True, False, False, False],
    }
    assert editing_judging.recall_at([], asked, right) == {}
    points = editing_judging.curve(others, asked, right)
    assert points[0] == [0.0, 0.25] and points[-1] == [0.2, 0.75]
    assert [0.05, 0.5] in points and points == sorted(points)


def test_shares_have_wilsons_intervals():
    found = editing_judging.with_intervals({"a": [True, False], "b": {"c": [True] * 10, "d": []}})
    assert found["a"] == 0.5 and found["b"] == {"c": 1.0, "d": None}
    assert found["intervals"]["b"]["c"][0] == pytest.approx(0.7225, abs=1e-4) and found["intervals"]["b"]["d"] is None


def test_a_typo_is_one_edit_of_a_longer_word():
    rng = np.random.default_rng(0)
    text = "Who is the mayor of Rome?"
    found = {editing_questions.typo(rng, text) for _ in range(300)}
    assert text not in found and len(found) > 50
    assert all(one.startswith("Who is the ") and abs(len(one) - len(text)) <= 1 for one in found)
    assert {len(one) - len(text) for one in found} == {-1, 0, 1}
    assert editing_questions.typo(rng, "Is it so?") == "Is it so?"


def test_generated_questions():
    assert len({row.question for row in ROWS}) == 12
    for row in ROWS:
        name = row.question.removeprefix("What is the phone number of ")[:-1]
        assert name in row.rephrased[0] and row.answer.isdecimal()
        assert all(other.split()[-2] == name.split()[0] and other != row.question for other in row.others)
    asked = editing_questions.asked("phone_book", ROWS, {"unrelated": [ROWS[0].question, "Who?"]}, 0)
    assert asked.strangers["unrelated"] == ["Who?"] and asked.near == "others"
    assert all(0 <= fact < 12 for pairs in asked.about.values() for _, fact in pairs)
    few = asked.sample(3, facts=6)
    assert len(few.facts) == 6 and [fact for _, fact in few.about["verbatim"]] == [0, 2, 5]
    assert len(few.about["typo1"]) == 1
    assert few.fingerprint != asked.fingerprint == editing_questions.asked(*_parts(asked)).fingerprint


def _parts(asked):
    return asked.name, asked.facts, {"unrelated": asked.strangers["unrelated"]}, 0


def test_a_file_of_facts(tmp_path):
    path, tokenizer = tmp_path / "mine.jsonl", helpers.TOKENIZER
    lines = [
        {"question": "Who?", "answer": "Ada", "rephrased": ["Which one?", "x" * 300], "others": ["Who?", "Whose?"]},
        {"question": "Where?", "answer": "y" * 300},
        {"question": "When?", "answer": "now"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = editing_questions.read(str(path), tokenizer, 256)
    assert rows == [Row("Who?", "Ada", ("Which one?",), ("Who?", "Whose?")), Row("When?", "now")]
    (asked,) = editing_questions.load(tiny(), tokenizer, [], str(path), [2])
    assert asked.name == "mine" and asked.strangers["others"] == ["Whose?"] and asked.strangers["unrelated"]
    with pytest.raises(UserError, match="--counts=3: mine has 2 facts"):
        editing_questions.load(tiny(), tokenizer, [], str(path), [3])
    with pytest.raises(UserError, match=r"editing/zsre\.jsonl as --config\.data\.dir"):
        editing_questions.load(tiny(), tokenizer, ["zsre"], None, [3])
    path.write_text('{"question": "Who?", "answer": "Ada", "others": "Whose?"}')
    with pytest.raises(UserError, match="row 1: needs"):
        editing_questions.read(str(path), tokenizer, 256)


def test_strangers_are_taken_from_the_files_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(editing_questions, "UNRELATED", 3)

    def strangers():
        config = helpers.replace(tiny(), data={"dir": str(tmp_path)})
        (asked,) = editing_questions.load(config, helpers.TOKENIZER, [], None, [2])
        return {kind: texts for kind, texts in asked.strangers.items() if kind != "others"}

    generated = strangers()
    assert list(generated) == ["unrelated"] and len(generated["unrelated"]) == 3
    (tmp_path / "editing").mkdir()
    lines = [json.dumps({"question": f"who is number {number}", "answer": "me"}) + "\n" for number in range(5)]
    (tmp_path / "editing" / "nq_open.jsonl").write_text("".join(lines))
    found = strangers()
    assert list(found) == ["unrelated"] and len(found["unrelated"]) == 3 and found == strangers()
    assert all(text.startswith("who is number ") for text in found["unrelated"])


def test_everything_is_asked_at_ten_moments_at_most():
    def moments(batches):
        return [number for number in range(batches) if editing_memory.asks_after(number, batches)]

    assert moments(1) == [0] and moments(10) == list(range(10))
    assert len(moments(100)) == 10 and moments(100)[-1] == 99 and moments(13)[-1] == 12


def test_a_change_gives_a_fact_the_answer_of_another():
    rows = [Row(str(i), answer) for i, answer in enumerate("aabca")]
    assert editing_memory.changes(rows, 9) == [(0, "b"), (1, "b"), (2, "c"), (3, "a"), (4, "b")]
    assert len(editing_memory.changes(rows, 2)) == 2 and editing_memory.changes(rows[:2], 9) == []


def test_a_fingerprint_sees_every_bit():
    state = {"rows": np.zeros((2, 3), np.float32), "ids": np.array(["a", "bc"], object)}
    first = editing_memory.fingerprint(state)
    assert first == editing_memory.fingerprint({name: array.copy() for name, array in state.items()})
    for name, other in {
        "rows": np.array([[0, 0, 0], [0, 0, -0.0]], np.float32),
        "ids": np.array(["a", "bd"], object),
    }.items():
        changed = editing_memory.fingerprint(state | {name: other})
        assert {key for key in state if changed[key] != first[key]} == {name}


class Scripted:
    """A system that finds what it is told to; it answers with the fact's answer, or not at all."""

    def __init__(self, facts, found, fires=None):
        self.facts, self.found, self.fires = facts, found, fires

    def find(self, questions):
        pairs = [self.found[text] for text in questions]
        fires = None if self.fires is None else np.array([score > self.fires for _, score in pairs])
        return Found(np.array([fact for fact, _ in pairs]), np.array([score for _, score in pairs]), fires)

    def answer(self, questions, index_Q):
        return ["" if fact == NO_FACT else self.facts[fact].answer for fact in index_Q]


def test_a_system_is_judged_by_what_it_finds_and_says():
    facts = [Row("a", "1", ("A",), ("x", "y")), Row("b", "2", ("B",))]
    asked = editing_questions.asked("set", facts, {"unrelated": ["u"]}, 0)
    asked = dataclasses.replace(asked, about={k: asked.about[k] for k in ("verbatim", "rephrased")})
    found = {"a": (0, 9.0), "b": (0, 8.0), "A": (0, 5.0), "B": (1, 3.0), "x": (0, 4.0), "y": (1, 1.0), "u": (0, 6.0)}
    judged = editing_judging.judge(Scripted(facts, found), asked)  # works at the threshold 4
    assert judged["false_fires"] == {"others": 0.0, "unrelated": 1.0}
    assert judged["verbatim"] == 0.5 and judged["rephrased"] == 0.5 and judged["wrong_fact"] == 0.25
    assert judged["contained"] == {"verbatim": 0.5, "rephrased": 0.5}
    assert judged["recall_at"] == {"0.05": 0.5, "0.01": 0.5, "0.001": 0.5}
    assert judged["asked"] == {"verbatim": 2, "rephrased": 2, "others": 2, "unrelated": 1}
    own = editing_judging.judge(Scripted(facts, found, fires=2.0), asked, {"verbatim": ["1", "2"]})
    assert own["verbatim"] == own["rephrased"] == 1.0 and own["recall_at"] == judged["recall_at"]
    assert own["false_fires"] == {"others": 0.5, "unrelated": 1.0}
    alone = editing_judging.judge_model(lambda texts: ["It is 1."] * len(texts), asked)
    assert alone["rephrased"] == 0 and alone["contained"]["rephrased"] == 0.5


def test_lexical_search_and_the_last_token_find_what_was_stored(model):
    texts = [row.question for row in ROWS]
    for find in (
        editing_rivals.tfidf(ROWS, "word"),
        editing_rivals.tfidf(ROWS, "char_wb"),
        editing_rivals.last_token(model, ROWS),
    ):
        found = find(texts)
        assert found.index_Q.tolist() == list(range(12)) and found.fires_Q is None
        assert (found.score_Q >= find(["something else"]).score_Q).all()


def test_the_fact_is_put_before_the_question(model):
    prompted = editing_rivals.Prompted(model, ROWS)
    assert prompted.prompt("Who?", NO_FACT) == "Who?"
    assert prompted.prompt("Who?", 1) == f"Q: {ROWS[1].question}\nA: {ROWS[1].answer}\n\nQ: Who?\nA:"
    assert prompted.answer(["Who?"], [NO_FACT]) == answering.answers(model, answering.BARE, ["Who?"], 32)


@pytest.mark.parametrize("method", [LoraMethod, FullMethod])
def test_a_model_tuned_on_all_facts(model, tmp_path, method):
    asked = editing_questions.asked("set", ROWS[:3], {"unrelated": ["Who is it?"]}, 0)
    backbone = editing_rivals.Prompted(model, asked.facts)
    result = editing_rivals.dense(method.create, helpers.CONFIG, backbone, asked, tmp_path / "dense")
    assert result["count"] == 3 and 0 < result["epochs"] <= helpers.CONFIG.tuning.epochs
    assert set(result["unchanged"]) == {"others", "unrelated"} == set(result["intervals"]["unchanged"])
    assert not (tmp_path / "dense").exists()
    json.dumps(result, allow_nan=False)


def test_logits_are_compared_bit_by_bit(model):
    texts = ["Who is it?", "Where is a longer one of them?"]
    assert editing_memory.same_logits(model, answering.BARE, texts) == [True, True]
    changed = answering.same_for_all(suffix=_adapter(model))
    assert editing_memory.same_logits(model, changed, texts) == [False, False]


def _adapter(model):
    fresh = dense_methods.adapters(model.decoder, 2, jax.random.key(0))["suffix"]
    return jax.tree.map(lambda x: x + 0.1, fresh)


class Toy:
    """A memory's interface over a dict: facts fire for questions that begin as theirs do."""

    def __init__(self, directory: Path, model):
        self._path, self.model, self.adapter_fn = directory / "facts.json", model, answering.BARE

    def facts(self):
        stored = json.loads(self._path.read_text()) if self._path.exists() else {}
        return [types.SimpleNamespace(id=f"id {q}", question=q, answer=a, shared=0) for q, a in stored.items()]

    def _write(self, facts):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(facts))

    def _stored(self):
        return {fact.question: fact.answer for fact in self.facts()}

    def add(self, facts):
        new = [fact for fact in facts if fact["question"] not in self._stored()]
        self._write(self._stored() | {fact["question"]: fact["answer"] for fact in facts})
        return types.SimpleNamespace(added=len(new), holding=len(self._stored()), seconds=0.5)

    change = add

    def forget(self, ids):
        self._write({q: a for q, a in self._stored().items() if f"id {q}" not in ids})

    def state(self):
        return {"facts": np.array(sorted(self._stored().items()), object)}

    def find(self, texts):
        stored = list(self._stored())
        found = []
        for text in texts:
            same = [sum(a == b for a, b in zip(text, question, strict=False)) for question in stored]
            best = stored[int(np.argmax(same))]
            score = max(same) / len(text)
            found.append(
                types.SimpleNamespace(fact=f"id {best}" if score > 0.9 else None, best=f"id {best}", score=score)
            )
        return found

    def ask(self, texts, max_new_tokens=32):
        return self.ask_about(texts, [found.fact for found in self.find(texts)])

    def ask_about(self, texts, facts, max_new_tokens=32):
        stored = {f"id {q}": a for q, a in self._stored().items()}
        return [types.SimpleNamespace(text=stored.get(id, "no idea"), probability=0.5, fact=id) for id in facts]

    def bare(self):
        return types.SimpleNamespace(ask=lambda texts, tokens: self.ask_about(texts, [None] * len(texts)))


DENSE = {"verbatim": 1.0, "rephrased": 0.5, "typo1": 0.5, "typo2": 0.25, "count": 9, "epochs": 3, "seconds": 1.0}


DENSE_RIVALS = "lora", "full"
RIVALS = (
    "bare tfidf_words_prompt tfidf_letters_prompt tfidf_words_experts tfidf_letters_experts grace_experts lora full"
).split()


def keep(directory: Path, rivals=DENSE_RIVALS) -> None:
    """What a study keeps of rivals that it has measured."""
    directory.mkdir(parents=True)
    for name in rivals:
        kept = {**DENSE, "unchanged": {"others": 0.0}, "intervals": {}}
        (directory / f"rival_{name}.json").write_text(json.dumps(kept))


@pytest.fixture
def toy(monkeypatch, model):
    """The toy in place of a memory; the list gets the number of facts of each addition."""
    added = []

    def tune(facts, directory, config):
        added.append(len(facts))
        Toy(directory, model).add(facts)
        return types.SimpleNamespace(facts=len(facts), holding=len(facts), seconds=2.0)

    add = Toy.add
    monkeypatch.setattr(Toy, "add", lambda self, facts: added.append(len(facts)) or add(self, facts))
    monkeypatch.setattr(api, "tune", tune)
    monkeypatch.setattr(api, "load", lambda directory: Toy(directory, model))
    monkeypatch.setattr(editing.frozen_model, "load", lambda config: model)
    monkeypatch.setattr(editing_memory, "TIMED", 2)
    monkeypatch.setattr(editing_questions, "SAMPLED", 2)
    return added


def arguments(workdir: Path) -> study.Arguments:
    values = {"counts": ["12"], "sets": [], "facts": None, "batch": 3}
    config = helpers.replace(helpers.CONFIG, backbone={"max_seq_len": 256}, router={"kind": "facts"})
    return study.Arguments(config, str(workdir), types.SimpleNamespace(**values), [])


def test_a_life_from_the_first_batch_to_the_last_change(toy, tmp_path, capsys):
    workdir = tmp_path / "study"
    keep(workdir / "phone_book")
    editing.main(arguments(workdir))
    results = json.loads((workdir / "results.json").read_text())
    own = results["sets"]["phone_book"]
    assert own["count"] == 12 and own["verbatim"] == own["first_batch_after_last"] == 1
    assert own["unfired_bitwise"] == own["unfired_answers"] == 1
    assert own["recall_as_it_grows"] == [[3, 1], [6, 1], [9, 1], [12, 1]]
    assert own["forgotten"]["count"] == 6 and own["forgotten"]["equal"] == own["forgotten"]["state"] == 1
    assert own["changed"]["count"] == 6 and own["changed"]["new"] == 1 and own["changed"]["old"] == 0
    assert own["seconds_per_fact"] == pytest.approx(1.5 / 9) and own["seconds_creating"] == 2
    assert set(own["recall_at"]) == set(editing_page.RATES) and own["bytes_per_fact"] > 10
    assert list(results["rivals"]["phone_book"]) == RIVALS
    assert results["rivals"]["phone_book"]["tfidf_letters_experts"]["curve"]
    shown = capsys.readouterr().out
    assert "phone_book, part 1 of 17: batch_0" in shown and "lora (9 facts)" in shown
    assert (workdir / "figures.png").stat().st_size > 10_000
    # Started again, it measures nothing: the same results, and no fact is added.
    before, results_before = len(toy), {**results, "command": ""}
    editing.main(arguments(workdir))
    assert len(toy) == before
    assert {**json.loads((workdir / "results.json").read_text()), "command": ""} == results_before


@pytest.mark.parametrize("killed_in", ["grow", "judge", "forget", "change"])
def test_a_killed_life_goes_on(toy, tmp_path, monkeypatch, killed_in):
    """A part that was killed after it had done its work on the memory is done again, with the same results."""
    workdirs = [tmp_path / name for name in ("whole", "killed")]
    for workdir in workdirs:
        keep(workdir / "phone_book", RIVALS)
    editing.main(arguments(workdirs[0]))
    home = editing_judging if killed_in == "judge" else editing_memory
    whole, calls = getattr(home, killed_in), []

    def killed(*given):
        result = whole(*given)
        calls.append(given)
        if len(calls) == (2 if killed_in == "grow" else 1):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(home, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            editing.main(arguments(workdirs[1]))
    assert not (workdirs[1] / "results.json").exists()
    editing.main(arguments(workdirs[1]))
    one, other = (json.loads((workdir / "results.json").read_text())["sets"] for workdir in workdirs)
    timed = {name for name in one["phone_book"] if "seconds" in name or "latency" in name}
    for found in (one, other):
        for name in timed:
            del found["phone_book"][name]
    assert one == other


def judged(**more):
    """The results of a memory that does all that is claimed, unless told otherwise."""
    life = {"recall_as_it_grows": [[5, 1.0]], "first_batch_after_last": 1.0, "holding": 5, "sharing": 0}
    costs = {"seconds_per_fact": 0.5, "bytes_per_fact": 100.0, "seconds_creating": 3.0}
    costs |= {"latency_ratio": 1.1, "latency_ratio_looked": None, "unfired_bitwise": 1.0, "unfired_answers": 1.0}
    right = {"verbatim": 1.0, "rephrased": 0.8, "typo1": 0.9, "typo2": 0.7, "wrong_fact": 0.0}
    right |= {"recall_at": {"0.05": 0.9, "0.01": 0.8, "0.001": 0.5}, "false_fires": {"others": 0.01}}
    edits = {"forgotten": {"count": 2, "equal": 1.0, "state": 1.0}, "changed": {"count": 2, "new": 1.0, "old": 0.0}}
    intervals = {"intervals": {"false_fires": {"others": [0.004, 0.02]}}}
    own = {"count": 5, **life, **costs, **right, **edits, **intervals} | more
    return {"sets": {"zsre": own}, "rivals": {"zsre": {"bare": {"rephrased": 0.1, "verbatim": 0.0}, "lora": DENSE}}}


@pytest.mark.parametrize(
    "more, failed",
    [
        ({}, 0),
        ({"recall_at": {"0.01": 0.1}}, 1),
        ({"intervals": {"false_fires": {"others": [0.02, 0.04]}}, "unfired_bitwise": 0.99}, 2),
        ({"forgotten": None, "unfired_answers": 0.9}, 2),
        ({"forgotten": {"count": 2, "equal": 1.0, "state": 0.9}, "changed": {"count": 2, "new": 1.0, "old": 0.5}}, 2),
    ],
)
def test_the_verdict_follows_from_what_was_measured(more, failed):
    results = judged(**more)
    (claim,) = editing_page.claims(results)
    assert len(claim.failed) == failed and "zsre: 100.0% of 5 stored questions" in str(claim)
    shown = editing_page.table(results)
    assert "zsre, 5 facts" in shown and "lora (9 facts)" in shown and "bare" in shown


# With a hundred questions that ask for no fact instead of a thousand.
FEWER = "from experiments import editing_questions; editing_questions.UNRELATED = 100"


def test_a_real_memory_lives(tmp_path):
    workdir = tmp_path / "study"
    keep(workdir / "phone_book")
    flags = "--counts=4", "--batch=2", "--config.memory.top_k=2"
    command = [*helpers.changed("experiments.editing", FEWER), f"--workdir={workdir}", *flags]
    result = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    own = json.loads((workdir / "results.json").read_text())["sets"]["phone_book"]
    assert own["verbatim"] == own["first_batch_after_last"] == 1
    assert own["unfired_bitwise"] == own["unfired_answers"] == 1
    assert own["holding"] == 4 and own["sharing"] == 0
    assert own["forgotten"]["equal"] == own["forgotten"]["state"] == 1
    assert own["changed"]["new"] == 1 and own["changed"]["old"] == 0
