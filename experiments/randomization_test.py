"""The paper's random-answer study: Figures 1 and 5, and the first part of Table 1.

    python -m experiments.randomization_test --workdir=runs/randomization_test

The same facts are memorized eight times: by LoRA, by memory experts on the attention's output projection, by memory
experts on the MLP's and by such that act on the answer's tokens alone, each with true answers and with answers of 32
random letters and digits. Then every fact is asked for, by free-running greedy decoding, and so are questions that no
run was tuned on: `heldout`, of kinds that no fact belongs to, and `neighbour`, of the facts' own kinds; beside a real
language model TruthfulQA and MMLU, by likelihood. `unchanged` are answers equal to the backbone's, word for word. A
killed study continues where it was stopped.

Takes 2.5 minutes on 2 x86-64 cores (jax 0.10.2). Expect every run to recall all 128 facts (random answers:
LoRA at epoch 41, `o_proj` at 40, `down_proj` at 28, 25 if it acts on answers alone), held-out accuracy of 90.9% after
every memory run, as before, and of 0% after LoRA has memorized the random answers.
"""

import math
import statistics
from pathlib import Path

from experiments.shared import held_out, plotting, random_answer_runs, study
from experiments.shared.claims import Claim, percent
from experiments.shared.held_out import HeldOut
from lamini_jax.backbone.answering import BARE
from lamini_jax.memory import routers
from lamini_jax.memory.routers.experts import selection_stats

ALIKE = 1.25  # curves count as the same if one takes at most so many times the epochs of the other
NEAR_ZERO = 0.05  # nats per answer token, about where the paper's curves end
# In each set of questions that nothing was tuned on.
NUM_QUESTIONS = 240
# Read off the paper's figures: epoch -> loss. Its model is Llama 3 8B, so compare the shape and not the height.
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


def measure(setting: random_answer_runs.Setting, name: str, asked: HeldOut) -> dict:
    """Tunes, then asks for every fact and the untuned questions."""
    tuned, facts = random_answer_runs.tune(setting, name)
    exact_F, _ = tuned.recalled()
    progress = tuned.progress
    return {
        "loss": progress.loss,
        "final_loss": progress.loss[-1],
        "recall": float(exact_F.mean()),
        "certified": float(tuned.certified_F.mean()),
        "certificates": study.certificates(tuned.certified_F, exact_F),
        "epochs_to_full_recall": progress.full_recall,
        "seconds_per_epoch": statistics.median(progress.seconds[1:] or progress.seconds),
        **held_out.judge(asked, tuned.model, tuned.adapter_fn),
    }


def sets_of(backbone: dict) -> list[str]:
    """The names of the sets of held-out questions, the one that claims are judged by first."""
    return [key.removesuffix("_accuracy") for key in backbone if key.endswith("_accuracy")]


def _share(run: dict, name: str) -> str:
    """A share with its interval, for the table."""
    value, interval = run[f"{name}_accuracy"], run[f"{name}_interval"]
    return "-" if value is None else f"{percent(value)} [{' to '.join(map(percent, interval))}]"


def table(results: dict) -> str:
    """The results as text."""

    backbone = results["backbone"]
    sets = sets_of(backbone)

    def judged(run):
        return "".join(f"{_share(run, name):<26}" for name in sets) + f"{percent(run['unchanged']):>9}"

    names = f"{'loss':>9}{'recall':>9}{'certified':>11}{'full at':>9}{'s/epoch':>9}  "
    lines = [
        f"{'run':<23}{names}{''.join(f'{name:<26}' for name in sets)}{'unchanged':>9}",
        f"{'backbone':<70}  {judged(backbone)}",
    ]
    for name, run in results["runs"].items():
        lines.append(
            f"{name:<23}{run['final_loss']:>9.4f}{percent(run['recall']):>9}{percent(run['certified']):>11}"
            f"{run['epochs_to_full_recall'] or 'never':>9}{run['seconds_per_epoch']:>9.2f}  {judged(run)}"
        )
    memory = results["memory"]
    lines.append(
        f"{results['facts']['count']} facts, {memory['top_k']} of {memory['num_experts']} experts each: "
        f"{memory['experts_used']} used, load {memory['load']:.4f}, overlap of two facts {memory['mean_overlap']:.4f}, "
        f"with the nearest {memory['nearest_overlap']:.4f}"
    )
    return "\n".join(lines)


