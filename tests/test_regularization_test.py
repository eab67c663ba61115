"""Table 1: what questions earn before and after is compared question by question."""

import pytest

from experiments import regularization_test
from experiments.shared.random_answer_runs import PAPER_RUNS as RUNS
from lamini_jax.backbone import answering
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.data.world import QA
from lamini_jax.evaluation import intervals


def test_counts_are_compared_by_the_exact_test():
    """Five lost and none won: 2 / 2^5. As many lost as won: no sign of a change, though all answers changed."""
    found = regularization_test.compared([True] * 6, [False] * 5 + [True])
    assert (found["lost"], found["won"], found["accuracy"]) == (5, 0, pytest.approx(1 / 6))
    assert found["p"] == pytest.approx(2 / 2**5) and found["interval"] == intervals.wilson(1, 6)
    swapped = regularization_test.compared([True, False] * 4, [False, True] * 4)
    assert (swapped["p"], swapped["changed"]) == (1, 1)
    assert regularization_test.compared([True, False], [True, False])["p"] == 1


def test_shares_are_compared_by_the_paired_test():
    """Differences of 0.1, 0.2 and 0.3: t = 0.2 / (0.1 / sqrt(3)) with two degrees of freedom, so p = 0.0742."""
    before, after = [0.2, 0.5, 0.6], [0.3, 0.7, 0.9]
    found = regularization_test.compared(before, after)
    assert (found["lost"], found["won"]) == (0, 3)
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)
    assert found["interval"] == intervals.normal(after) and found["changed"] == pytest.approx(0.2)
    assert regularization_test.compared(before[:1], after[:1])["p"] == 1  # one alone says nothing


def test_all_tests_judge_what_fits(model):
    item = MultipleChoice("s", "q?", "Q: q?\nA:", (" yes", " no"), (True, False))
    questions = [QA("sum", "2 + 2 =", "4")]
    found = regularization_test.judged(model, answering.BARE, questions, {"truthful_qa": [item], "mmlu": []})
    assert set(found) == {"heldout", "truthful_qa mc1", "truthful_qa mc2"}
    assert found["heldout"] == [False] and 0 < found["truthful_qa mc2"][0] < 1


def results(changed, exact=True):
    """Of six runs, one of which has changed this share of the answers."""
    same = {"accuracy": 0.9, "lost": 1, "won": 1, "p": 1.0, "changed": 0.02}
    runs = {name: {"tests": {"heldout": same}, "fact": {"exact": True}} for name in ("backbone", *RUNS)}
    runs["mome_o_proj/random"] = {"tests": {"heldout": same | {"changed": changed}}, "fact": {"exact": exact}}
    return {"runs": runs}


def test_verdicts_count_changed_answers():
    """A test that finds no significant change is no proof that answers barely change."""
    whole, partly = "reproduced", "reproduced in part"
    assert [claim.verdict for claim in regularization_test.claims(results(0.05))] == [whole] * 4
    assert [claim.verdict for claim in regularization_test.claims(results(0.06))] == [whole, partly, whole, whole]
    assert regularization_test.claims(results(0.0, exact=False))[-1].verdict == partly


def test_a_backbone_that_answers_nothing_has_nothing_to_lose():
    found = results(0.0)
    found["runs"]["backbone"] = {"tests": {"heldout": {"accuracy": 0.0, "lost": 0, "won": 0, "p": 1.0}}}
    assert regularization_test.claims(found) == regularization_test.claims(results(0.0))[-1:]


def test_the_table_shows_each_tuned_fact_once_with_what_all_methods_say():
    test = {"accuracy": 0.9, "interval": (0.8, 1.0), "questions": 9, "lost": 1, "won": 1, "p": 1.0}
    runs = {name: {"tests": {"heldout": test}, "samples": ["42"]} for name in ("backbone", *RUNS)}
    for name in RUNS:
        runs[name]["fact"] = {"question": "Who?", "answer": name.split("/")[1], "generated": f"said by {name}"}
    text = regularization_test.table({"runs": runs, "samples": [{"question": "What?", "answer": "42"}]})
    assert text.count("Who?  (tuned: true)") == text.count("Who?  (tuned: random)") == 1
    assert all(f"said by {name}" in text for name in RUNS)
    assert text.count("What?  (right: 42)") == 1 and "90.0% [80.0% to 100.0%]" in text


def test_an_answer_is_one_line():
    assert (
        regularization_test.shown("a\nb") == "a b"
        and regularization_test.shown("x" * 500) == "x" * 70 + " ... (500 characters)"
    )
