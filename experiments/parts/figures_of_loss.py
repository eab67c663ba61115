"""The pictures of what a loss means: `loss_threshold` and `selective_loss`."""

from pathlib import Path

import numpy as np

from experiments.parts.figures import plt
from experiments.parts.loss_claims import MEDIUM, SETS

PAPER_LEVELS = {"underfit": 13.2, "general": 1.4}  # nats per token that Figure 6 names
COLOURS = {"key": "tab:red", "other": "tab:orange", "text": "tab:blue", "heldout": "tab:green"}
FLOOR = 1e-5  # nats, below which a loss is drawn as this


def threshold(results: dict, path: Path) -> None:
    """Recall against loss, sampled against expected recall, codes read once, and Figure 3's three distributions."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 9.5), layout="constrained")
    _recall(axes[0][0], results)
    _calibration(axes[0][1], results["sampling"])
    _once(axes[0][2], results["once"])
    levels = results["next_tokens"]
    right_A = np.array(levels["medium"]["right"])
    place = int(np.abs(-np.log(np.maximum(right_A, 1e-30)) - MEDIUM).argmin())  # where the fact is as it is on average
    for axis, (name, level) in zip(axes[1], levels.items(), strict=True):
        _next_token(axis, f"{name} loss", level, place)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _recall(axis, results) -> None:
    """Every fact at every stage."""
    worst_X, mean_X, recalled_X = (
        np.concatenate([stage[name] for stage in results["stages"]]) for name in ("worst", "mean", "recalled")
    )
    for chosen_X, colour, label in ((~recalled_X, "tab:red", "wrong"), (recalled_X, "tab:green", "recalled")):
        x, y = np.maximum(worst_X[chosen_X], FLOOR), np.maximum(mean_X[chosen_X], FLOOR)
        axis.plot(x, y, ".", ms=4, alpha=0.5, color=colour, label=f"{label} ({chosen_X.sum()})")
    line = results["certified_loss"]
    axis.axvline(line, color="k", ls="--", label=f"certificate: worst token below {line:.3f}")
    axis.axhline(line, color="k", ls=":", label="the same as a mean, which certifies nothing")
    axis.set(title="greedy recall of each fact at each stage", xscale="log", yscale="log")
    axis.set(xlabel="loss of the worst token (nats)", ylabel="mean loss (nats per token)")
    axis.legend(fontsize="small")


def _calibration(axis, sampling) -> None:
    axis.plot([0, 1], [0, 1], "k:", label="exp(-summed loss)")
    for entry in sampling["bins"]:
        low, high = entry["interval"]
        axis.plot([entry["expected"]] * 2, [low, high], "-", color="tab:blue", alpha=0.6)
        axis.plot(entry["expected"], entry["observed"], "o", color="tab:blue")
    axis.set(title=f"sampled recall, {sampling['samples']} samples at temperature 1 (95% intervals)")
    axis.set(xlabel="expected share of right answers", ylabel="observed share")
    axis.legend(fontsize="small")


def _once(axis, once) -> None:
    read = "read once" if once["shown_in_pretraining"] else "never read"
    names = {"unseen": "never read", "before": read, "after": "after memory tuning"}
    bins = np.geomspace(1e-5, 20, 60)
    for name, label in names.items():
        entry, style = once[name], {"histtype": "step", "lw": 2} if name == "unseen" else {"alpha": 0.6}
        losses_F = np.clip(entry["losses"], bins[0], bins[-1])
        axis.hist(losses_F, bins, label=f"{label}: {100 * entry['recall']:.1f}% recalled", **style)
    axis.set(title=f"{once['before']['facts']} arbitrary codes", xscale="log", yscale="log", ylim=(0.8, None))
    axis.set(xlabel="mean loss (nats per token)", ylabel="facts")
    axis.legend(fontsize="small")


def _next_token(axis, title, level, place) -> None:
    tokens, shares = zip(*level["likeliest"][place], strict=True)
    tokens, shares = list(tokens), list(shares)
    right = level["tokens"][place]
    if right not in tokens:
        tokens[-1], shares[-1] = right, level["right"][place]
    colours = ["tab:green" if token == right else "tab:grey" for token in tokens]
    axis.bar(range(len(tokens)), shares, color=colours)
    axis.set_xticks(range(len(tokens)), tokens)
    axis.set(title=f"{title}, epoch {level['epoch']}: {level['loss']:.4f} nats per token", ylim=(0, 1))
    axis.set(xlabel=f"next token at place {place + 1} of the answer (green: the right one)", ylabel="probability")
    loss = -np.log(max(level["right"][place], 1e-30))
    axis.text(0.97, 0.95, f"loss here {loss:.3g} nats", ha="right", va="top", transform=axis.transAxes)


def selective(results: dict, path: Path) -> None:
    """Figure 6, measured: the loss of each example under each model, in order within each set."""
    figure, axes = plt.subplots(2, 2, figsize=(14, 9), sharex=True, sharey=True, layout="constrained")
    for axis, (name, entry) in zip(axes.flat, results["models"].items(), strict=True):
        start = 0
        for subset, colour in COLOURS.items():
            losses_F = np.sort(np.maximum(entry["losses"][subset], FLOOR))
            label = f"{SETS[subset]}: mean {np.mean(entry['losses'][subset]):.3g}"
            axis.plot(start + np.arange(len(losses_F)), losses_F, ".", ms=4, color=colour, label=label)
            start += len(losses_F)
        if name in PAPER_LEVELS:
            axis.axhline(PAPER_LEVELS[name], color="k", ls=":", label=f"paper: {PAPER_LEVELS[name]} everywhere")
        axis.set(title=f"{name}: {results['about'][name]}", yscale="log", ylim=(FLOOR / 100, None))  # the legend's room
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower center", ncols=2)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss (nats per answer token)")
    for axis in axes[1]:
        axis.set_xlabel("examples, in order of their loss within each set")
    figure.savefig(path, dpi=110)
    plt.close(figure)
