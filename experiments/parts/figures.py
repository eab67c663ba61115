"""The pictures of the experiments, and the paper's points that are laid over them."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the backend that needs no screen)

# Read off the paper's figures: epoch -> loss. Its model is Llama 3 8B, so that the shape compares and not the height.
PAPER = {
    "Figure 1": {
        "true": {10: 0.85, 20: 0.40, 30: 0.11, 40: 0.075, 60: 0.055, 80: 0.05, 100: 0.04},
        "random": {10: 0.71, 20: 0.38, 30: 0.14, 40: 0.065, 60: 0.05, 80: 0.045, 100: 0.035},
    },
    "Figure 5": {
        "true": {10: 11, 20: 5.6, 30: 3.0, 40: 1.3, 50: 0.5, 60: 0.25, 80: 0.05, 100: 0.02},
        "random": {10: 11, 20: 6.0, 30: 2.8, 40: 1.1, 50: 0.5, 60: 0.25, 80: 0.05, 100: 0.02},
    },
}
COLOURS = {"true": "tab:blue", "random": "tab:orange"}


def randomization(results: dict, path: Path) -> None:
    """Loss against epoch: LoRA as in Figure 1, memory experts as in Figure 5, the paper's points beside each."""
    panels = {"Figure 1": ("LoRA", ["lora"]), "Figure 5": ("memory experts", ["mome_down_proj", "mome_o_proj"])}
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    for axis, (title, (label, methods)) in zip(axes, panels.items(), strict=True):
        for answers, colour in COLOURS.items():
            for method, style in zip(methods, ("-", "--"), strict=False):
                losses = results["runs"][f"{method}/{answers}"]["loss"]
                name = method.removeprefix("mome_") if len(methods) > 1 else label
                axis.plot(range(1, len(losses) + 1), losses, style, color=colour, label=f"{name}, {answers} answers")
            points = PAPER[title][answers]
            marker = {"true": "o", "random": "^"}[answers]
            axis.plot(
                list(points), list(points.values()), marker, color=colour, mfc="none", label=f"paper, {answers} answers"
            )
        axis.set(title=f"{title}: {label}", xlabel="epoch", ylabel="loss (nats per answer token)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(methods) + 1)
    facts, memory = results["facts"], results["memory"]
    figure.suptitle(
        f"{facts['count']} facts memorized, {memory['selected']} of {memory['num_experts']:,} experts each "
        "(the paper's points: Llama 3 8B)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def capacity(results: dict, path: Path) -> None:
    """Recall against load, bits against trained parameters, and epochs against load."""
    cells = results["cells"]
    series = {}
    for cell in cells:
        own = cell["num_experts"] == max(other["num_experts"] for other in cells)
        name = "dense LoRA" if cell["rank"] else f"{cell['target']}, K = {cell['selected']}"
        series.setdefault(f"{name}, more facts" if own else name, []).append(cell)
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    for (name, group), marker in zip(series.items(), "os^Dvx*", strict=False):
        if not group[0]["rank"]:
            group = sorted(group, key=lambda cell: cell["load"])
            loads = [cell["load"] for cell in group]
            axes[0].plot(loads, [100 * cell["recall"] for cell in group], f"{marker}-", mfc="none", label=name)
            axes[2].plot(loads, [cell["epochs"] for cell in group], f"{marker}-", mfc="none", label=name)
        else:
            axes[0].plot([], [])
            axes[2].plot([], [])
        trained = [cell["trained_parameters"] for cell in group]
        axes[1].plot(trained, [cell["bits_per_parameter"] for cell in group], marker, mfc="none", label=name)
    needed = results["paper_arithmetic"]["needed_bits_per_trained_parameter"]
    lines = {**results["published_bits_per_parameter"], "1B facts in 2B parameters need": needed}
    for (name, bits), style in zip(lines.items(), ("k:", "k-.", "r--"), strict=True):
        axes[1].plot(axes[1].get_xlim(), (bits, bits), style, label=f"{name}: {bits:.3g}")
    axes[0].set(title="Facts recalled", xlabel="load F*K/N", ylabel="%", xscale="log", ylim=(-3, 103))
    axes[1].set(xlabel="trained parameters", ylabel="bits recalled per trained parameter", xscale="log", yscale="log")
    axes[1].set(title="Capacity")
    axes[2].set(title="Epochs until all facts hold, or the budget", xlabel="load F*K/N", xscale="log", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in (axes[0], axes[2]):
        axis.axvline(1, color="grey", linewidth=0.8)
    figure.suptitle("Entries of a phone book, 33.2 random bits each")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def router_training(results: dict, path: Path) -> None:
    """Certified facts and loss against epoch, and how the selections spread."""
    found, memory = results["routers"], results["memory"]
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    for name, run in found.items():
        epochs = range(1, run["epochs"] + 1)
        axes[0].plot(epochs, [100 * share for share in run["certified"]], label=name)
        axes[1].plot(epochs, run["loss"], label=name)
    axes[0].set(title="Facts certified, with the experts that they select then", xlabel="epoch", ylabel="%")
    axes[1].set(title="Loss", xlabel="epoch", ylabel="nats per answer token", yscale="log")
    places = range(len(found))
    axes[2].bar(places, [run["experts_used"] for run in found.values()], color="lightgrey", label="experts used")
    axes[2].axhline(results["facts"]["count"] * memory["selected"], color="grey", ls=":", label="if no two facts share")
    axes[2].set(title="Selection", ylabel="experts used", xticks=list(places), xticklabels=list(found), yscale="log")
    overlap = axes[2].twinx()
    overlap.plot(places, [run["nearest_overlap"] for run in found.values()], "ro", label="overlap with the nearest")
    overlap.set(ylim=(0, 1.05), ylabel="share of experts in common")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    bars, points = axes[2].get_legend_handles_labels(), overlap.get_legend_handles_labels()
    axes[2].legend(bars[0] + points[0], bars[1] + points[1], fontsize="small", loc="center right")
    figure.suptitle(
        f"{results['facts']['count']} facts with random answers, "
        f"{memory['selected']} of {memory['num_experts']:,} experts each"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def routing_throughput(rows: list[dict], path: Path) -> None:
    """Queries per second against N, one panel per batch, with the ceiling of the flat lookups."""
    batches = sorted({row["batch"] for row in rows})
    names = [name for name in dict.fromkeys(row["lookup"] for row in rows) if name != "gather"]
    figure, axes = plt.subplots(1, len(batches), figsize=(5 * len(batches), 5), squeeze=False, layout="constrained")
    for axis, batch in zip(axes[0], batches, strict=True):
        for name in names:
            points = [row for row in rows if row["batch"] == batch and row["lookup"] == name]
            style = {"matmul_max": "k:", "exact": "o-", "product": "s-", "approximate": "^-"}.get(name, "x--")
            label = "ceiling: matmul and max" if name == "matmul_max" else name
            numbers = [row["num_experts"] for row in points], [row["queries_per_second"] for row in points]
            axis.plot(*numbers, style, label=label)
        axis.set(title=f"batch {batch}", xlabel="experts N", ylabel="queries/s", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"top {rows[0]['selected']} of N keys of width {rows[0]['key_width']}, {rows[0]['device']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def retrieval_comparison(results: dict, path: Path) -> None:
    """What becomes of the questions of each kind, system by system; then time per question and bytes per fact."""
    systems = results["systems"]
    names, kinds = list(systems), list(results["examples"])
    places = range(len(names))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), sharey=True, layout="constrained")
    for axis, kind in zip(axes[:, :2].flat, kinds, strict=True):
        left = [0.0] * len(names)
        for outcome, colour in (("exact", "tab:green"), ("none", "lightgrey"), ("wrong", "tab:red")):
            counts = [systems[name]["sets"][kind] for name in names]
            shares = [100 * count[outcome] / count["questions"] for count in counts]
            label = {"none": "no answer"}.get(outcome, outcome)
            axis.barh(places, shares, left=left, color=colour, label=label)
            left = [start + width for start, width in zip(left, shares, strict=True)]
        axis.set(title=f"{kind}: {results['examples'][kind]}", xlabel="% of questions", xlim=(0, 100))
        axis.title.set_fontsize("medium")
    for axis, key, factor, title in (
        (axes[0][2], "latency_seconds", 1e3, "milliseconds per question"),
        (axes[1][2], "bytes_per_fact", 1, "bytes per fact"),
    ):
        bars = axis.barh(places, [factor * systems[name][key] for name in names], color="tab:blue")
        axis.bar_label(bars, fmt=lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}", padding=3)
        axis.set(title=title, xscale="log")
        axis.margins(x=0.25)
    axes[0][0].set_yticks(places, names)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{results['facts']} entries of a phone book, stored and tuned")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compute_requirements(results: dict, path: Path) -> None:
    """The paper's numbers against ours; then what a fact costs in a step, here and beside Llama 3 8B."""
    colours = {"reproduced": "tab:green", "reproduced in part": "tab:orange", "not reproduced": "tab:red"}
    figure, axes = plt.subplots(1, 3, figsize=(17, 5), width_ratios=(2, 1, 1), layout="constrained")
    compared = results["paper"]
    places = range(len(compared))
    for place, one in zip(places, compared, strict=True):
        colour = colours[one["claim"]["verdict"]]
        axes[0].plot([1, one["ratio"]], [place, place], "-", color=colour)
        axes[0].plot(one["ratio"], place, "o", color=colour, markersize=9)
        axes[0].annotate(f"{one['ratio']:.3g}", (one["ratio"], place), (8, 6), textcoords="offset points")
    axes[0].axvline(1, color="black", linewidth=1)
    axes[0].set_yticks(places, [one["quantity"].partition(" (")[0] for one in compared])
    axes[0].set(title="the paper's numbers: ours over theirs", xscale="log")
    axes[0].margins(x=0.25)
    axes[0].invert_yaxis()
    for verdict, colour in colours.items():
        axes[0].plot([], [], "o", color=colour, label=verdict)
    axes[0].legend(loc="lower right", fontsize="small")
    steps, llama = results["steps"]["methods"], results["llama3_8b"]
    names = list(steps)
    for axis, values, title in (
        (axes[1], [1e3 * steps[name]["seconds"] for name in names], "ms per fact and step, measured"),
        (axes[2], [llama[name]["flops"] / 1e12 for name in names], "TFLOP per fact, Llama 3 8B"),
    ):
        bars = axis.bar(names, values, color="tab:blue")
        axis.bar_label(bars, [f"{value:,.3g}" for value in values])
        axis.set(title=title)
        axis.margins(y=0.1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def regularization(results: dict, path: Path) -> None:
    """Accuracy of the backbone and after each run, one panel per test, with 95% intervals."""
    names, tests = list(results["runs"]), results["runs"]["backbone"]["tests"]
    colours = ["tab:gray", *(COLOURS[name.split("/")[1]] for name in names[1:])]
    figure, axes = plt.subplots(
        1, len(tests), figsize=(9 + 4 * (len(tests) - 1), 5), squeeze=False, layout="constrained"
    )
    for axis, (test, start) in zip(axes[0], tests.items(), strict=True):
        found = [results["runs"][name]["tests"][test] for name in names]
        accuracies = np.array([one["accuracy"] for one in found])
        low, high = np.array([one["interval"] for one in found]).T
        axis.bar(names, accuracies, yerr=[accuracies - low, high - accuracies], color=colours, capsize=4)
        axis.axhspan(*start["interval"], color="tab:gray", alpha=0.15)
        axis.set(ylim=(0, 1.02), title=f"{test}: {start['questions']:,} questions")
        axis.tick_params(axis="x", labelrotation=90 if len(tests) > 1 else 20)
    axes[0][0].set_ylabel("share answered right")
    figure.suptitle("Questions that nothing was tuned on, before and after memorizing (Table 1)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
