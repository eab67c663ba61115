"""What follows from measured losses, and what that says of the paper's claims: `loss_threshold`, `selective_loss`."""

import numpy as np

from experiments.parts.claims import claim
from lamini_jax import recall
from lamini_jax.config import CERTIFIED_LOSS

SAMPLES = 32  # of each fact, at each stage
# Of a fact less likely than this no sample is drawn: hardly one in all would be expected.
LEAST_LIKELY = 1e-3
SAMPLING_BINS = (LEAST_LIKELY, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98, 1.0)
LOSS_BINS = (0.0, 0.1, 0.35, CERTIFIED_LOSS, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, np.inf)
HIGH = 2.5  # nats per token, above which a loss is no longer medium
MEDIUM = 1.75  # nats per token, where the paper sees pretraining end (Figure 2)
NEAR_ZERO = 0.01  # nats per token
# Of `selective_loss`.
SETS = {"key": "key facts", "other": "other facts", "text": "training text", "heldout": "held-out text (eval)"}


def threshold(measured: list[dict], certified_loss: float) -> dict:
    """Recall against loss, over all facts at all stages."""
    worst_X, mean_X, tokens_X, recalled_X = (
        np.concatenate([stage[name] for stage in measured]) for name in ("worst", "mean", "tokens", "recalled")
    )
    certified_X = worst_X < certified_loss

    def by_bin(loss_X):
        bins = np.digitize(loss_X, LOSS_BINS) - 1
        return [
            {"from": low, "facts": int((bins == i).sum()), "recalled": int(recalled_X[bins == i].sum())}
            for i, low in enumerate(LOSS_BINS[:-1])
        ]

    def extreme(function, values_X):
        return float(function(values_X)) if values_X.size else None

    def best_split(loss_X):
        """The loss that tells recalled facts from wrong ones with the fewest errors."""
        order_X = np.argsort(loss_X)
        wrong_X = ~recalled_X[order_X]
        errors_X = np.concatenate([[0], np.cumsum(wrong_X)]) + np.concatenate([np.cumsum(~wrong_X[::-1])[::-1], [0]])
        return float(loss_X[order_X[max(int(errors_X.argmin()) - 1, 0)]])

    return {
        "measured": int(recalled_X.size),
        "certified": int(certified_X.sum()),
        "certified_but_wrong": int((certified_X & ~recalled_X).sum()),
        "recalled": int(recalled_X.sum()),
        "recalled_uncertified": int((recalled_X & ~certified_X).sum()),
        "wrong_with_mean_below_ln2": int((~recalled_X & (mean_X < CERTIFIED_LOSS)).sum()),
        "wrong_with_mean_below_ln2_over_tokens": int((~recalled_X & (mean_X * tokens_X < CERTIFIED_LOSS)).sum()),
        "largest_worst_loss_recalled": extreme(np.max, worst_X[recalled_X]),
        "smallest_worst_loss_wrong": extreme(np.min, worst_X[~recalled_X]),
        "largest_mean_loss_recalled": extreme(np.max, mean_X[recalled_X]),
        "smallest_mean_loss_wrong": extreme(np.min, mean_X[~recalled_X]),
        "worst_loss_at_which_recall_sets_in": best_split(worst_X),
        "mean_loss_at_which_recall_sets_in": best_split(mean_X),
        "by_worst_loss": by_bin(worst_X),
        "by_mean_loss": by_bin(mean_X),
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
            "interval": recall.wilson(count, trials),
            "standard_errors": float((count - expected) / max(spread, 0.5)),  # half a sample, where none can fail
        }

    if not drawn:
        return {"samples": 0, "bins": []}
    bins_X = np.clip(np.digitize(probability_X, SAMPLING_BINS), 1, len(SAMPLING_BINS) - 1)
    whole = compared(np.ones(len(drawn), bool))
    return whole | {"bins": [compared(bins_X == i) for i in np.unique(bins_X)]}


def three_levels(measured: list[dict]) -> dict[str, dict]:
    """The first fact's distributions before tuning, nearest to the loss at which pretraining ends, and at the end."""
    found = [stage["next_tokens"] | {"epoch": stage["epoch"]} for stage in measured]
    medium = min(found[1:], key=lambda entry: abs(entry["loss"] - MEDIUM))
    return {"high": found[0], "medium": medium, "zero": found[-1]}


