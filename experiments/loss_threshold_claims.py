"""The analysis of the losses that `loss_threshold` measured, and the paper's claims that it judges."""

import numpy as np

from experiments.shared.claims import Claim
from lamini_jax.config import CERTIFIED_LOSS
from lamini_jax.evaluation import intervals

SAMPLES = 32  # of each fact, at each stage
# No samples are drawn of facts less likely than this: hardly a single right one would be expected.
LEAST_LIKELY = 1e-3
SAMPLING_BINS = (LEAST_LIKELY, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98, 1.0)
LOSS_BINS = (0.0, 0.1, 0.35, CERTIFIED_LOSS, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, np.inf)
MEDIUM = 1.75  # nats per token, at which pretraining ends in the paper (Figure 2)


def threshold(measured: list[dict], certified_loss: float) -> dict:
    """Recall against loss, over all facts at all stages."""
    worst_X, mean_X, recalled_X = (
        np.concatenate([stage[name] for stage in measured]) for name in ("worst", "mean", "recalled")
    )
    certified_X, bin_X = worst_X < certified_loss, np.digitize(worst_X, LOSS_BINS) - 1

    def best_split(loss_X):
        """The loss that separates recalled facts from wrong ones with the fewest errors."""
        order_X = np.argsort(loss_X)
        wrong_X = ~recalled_X[order_X]
        errors_X = np.concatenate([[0], np.cumsum(wrong_X)]) + np.concatenate([np.cumsum(~wrong_X[::-1])[::-1], [0]])
        return float(loss_X[order_X[max(int(errors_X.argmin()) - 1, 0)]])

    return {
        "measured": int(recalled_X.size),
        "certified": int(certified_X.sum()),
        "certified_but_wrong": int((certified_X & ~recalled_X).sum()),
        "wrong_with_mean_below_ln2": int((~recalled_X & (mean_X < CERTIFIED_LOSS)).sum()),
        "worst_loss_at_which_recall_sets_in": best_split(worst_X),
        "mean_loss_at_which_recall_sets_in": best_split(mean_X),
        "by_worst_loss": [
            {"from": low, "facts": int((bin_X == i).sum()), "recalled": int(recalled_X[bin_X == i].sum())}
            for i, low in enumerate(LOSS_BINS[:-1])
        ],
    }


def calibration(measured: list[dict]) -> dict:
    """Sampled recall against exp(-summed loss): in bins, and the deviation from it in standard errors."""
    drawn = [entry for stage in measured for entry in stage["sampled"]]
    probability_X = np.array([entry["probability"] for entry in drawn])
    hits_X = np.array([entry["hits"] for entry in drawn])

    def compared(chosen_X):
        expected, count = SAMPLES * probability_X[chosen_X].sum(), int(hits_X[chosen_X].sum())
        spread = (SAMPLES * (probability_X * (1 - probability_X))[chosen_X].sum()) ** 0.5
        trials = SAMPLES * int(chosen_X.sum())
        return {
            "samples": trials,
            "expected": expected / trials,
            "observed": count / trials,
            "interval": intervals.wilson(count, trials),
            "standard_errors": float((count - expected) / max(spread, 0.5)),  # half a sample, where none can fail
        }

    if not drawn:
        return {"samples": 0, "bins": []}
    bins_X = np.clip(np.digitize(probability_X, SAMPLING_BINS), 1, len(SAMPLING_BINS) - 1)
    whole = compared(np.ones(len(drawn), bool))
    return whole | {"bins": [compared(bins_X == i) for i in np.unique(bins_X)]}


def three_levels(measured: list[dict]) -> dict[str, dict]:
    """The first fact's distributions before tuning, nearest to the loss at which pretraining ends, and at the end."""
    high, *later = (stage["next_tokens"] | {"epoch": stage["epoch"]} for stage in measured)
    return {"high": high, "medium": min(later, key=lambda entry: abs(entry["loss"] - MEDIUM)), "zero": later[-1]}


def claims(results: dict) -> list[Claim]:
    """The paper's claims, each with the conditions that decide."""
    levels, once = results["next_tokens"], results["once"]
    judged = [_never_hallucinated(results["threshold"]), _three_levels(**levels)]
    if results["sampling"]["samples"]:
        judged.append(_sampling(results["sampling"]))
    if "unseen" in once:
        judged.append(_read_once(once["before"], once["unseen"], once["after"]))
    else:
        judged.append(_believed(once["before"], once["after"]))
    return judged


