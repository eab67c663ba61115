"""What a model answers: in the order of the questions, given prompts alone, right or wrong to the character."""

from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest

from lamini_jax.backbone import answering
from lamini_jax.data.facts import Fact
from lamini_jax.data.world import QA
from lamini_jax.evaluation import intervals, recall
from lamini_jax.memory import experts, storage

TOKENIZER = helpers.TOKENIZER
# 140 questions in three buckets, mixed, more than a batch in the first.
QUESTIONS = [f"{i}?" + "q" * (0, 3, 70, 20, 150)[i % 5] for i in range(140)]


# As much of a model as asking needs.
ASKING = SimpleNamespace(reading_batch=64, tokenizer=TOKENIZER, max_seq_len=helpers.BACKBONE.max_seq_len)


class Parrot:
    """Decodes a question to the question itself and something more; remembers what it was given."""

    def __init__(self, more=""):
        self.more, self.given = more, []

    def __call__(self, model, prompt_BT, length_B, max_new_tokens, adapters, sampling):
        self.given.append((prompt_BT, length_B, max_new_tokens))
        answer_BA = np.full((len(prompt_BT), 400), TOKENIZER.stop_id, np.int32)
        for answer_A, prompt_T, length in zip(answer_BA, prompt_BT, length_B, strict=True):
            tokens = [*prompt_T[1 : length - 1], *TOKENIZER.encode(self.more)][:max_new_tokens]
            answer_A[: len(tokens)] = tokens
        return answer_BA, np.ones(len(prompt_BT))


@pytest.fixture
def parrot(monkeypatch):
    """Makes a parrot decode from now on."""

    def use(more=""):
        bird = Parrot(more)
        monkeypatch.setattr(answering.decoding, "generate", bird)
        return bird

    return use


def answers(questions, max_new_tokens=None):
    return answering.answers(ASKING, answering.BARE, questions, max_new_tokens)


def test_answers_come_in_the_order_of_the_questions(parrot):
    parrot("!")
    assert answering.answers(ASKING, answering.BARE, QUESTIONS, max_new_tokens=300) == [
        question + "!" for question in QUESTIONS
    ]
    parrot()
    assert answering.answers(ASKING, answering.BARE, ["é?", "", "é?"], max_new_tokens=9) == ["é?", "", "é?"]
    assert answering.answers(ASKING, answering.BARE, QUESTIONS, max_new_tokens=2) == [
        question[:2] for question in QUESTIONS
    ]


def test_shapes_are_few(parrot):
    bird = parrot()
    answers(QUESTIONS)
    assert {prompt_BT.shape for prompt_BT, _, _ in bird.given} == {(64, 32), (28, 128), (28, 256)}
    assert {max_new_tokens for _, _, max_new_tokens in bird.given} == {helpers.BACKBONE.max_seq_len}


def test_only_prompts_reach_decoding(parrot):
    """Whoever measures knows the answers; whoever answers is not told."""
    facts = [Fact("", question, f"secret {i}") for i, question in enumerate(QUESTIONS)]
    qas = [QA("", fact.question, fact.answer) for fact in facts]
    for measure in (
        lambda adapter_fn: recall.accuracy(ASKING, adapter_fn, qas),
        lambda adapter_fn: recall.recalled(ASKING, adapter_fn, facts),
    ):
        bird, adapted_to, seen = parrot(), [], set()

        def adapter_fn(*prompts, adapted_to=adapted_to):
            adapted_to.append(prompts)
            return answering.BARE(*prompts)

        measure(adapter_fn)
        assert len(adapted_to) == len(bird.given)
        for given, (prompt_BT, length_B, _) in zip(adapted_to, bird.given, strict=True):
            assert given[0] is prompt_BT
            for prompt_T, length in zip(prompt_BT.tolist(), length_B, strict=True):
                assert set(prompt_T[length:]) <= {TOKENIZER.pad_id}
                seen.add(tuple(prompt_T[:length]))
        assert seen == {tuple(TOKENIZER.prompt(question)) for question in QUESTIONS}


def test_accuracy_is_exact(parrot):
    """A right beginning is wrong, an answer that goes on too."""
    judged = ["ab", "abc", "a", "AB", "ab ", ""]
    parrot()
    assert recall.accuracy(ASKING, answering.BARE, [QA("", "ab", answer) for answer in judged]) == [True] + [False] * 5
    parrot("x")
    assert recall.accuracy(ASKING, answering.BARE, [QA("", "ab", "ab"), QA("", "ab", "abx")]) == [False, True]
    # Also where decoding is cut off right after the longest of the right answers.
    parrot("x" * 50)
    assert recall.accuracy(ASKING, answering.BARE, [QA("", "ab", "ab"), QA("", "abc", "ab")]) == [False, False]


def test_recalled_is_exact(parrot):
    parrot()
    facts = [Fact("", "ab", "ab"), Fact("", "é", "e"), Fact("", "ef", "ef")]
    exact_F, generated = recall.recalled(ASKING, answering.BARE, facts)
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
    assert intervals.wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert intervals.wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_asking_again_compiles_nothing(model, router, caplog):
    """Tuning asks in its loop, each time with the rows as they are then."""
    questions = [fact.question for fact in helpers.FACTS]
    shape = experts.expert_shape(helpers.BACKBONE, helpers.CONFIG.memory)
    fetch = jax.jit(experts.gather)

    def ask(seed):
        experts_NR = np.random.default_rng(seed).normal(size=(4096, shape.floats)).astype(np.float32)
        experts_NR = helpers.parts(experts_NR, shape)
        adapter_fn = storage.with_experts(model, router, lambda ids_BK: fetch(experts_NR, ids_BK), helpers.CONFIG)
        return answering.answers(model, adapter_fn, questions)

    with jax.log_compiles():
        first = ask(0)
        compiled = len(helpers.compilations(caplog))
        assert ask(1) != first
    assert len(helpers.compilations(caplog)) == compiled > 0
