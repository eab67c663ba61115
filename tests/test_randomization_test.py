"""The random-answer study judges by what it measured, and each of its verdicts can fail."""

from experiments import randomization_test
from experiments.shared.random_answer_runs import RUNS

WHOLE, PARTLY, NEVER = "reproduced", "reproduced in part", "not reproduced"


def run(**changes):
    counts = {"certificates": {"certified": 9, "certified_but_wrong": 0}, "epochs_to_full_recall": 20}
    return {"final_loss": 0.01, "recall": 1.0, "heldout_accuracy": 0.9, **counts, **changes}


def verdicts(**changed):
    runs = dict.fromkeys(RUNS, run()) | {name.replace("__", "/"): one for name, one in changed.items()}
    results = {"runs": runs, "backbone": {"heldout_accuracy": 0.9, "heldout_interval": (0.85, 0.95)}}
    return [claim.verdict for claim in randomization_test.claims(results)]


def test_verdicts_follow_the_measurements():
    assert verdicts() == [WHOLE] * 4
    # Another curve; then neither a loss near zero nor an epoch at which all are recalled.
    assert verdicts(lora__random=run(epochs_to_full_recall=39))[0] == PARTLY
    assert verdicts(lora__random=run(recall=0.9, epochs_to_full_recall=None))[0] == NEVER
    assert verdicts(mome_o_proj__random=run(epochs_to_full_recall=26))[1] == PARTLY
    assert verdicts(mome_o_proj__random=run(recall=0.99, epochs_to_full_recall=None))[1] == NEVER
    assert verdicts(lora__random=run(heldout_accuracy=0.0))[2] == PARTLY
    assert verdicts(lora__true=run(heldout_accuracy=0.0))[2] == WHOLE  # its answers are not random
    wrong = {"certified": 9, "certified_but_wrong": 1}
    assert verdicts(mome_down_proj__true=run(certificates=wrong))[3] == NEVER