def _never_hallucinated(counts: dict) -> Claim:
    return Claim(
        "A fact whose training loss is low enough is never hallucinated (the paper's thesis; made exact: every "
        "token below ln 2)",
        f"{counts['certified']} of {counts['measured']} measurements of a fact certified, of which "
        f"{counts['certified_but_wrong']} were not recalled. Recall sets in where the worst token costs about "
        f"{counts['worst_loss_at_which_recall_sets_in']:.2f} nats, or the mean one "
        f"{counts['mean_loss_at_which_recall_sets_in']:.3f}; a mean below ln 2 certifies nothing: "
        f"{counts['wrong_with_mean_below_ln2']} that had it were wrong",
        {
            "some facts are certified, and all of those recalled": (
                counts["certified"] > 0 and counts["certified_but_wrong"] == 0
            )
        },
    )


def _three_levels(high: dict, medium: dict, zero: dict) -> Claim:
    return Claim(
        "High loss: any token; medium loss: similar tokens, so hallucination; zero loss: the right token alone "
        "(Figure 3)",
        f"One fact at {high['loss']:.2f}, {medium['loss']:.2f} and {zero['loss']:.4f} nats per token wavers "
        f"between {high['choices']:.1f}, {medium['choices']:.1f} and {zero['choices']:.2f} tokens, with "
        f"{100 * high['similar']:.0f}%, {100 * medium['similar']:.0f}% and {100 * zero['similar']:.0f}% on symbols "
        "of the answer",
        {
            "more tokens are open at a high loss than at a medium one": high["choices"] > medium["choices"],
            "at a medium loss several are open, more of them similar ones than at a high loss": (
                medium["choices"] > 2 and medium["similar"] > high["similar"]
            ),
            "at a loss of zero a single one is open": zero["choices"] < 1.1,
        },
    )


def _sampling(drawn: dict) -> Claim:
    worst = max(abs(entry["standard_errors"]) for entry in drawn["bins"])
    return Claim(
        "Tokens are drawn from what the loss leaves open, so that loss decides how often an answer is right "
        "(Figure 3; made exact: with probability exp(-summed loss) at temperature 1)",
        f"{drawn['samples']} samples, {100 * drawn['observed']:.1f}% right where "
        f"{100 * drawn['expected']:.1f}% were expected, {drawn['standard_errors']:+.1f} standard errors; "
        f"at most {worst:.1f} in {len(drawn['bins'])} bins",
        {"at most 3 standard errors off, in each bin and in all": worst <= 3 and abs(drawn["standard_errors"]) <= 3},
    )


def _read_once(before: dict, unseen: dict, after: dict) -> Claim:
    low, high = before["heldout"]["interval"]
    return Claim(
        "One epoch of pretraining leaves a fact's loss far above zero, so that models hallucinate facts that "
        "they have seen; memory tuning removes that and leaves other answers alone (Figure 2, section 7)",
        f"{before['facts']} codes read once: {before['loss']:.2f} nats per token (never read: "
        f"{unseen['loss']:.2f}), {100 * before['recall']:.1f}% recalled, and "
        f"{100 * before['wrong_but_codes']:.0f}% of the wrong answers look like codes; after memory tuning "
        f"{100 * after['recall']:.1f}%. Held-out accuracy {100 * before['heldout']['accuracy']:.1f}% "
        f"[{100 * low:.1f}% to {100 * high:.1f}%], then {100 * after['heldout']['accuracy']:.1f}%",
        {
            "read once, codes cost more than 1 nat per token": before["loss"] > 1,
            "fewer than 5% of them are recalled": before["recall"] < 0.05,
            "all are recalled after memory tuning": after["recall"] == 1,
            "held-out accuracy is within the interval after it": low <= after["heldout"]["accuracy"] <= high,
        },
    )


def _believed(before: dict, after: dict) -> Claim:
    counted = "misbelieved" in before
    likelier = f"; of {before['misbelieved']} and {after['misbelieved']} a false answer is likelier" if counted else ""
    conditions = {
        "before, true answers cost more than 1 nat per token": before["loss"] > 1,
        "fewer than 5% of them are given": before["recall"] < 0.05,
        "all are given after memory tuning": after["recall"] == 1,
    }
    if counted:
        conditions["a false answer is likelier for some before, and for none after"] = (
            before["misbelieved"] > 0 and after["misbelieved"] == 0
        )
    return Claim(
        "Pretraining leaves a fact's loss far above zero, so that models hallucinate; memory tuning removes that "
        "(Figure 2, section 7)",
        f"True answers to {before['facts']} questions: {before['loss']:.2f} nats per token before and "
        f"{after['loss']:.4f} after memory tuning; {before['wrong']} and {after['wrong']} questions are answered in "
        f"other words than these{likelier}",
        conditions,
    )
