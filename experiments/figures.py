"""The pictures of the experiments, and the paper's points that are laid over them."""

from pathlib import Path

import matplotlib

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


def regularization(results: dict, path: Path) -> None:
    """Held-out accuracy of the backbone and after each run, with 95% intervals."""
    names = list(results["runs"])
    accuracies = [results["runs"][name]["accuracy"] for name in names]
    intervals = [results["runs"][name]["interval"] for name in names]
    errors = [[a - low for a, (low, _) in zip(accuracies, intervals, strict=True)]]
    errors.append([high - a for a, (_, high) in zip(accuracies, intervals, strict=True)])
    colours = ["tab:gray", *(COLOURS[name.split("/")[1]] for name in names[1:])]
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axis.bar(names, accuracies, yerr=errors, color=colours, capsize=4)
    axis.axhspan(*intervals[0], color="tab:gray", alpha=0.15)
    axis.set(ylabel="held-out questions answered exactly", ylim=(0, 1.02))
    axis.set_title(f"{results['questions']} held-out questions before and after memorizing (Table 1)")
    axis.tick_params(axis="x", labelrotation=20)
    figure.savefig(path, dpi=120)
    plt.close(figure)