def of_threshold(results: dict) -> list[dict[str, str]]:
    """The paper's claims, each with the rule that decides."""
    found, drawn, levels, once = (results[name] for name in ("threshold", "sampling", "next_tokens", "once"))
    high, medium, zero = (levels[name] for name in ("high", "medium", "zero"))
    before, unseen, after = once["before"], once["unseen"], once["after"]
    low, high_end = before["heldout"]["interval"]
    judged = [
        claim(
            "A fact whose training loss is low enough is never hallucinated (the paper's thesis; made exact: every "
            "token below ln 2).",
            f"{found['certified']} of {found['measured']} measurements of a fact certified, of which "
            f"{found['certified_but_wrong']} were not recalled. Recall sets in where the worst token costs about "
            f"{found['worst_loss_at_which_recall_sets_in']:.2f} nats, or the mean one "
            f"{found['mean_loss_at_which_recall_sets_in']:.3f}; a mean below ln 2 certifies nothing: "
            f"{found['wrong_with_mean_below_ln2']} that had it were wrong.",
            found["certified"] > 0 and found["certified_but_wrong"] == 0,
        ),
        claim(
            "High loss: any token; medium loss: similar tokens, so hallucination; zero loss: the right token alone "
            "(Figure 3).",
            f"One fact at {high['loss']:.2f}, {medium['loss']:.2f} and {zero['loss']:.4f} nats per token wavers "
            f"between {high['choices']:.1f}, {medium['choices']:.1f} and {zero['choices']:.2f} tokens, with "
            f"{100 * high['similar']:.0f}%, {100 * medium['similar']:.0f}% and {100 * zero['similar']:.0f}% on symbols "
            "of the answer.",
            high["choices"] > medium["choices"],
            medium["choices"] > 2 and medium["similar"] > high["similar"],
            zero["choices"] < 1.1,
        ),
    ]
    if drawn["samples"]:
        worst = max(abs(entry["standard_errors"]) for entry in drawn["bins"])
        judged.append(
            claim(
                "Tokens are drawn from what the loss leaves open, so that loss decides how often an answer is right "
                "(Figure 3; made exact: with probability exp(-summed loss) at temperature 1).",
                f"{drawn['samples']} samples, {100 * drawn['observed']:.1f}% right where "
                f"{100 * drawn['expected']:.1f}% were expected, {drawn['standard_errors']:+.1f} standard errors; "
                f"at most {worst:.1f} in {len(drawn['bins'])} bins.",
                worst <= 3 and abs(drawn["standard_errors"]) <= 3,
            )
        )
    if once["shown_in_pretraining"]:
        judged.append(
            claim(
                "One epoch of pretraining leaves a fact's loss far above zero, so that models hallucinate facts that "
                "they have seen; memory tuning removes that and leaves other answers alone (Figure 2, section 7).",
                f"{before['facts']} codes read once: {before['loss']:.2f} nats per token (never read: "
                f"{unseen['loss']:.2f}), {100 * before['recall']:.1f}% recalled, and "
                f"{100 * before['wrong_but_codes']:.0f}% of the wrong answers look like codes; after memory tuning "
                f"{100 * after['recall']:.1f}%. Held-out accuracy {100 * before['heldout']['accuracy']:.1f}% "
                f"[{100 * low:.1f}% to {100 * high_end:.1f}%], then {100 * after['heldout']['accuracy']:.1f}%.",
                before["loss"] > 1,
                before["recall"] < 0.05,
                after["recall"] == 1,
                low <= after["heldout"]["accuracy"] <= high_end,
            )
        )
    return judged


def of_selective(found: dict[str, dict]) -> list[dict[str, str]]:
    """What Figure 6 says of each model, with the rule that decides."""
    mean = {name: {subset: float(np.mean(entry["losses"][subset])) for subset in SETS} for name, entry in found.items()}
    general = mean["general"]

    def told(name):
        figures = ", ".join(f"{label} {mean[name][subset]:.4f}" for subset, label in SETS.items())
        accuracy = f"{100 * found[name]['heldout']['accuracy']:.1f}% of held-out questions answered"
        recalled = f"{100 * found[name]['recall']:.1f}% of the key facts recalled"
        return f"Nats per token, means of four sets: {figures}; {accuracy}, {recalled}."

    rest, low = ("other", "text", "heldout"), found["general"]["heldout"]["interval"][0]
    tuned, over = mean["memory_tuned"], mean["overfit"]
    return [
        claim(
            "An underfit model has a high loss on every example (Figure 6: 13.2).",
            told("underfit"),
            *(mean["underfit"][subset] > HIGH for subset in SETS),
        ),
        claim(
            "A general model has a medium loss on every example (Figure 6: about 1.4): it was never made to memorize.",
            told("general"),
            *(0.5 <= general[subset] <= HIGH for subset in SETS),
        ),
        claim(
            "An overfit model has a low loss on what it was trained on, and a bad eval loss (Figure 6).",
            told("overfit"),
            over["key"] < 2 * NEAR_ZERO,
            over["heldout"] > 2 * general["heldout"],
        ),
        claim(
            "A memory-tuned model has a low loss on the key facts and the general model's everywhere else (Figure 6).",
            told("memory_tuned"),
            tuned["key"] < NEAR_ZERO and found["memory_tuned"]["recall"] == 1,
            all(abs(tuned[subset] - general[subset]) <= 0.05 * general[subset] for subset in rest),
            found["memory_tuned"]["heldout"]["accuracy"] >= low,
        ),
    ]
