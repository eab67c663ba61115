"""What a model answers: in the order of the questions, given prompts alone, right or wrong to the character."""

from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest

from lamini_jax import bank, recall, runs
from lamini_jax.data.facts import Fact
from lamini_jax.data.world import QA

TOKENIZER = helpers.TOKENIZER
# 140 questions in three buckets, mixed, more than a batch in the first.
QUESTIONS = [f"{i}?" + "q" * (0, 3, 70, 20, 150)[i % 5] for i in range(140)]


# As much of a base as those need who only ask.
ASKING = SimpleNamespace(tokenizer=TOKENIZER, decoder=SimpleNamespace(config=helpers.BACKBONE))


class Parrot:
    """Answers a question with the question itself and something more; remembers what it was given."""

    def __init__(self, more=""):
        self.more, self.given = more, []

    def __call__(self, prompt_BT, length_B, longest):
        prompt_BT, length_B = np.asarray(prompt_BT), np.asarray(length_B)
        self.given.append((prompt_BT, length_B, longest))
        answer_BA = np.full((len(prompt_BT), 400), TOKENIZER.stop_id, np.int32)
        for answer_A, prompt_T, length in zip(answer_BA, prompt_BT, length_B, strict=True):
            tokens = [*prompt_T[1 : length - 1], *TOKENIZER.encode(self.more)][:longest]
            answer_A[: len(tokens)] = tokens
        return answer_BA


def test_answers_come_in_the_order_of_the_questions():
    assert recall.answers(ASKING, Parrot("!"), QUESTIONS, longest=300) == [question + "!" for question in QUESTIONS]
    assert recall.answers(ASKING, Parrot(), ["é?", "", "é?"], longest=9) == ["é?", "", "é?"]
    assert recall.answers(ASKING, Parrot(), QUESTIONS, longest=2) == [question[:2] for question in QUESTIONS]


def test_shapes_are_few():
    parrot = Parrot()
    recall.answers(ASKING, parrot, QUESTIONS)
    assert {prompt_BT.shape for prompt_BT, _, _ in parrot.given} == {(64, 64), (28, 128), (28, 256)}
    assert {longest for _, _, longest in parrot.given} == {helpers.BACKBONE.context}


def test_only_prompts_reach_the_speaker():
    """Whoever measures knows the answers; whoever answers is not told."""
    facts = [Fact("", question, f"secret {i}") for i, question in enumerate(QUESTIONS)]
    qas = [QA("", fact.question, fact.answer) for fact in facts]
    for measure in (
        lambda speak: recall.accuracy(ASKING, speak, qas),
        lambda speak: runs.recalled(ASKING, speak, facts),
    ):
        parrot, seen = Parrot(), set()
        measure(parrot)
        for prompt_BT, length_B, _ in parrot.given:
            for prompt_T, length in zip(prompt_BT.tolist(), length_B, strict=True):
                assert set(prompt_T[length:]) <= {TOKENIZER.pad_id}
                seen.add(tuple(prompt_T[:length]))
        assert seen == {tuple(TOKENIZER.prompt(question)) for question in QUESTIONS}


def test_accuracy_is_exact():
    """A right beginning is wrong, an answer that goes on too."""
    answers = ["ab", "abc", "a", "AB", "ab ", ""]
    assert recall.accuracy(ASKING, Parrot(), [QA("", "ab", answer) for answer in answers]) == [True] + [False] * 5
    assert recall.accuracy(ASKING, Parrot("x"), [QA("", "ab", "ab"), QA("", "ab", "abx")]) == [False, True]
    # Also where decoding is cut off right after the longest of the right answers.
    assert recall.accuracy(ASKING, Parrot("x" * 50), [QA("", "ab", "ab"), QA("", "abc", "ab")]) == [False, False]


def test_recalled_is_exact():
    facts = [Fact("", "ab", "ab"), Fact("", "é", "e"), Fact("", "ef", "ef")]
    exact_F, generated = runs.recalled(ASKING, Parrot(), facts)
    assert exact_F.tolist() == [True, False, True]
    assert generated == ["ab", "é", "ef"]


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (0, 1, 0, 0.7935),
    ],
)
def test_wilson(successes, trials, low, high):
    assert recall.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert recall.wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_asking_again_compiles_nothing(base, routing, caplog):
    """Tuning asks in its loop, each time with a speaker of the rows as they are then."""
    questions = [fact.question for fact in helpers.FACTS]
    shape = bank.row_shape(helpers.BACKBONE, helpers.CONFIG.memory)
    fetch = jax.jit(bank.gather)

    def ask(seed):
        rows_NR = np.random.default_rng(seed).normal(size=(4096, shape.floats)).astype(np.float32)
        rows_NR = helpers.parts(rows_NR, shape)
        speak = recall.with_memory(base, routing, lambda ids_BK: fetch(rows_NR, ids_BK), helpers.CONFIG.memory)
        return recall.answers(base, speak, questions)

    with jax.log_compiles():
        first = ask(0)
        compiled = len(helpers.compilations(caplog))
        assert ask(1) != first
    assert len(helpers.compilations(caplog)) == compiled > 0