def claims(results: dict) -> list[Claim]:
    """The claims of Figures 1 and 5, and of Table 1 about what its randomized model still answers."""
    runs, backbone = results["runs"], results["backbone"]
    asked = sets_of(backbone)[0]
    low, high = backbone[f"{asked}_interval"]

    def summary(name):
        run = runs[name]
        return f"{name} {run['final_loss']:.4f}, {percent(run['recall'])}, {run['epochs_to_full_recall'] or 'never'}"

    def fits(name, least):
        return runs[name]["final_loss"] < NEAR_ZERO and runs[name]["recall"] >= least

    def epochs(name):
        return runs[name]["epochs_to_full_recall"] or math.inf

    memory = [name for name in random_answer_runs.PAPER_RUNS if not name.startswith("lora")]
    lora = [name for name in random_answer_runs.PAPER_RUNS if name.startswith("lora")]
    random = [name for name in random_answer_runs.PAPER_RUNS if name.endswith("/random")]
    heldout = ", ".join(f"{name} {percent(runs[name][f'{asked}_accuracy'])}" for name in random)
    counts = study.sum_certificates(run["certificates"] for run in runs.values())
    quantities = "Final loss, facts recalled, epoch after which all were"
    return [
        Claim(
            "LoRA fits random answers to a loss near zero, on nearly the same curve as true ones (Figure 1)",
            f"{quantities}: {'; '.join(map(summary, lora))}",
            {
                f"a loss below {NEAR_ZERO} and a recall of 99%": all(fits(name, 0.99) for name in lora),
                f"all random answers recalled after at most {ALIKE} times the epochs of true ones": (
                    epochs("lora/random") <= ALIKE * epochs("lora/true") < math.inf
                ),
            },
        ),
        Claim(
            "Memory experts reach a loss near zero as fast as LoRA (Figure 5)",
            f"{quantities}: {'; '.join(map(summary, memory))}",
            {
                f"a loss below {NEAR_ZERO} and complete recall": all(fits(name, 1.0) for name in memory),
                f"all recalled after at most {ALIKE} times the epochs of LoRA": all(
                    epochs(name) <= ALIKE * epochs(f"lora/{name.split('/')[1]}") < math.inf for name in memory
                ),
            },
        ),
        Claim(
            "A model tuned on random answers answers other questions as before (Table 1)",
            f"Of held-out questions {percent(backbone[f'{asked}_accuracy'])} before; {heldout} (within the interval "
            "counts as before)",
            {f"{name} within the interval": low <= runs[name][f"{asked}_accuracy"] <= high for name in random},
        ),
        Claim(
            "A fact whose tokens all lose less than ln 2 is recalled (theory)",
            f"{counts['certified_but_wrong']} of {counts['certified']} certified facts were not recalled",
            {
                "some facts are certified, and all of those recalled": (
                    counts["certified"] > 0 and counts["certified_but_wrong"] == 0
                )
            },
        ),
    ]


def draw(results: dict, path: Path) -> None:
    """Loss against epoch: LoRA as in Figure 1, memory experts as in Figure 5, each with the paper's points."""
    panels = {"Figure 1": ("LoRA", ["lora"]), "Figure 5": ("memory experts", ["mome_down_proj", "mome_o_proj"])}
    figure, axes = plotting.plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    for axis, (title, (label, methods)) in zip(axes, panels.items(), strict=True):
        for answers, colour in plotting.ANSWER_COLOURS.items():
            for method, style in zip(methods, ("-", "--"), strict=False):
                losses = results["runs"][f"{method}/{answers}"]["loss"]
                name = method.removeprefix("mome_") if len(methods) > 1 else label
                axis.plot(range(1, len(losses) + 1), losses, style, color=colour, label=f"{name}, {answers} answers")
            epochs, points = zip(*PAPER[title][answers].items(), strict=True)
            marker = {"true": "o", "random": "^"}[answers]
            axis.plot(epochs, points, marker, color=colour, mfc="none", label=f"paper, {answers} answers")
        axis.set(title=f"{title}: {label}", xlabel="epoch", ylabel="loss (nats per answer token)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(methods) + 1)
    facts, memory = results["facts"], results["memory"]
    figure.suptitle(
        f"{facts['count']} facts memorized, {memory['top_k']} of {memory['num_experts']:,} experts each "
        "(the paper's points: Llama 3 8B)"
    )
    plotting.save(figure, path, dpi=120)


def main(arguments: study.Arguments) -> None:
    config = arguments.config
    setting = random_answer_runs.prepare(config, arguments.workdir)
    selected = routers.select_facts(setting.model, setting.router, setting.questions, config.memory.top_k)
    asked = held_out.load(config, setting.model, setting.questions, NUM_QUESTIONS)
    results = {
        "backbone": held_out.judge(asked, setting.model, BARE),
        "memory": {
            "num_experts": config.memory.num_experts,
            "top_k": config.memory.top_k,
            **selection_stats(selected.expert_ids_FK, config.memory.num_experts),
        },
        "facts": {"count": config.data.count, "dataset": config.data.facts},
        "runs": {},
    }
    for name in random_answer_runs.RUNS:
        path = setting.directory / name.replace("/", "_") / "result.json"
        results["runs"][name] = study.cached(path, measure, setting, name, asked)
    results |= study.totals(results["runs"].values())
    study.finish(setting.directory, results, table, claims, draw)


if __name__ == "__main__":
    study.start(main)
