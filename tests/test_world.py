"""The generated world: the same for everyone, true, and with questions that training never shows."""

import itertools
import re

import numpy as np
import pytest

from lamini_jax.data import world

RULES = [kind for kind in world.KINDS if kind != "vocabulary"]
SYMMETRIC = ("add", "larger", "smallest", "same_kind", "odd_one_out", "sort_letters")


def stream(count, seed):
    return list(itertools.islice(world.training_stream(seed), count))


@pytest.fixture(scope="module")
def training():
    return stream(20_000, seed=0)


@pytest.fixture(scope="module")
def held_out():
    return {kind: world.held_out(kind, 300, 0) for kind in RULES}


def combination(qa):
    """What a question is about, whatever its phrasing; read off its text alone."""
    if qa.kind in SYMMETRIC:
        return qa.kind, tuple(sorted(re.findall(r"\w+", qa.question)))
    if qa.kind == "owner":  # whichever of the two is asked about
        return qa.kind, qa.question.split(".")[0]
    if qa.kind == "tallest":  # whichever pair comes first
        return qa.kind, tuple(sorted(re.findall(r"\w+ is taller than \w+", qa.question)))
    return qa.kind, qa.question


def test_a_function_of_the_seed(training):
    assert stream(2000, seed=0) == training[:2000] != stream(2000, seed=1)
    assert world.held_out("owner", 20, 0) != world.held_out("owner", 20, 1)
    assert world.once(20, 0) != world.once(20, 1)


@pytest.mark.parametrize("kind", RULES)
def test_held_out_is_a_prefix_of_more(kind, held_out):
    assert world.held_out(kind, 7, 0) == held_out[kind][:7]
    questions = [qa.question for qa in held_out[kind]]
    assert len(set(questions)) == len(questions) > 7
    assert {qa.kind for qa in held_out[kind]} == {kind}


def test_held_out_combinations_never_occur_in_training(training, held_out):
    """Not in another phrasing either, nor those of other seeds."""
    trained = {combination(qa) for qa in training}
    for kind, qas in held_out.items():
        more = world.held_out(kind, 100, 1)
        assert not {combination(qa) for qa in qas + more} & trained
    assert {qa.kind for qa in training} == set(world.KINDS)


def test_the_split_is_a_function_of_the_combination(training):
    for qa in training:
        numbers = [int(n) for n in re.findall(r"\d+", qa.question)]
        if qa.kind in ("add", "larger"):
            assert not world.is_held_out(qa.kind, (min(numbers), max(numbers)))
        elif qa.kind in ("parity", "successor", "in_words"):
            assert not world.is_held_out(qa.kind, numbers[0])
    assert world.held_out("vocabulary", 10, 0) == []
    share = np.mean([world.is_held_out("parity", n) for n in range(10_000)])
    assert share == pytest.approx(1 / 8, abs=0.01)


def test_facts_to_be_seen_once_are_unique(training):
    facts = world.once(1000, 0)
    assert len({qa.question for qa in facts}) == len({qa.answer for qa in facts}) == 1000
    assert world.once(10, 0) == facts[:10]
    assert all(re.fullmatch(r"[A-Z0-9]{6}", qa.answer) for qa in facts)
    assert not {qa.question for qa in facts} & {qa.question for qa in training}


@pytest.mark.parametrize(
    "number, words",
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (42, "forty-two"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (219, "two hundred and nineteen"),
        (570, "five hundred and seventy"),
        (999, "nine hundred and ninety-nine"),
    ],
)
def test_number_words(number, words):
    assert world.number_words(number) == words


def test_number_words_are_unique():
    assert len({world.number_words(n) for n in range(1000)}) == 1000


def kind_of(word):
    (kind,) = [kind for kind, (members, _) in world.NATURE.items() if word in members]
    return kind


def kind_with(name):
    (kind,) = [kind for kind, (_, names) in world.NATURE.items() if name in names]
    return kind


def compared(a, b):
    return f"{a} and {b}, " + ("yes" if a == b else "no")


def answer_to(kind, question):
    """The answer, found anew from the question's text."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    words = re.findall(r"[A-Za-z]+", question)
    if kind == "odd_one_out":
        kinds = [kind_of(word) for word in words[-3:]]
        odd = next(word for word, k in zip(words[-3:], kinds, strict=True) if kinds.count(k) == 1)
        return f"{', '.join(kinds)}: {odd}"
    if kind == "owner":
        return f"the {words[words.index(words[-1]) + 3]} {words[-3]}"
    if kind == "tallest":
        pairs = re.findall(r"(\w+) is taller than (\w+)", question)
        return ({taller for taller, _ in pairs} - {smaller for _, smaller in pairs}).pop()
    return {
        "add": lambda: str(numbers[0] + numbers[1]),
        "subtract": lambda: str(numbers[0] - numbers[1]),
        "larger": lambda: str(sorted(numbers)[1]),
        "smallest": lambda: str(sorted(numbers)[0]),
        "parity": lambda: ("even", "odd")[numbers[0] & 1],
        "successor": lambda: str(numbers[0] + 1),
        "sequence": lambda: str(2 * numbers[2] - numbers[1]),
        "vocabulary": lambda: kind_of(words[-1]) if words[1] == "is" else kind_with(words[-1]),
        "is_a": lambda: kind_of(words[1]) + (", yes" if kind_of(words[1]) == words[-1] else ", no"),
        "has": lambda: compared(kind_of(words[1]), kind_with(words[-1])),
        "same_kind": lambda: compared(kind_of(words[1]), kind_of(words[3])),
        "reverse": lambda: "".join(reversed(words[1])),
        "spell": lambda: "-".join(words[1]),
        "first_letter": lambda: words[-1][:1],
        "last_letter": lambda: words[-1][-1:],
        "contains": lambda: "yes" if words[4] in words[-1] else "no",
        "join": lambda: words[1] + words[3],
        "swap": lambda: f"{words[3]} and {words[1]}",
        "sort_letters": lambda: ", ".join(sorted(words[1:4])),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    "add subtract larger smallest parity successor sequence is_a has same_kind odd_one_out owner tallest reverse spell "
    "first_letter last_letter contains join swap sort_letters".split(),
)
def test_answers_are_true(kind, held_out):
    for qa in held_out[kind]:
        assert qa.answer == answer_to(kind, qa.question), qa


def test_words_mean_what_training_says(training):
    meanings = {qa.question: qa.answer for qa in training if qa.kind == "vocabulary"}
    assert len(meanings) > 0.8 * (len(world.MEMBERS) + len(world.PROPERTIES))
    for question, answer in meanings.items():
        assert answer == answer_to("vocabulary", question)


def test_yes_and_no_are_both_common(training):
    for kind in ("is_a", "has", "same_kind", "contains"):
        share = np.mean([qa.answer.endswith("yes") for qa in training if qa.kind == kind])
        assert 0.3 < share < 0.7, kind


def test_fact_kinds_are_kinds():
    assert set(world.FACT_KINDS) < set(world.KINDS)
