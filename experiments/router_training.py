"""Does training the router, then freezing it, help? Section 7.1: one epoch of training, then each fact's experts stay.

    python -m experiments.router_training --workdir=runs/router_training

The same facts with random answers are memorized with routers that differ in how they were made:

    raw        a random projection of the pooled hidden states, never trained
    whitened   a random projection of the whitened ones, never trained
    trained    the raw projection trained for one epoch, then frozen
    ours       the whitened one trained for one epoch, then frozen: what the package does
    never      ours, never frozen: trained for one more epoch before each epoch of tuning, so that facts select again

Before each epoch all facts are checked with the experts that they select then, and those that are not certified are
trained; it ends when all are certified and recalled, or with the budget of epochs. `changed` is the share of facts
that select other experts than an epoch before, on average over epochs (after tuning, all facts select once more: a
frozen router has to choose the same experts). `lost` counts certified facts that are no longer certified at the next
check, because other facts trained their experts or because they selected others. `used` and the overlaps are those of
the last selection.

Takes 1 minute on 2 x86-64 cores (jax 0.10.2). Expect all facts recalled after 87 epochs with `raw` (125 experts used),
24 with `whitened` (3,884), 29 with `trained` (1,043) and 27 with `ours` (3,951); with `never`, where 92% of the facts
change their experts from one epoch to the next, 89.1% after all 100.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.shared import plotting, study
from experiments.shared.claims import Claim
from lamini_jax import Fact
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, certified_loss
from lamini_jax.evaluation import recall
from lamini_jax.memory import routers
from lamini_jax.memory.routers import FactSelection
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.runtime import processes, sharding
from lamini_jax.training import MemoryMethod, loop


@dataclasses.dataclass(frozen=True)
class Training:
    """How a router is made: whether features are whitened, epochs of training, and whether it is then frozen."""

    whiten: bool
    epochs: int
    frozen: bool = True


ROUTERS = {
    "raw": Training(whiten=False, epochs=0),
    "whitened": Training(whiten=True, epochs=0),
    "trained": Training(whiten=False, epochs=1),
    "ours": Training(whiten=True, epochs=1),
    "never": Training(whiten=True, epochs=1, frozen=False),
}
# Taking at most this share of another's epochs counts as better; two seeds differ by less.
FASTER = 0.9


def selections(
    config: Config, model: FrozenModel, training: Training, features_QD: np.ndarray, questions: list[str]
) -> list[FactSelection]:
    """What facts select in each epoch of tuning, or once if the router is frozen.

    It is known before tuning begins, because the router is trained only on questions.
    """
    epochs = 1 if training.frozen else config.tuning.epochs
    projections = expert_router.projections(config, features_QD, training.whiten)
    chosen = list(itertools.islice(projections, training.epochs, training.epochs + epochs))
    first = expert_router.make(config, *chosen[0])
    # All of them have the same keys, which are large.
    made = [first.replace(mean_D=sharding.put(mean_D), transform_DC=sharding.put(t_DC)) for mean_D, t_DC in chosen]
    progress = processes.progress_bar(made, desc="selecting", unit="epoch", delay=1)
    return [routers.select_facts(model, router, questions, config.memory.top_k) for router in progress]


def changed(expert_ids_EFK: np.ndarray) -> float:
    """The share of facts whose set of experts differs from that of the epoch before."""
    sets_EFK = np.sort(expert_ids_EFK, axis=-1)
    if len(sets_EFK) == 1:
        return 0.0
    return float((sets_EFK[1:] != sets_EFK[:-1]).any(axis=-1).mean())


def memorize(
    config: Config, model: FrozenModel, facts: Sequence[Fact], selected: Sequence[FactSelection], title: str
) -> dict:
    """Tunes with the selection of each epoch, of which the last serves all later epochs; returns the results."""
    threshold, certified = certified_loss(config.backbone.dtype), []
    method = MemoryMethod.create(config, model, facts, selected[0], later=selected[1:])
    bar = processes.progress_bar(total=config.tuning.epochs, desc=title, unit="epoch")
    epochs = loop.epochs(method, method.init(), loop.new_progress(len(facts)), until_all_hold=True)
    with bar:
        for state, progress in epochs:
            if progress.batches == 0 and progress.epoch > len(certified):
                method.select(selected[min(progress.epoch, len(selected) - 1)])
                loop.check(method, state, progress)
                certified.append(float((progress.worst_F < threshold).mean()))
                bar.set_postfix_str(f"loss {progress.loss[-1]:.4f}, {certified[-1]:.1%} certified", refresh=False)
                bar.update()
    exact_F, _ = recall.recalled(*method.adapter(state), facts)
    expert_ids_EFK = np.stack([selection.expert_ids_FK for selection in selected[: progress.epoch]])
    last, questions = method.selection, [fact.question for fact in facts]
    again = routers.select_facts(model, last.router, questions, config.memory.top_k)
    return {
        "recall": float(exact_F.mean()),
        "certificates": study.certificates(progress.worst_F < threshold, exact_F),
        "certified": certified,
        "loss": progress.loss,
        "epochs": progress.epoch,
        "lost": progress.lost,
        "changed": changed(expert_ids_EFK),
        "changed_since": changed(np.stack([last.expert_ids_FK, again.expert_ids_FK])),
        **expert_router.selection_stats(last.expert_ids_FK, config.memory.num_experts),
    }


def better(one: dict, other: dict) -> bool:
    """Whether `one` recalls more, or as much in clearly fewer epochs."""
    if one["recall"] != other["recall"]:
        return one["recall"] > other["recall"]
    return one["epochs"] <= FASTER * other["epochs"]


def claims(results: dict) -> list[Claim]:
    """The paper's claims, with what was measured."""
    measured = results["routers"]

    def summary(*names):
        return ", ".join(
            f"{name} {100 * measured[name]['recall']:.1f}% after {measured[name]['epochs']} epochs with "
            f"{measured[name]['experts_used']:,} experts"
            for name in names
        )

    frozen = [name for name, training in ROUTERS.items() if training.frozen]
    fixed = [measured[name]["changed"] == measured[name]["changed_since"] == 0 for name in frozen]
    moved = measured["never"]["changed"]
    return [
        Claim(
            "Trained for one epoch and then frozen, the router selects the same experts for a fact at every step "
            "(section 7.1)",
            f"{sum(fixed)} of {len(fixed)} frozen routers select after tuning what they selected before; never frozen, "
            f"{moved:.1%} of facts selected others from one epoch to the next",
            {"every frozen router does": all(fixed), "one that is never frozen does not": moved > 0},
        ),
        Claim(
            "Freezing the router lets facts be memorized in fewer steps (section 7.1)",
            f"Recall {summary('ours', 'never')}; {measured['ours']['lost']} and {measured['never']['lost']} times a "
            "certified fact was lost",
            {"frozen is better than never frozen": better(measured["ours"], measured["never"])},
        ),
        Claim(
            "Training the router for one epoch before it is frozen helps (section 7.1)",
            f"Recall without whitening: {summary('raw', 'trained')}; with it: {summary('whitened', 'ours')}",
            {
                "trained is better than raw": better(measured["trained"], measured["raw"]),
                "ours, trained, is better than whitened": better(measured["ours"], measured["whitened"]),
            },
        ),
    ]


def table(results: dict) -> str:
    """The results as text."""
    lines = [
        f"{'router':<10}{'used':>8}{'overlap':>9}{'nearest':>9}{'changed':>9}{'recall':>8}{'epochs':>8}{'lost':>7}"
    ]
    for name, r in results["routers"].items():
        lines.append(
            f"{name:<10}{r['experts_used']:>8}{r['mean_overlap']:>9.4f}{r['nearest_overlap']:>9.4f}"
            f"{100 * r['changed']:>8.1f}%{100 * r['recall']:>7.1f}%{r['epochs']:>8}{r['lost']:>7}"
        )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Certified facts and loss against epoch, and how the selections spread."""
    measured, memory = results["routers"], results["memory"]
    figure, axes = plotting.plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    for name, run in measured.items():
        epochs = range(1, run["epochs"] + 1)
        axes[0].plot(epochs, [100 * share for share in run["certified"]], label=name)
        axes[1].plot(epochs, run["loss"], label=name)
    axes[0].set(title="Facts certified, with the experts that they select then", xlabel="epoch", ylabel="%")
    axes[1].set(title="Loss", xlabel="epoch", ylabel="nats per answer token", yscale="log")
    places = range(len(measured))
    axes[2].bar(places, [run["experts_used"] for run in measured.values()], color="lightgrey", label="experts used")
    axes[2].axhline(results["facts"]["count"] * memory["top_k"], color="grey", ls=":", label="if no two facts share")
    axes[2].set(title="Selection", ylabel="experts used", xticks=list(places), xticklabels=list(measured), yscale="log")
    overlap = axes[2].twinx()
    overlap.plot(places, [run["nearest_overlap"] for run in measured.values()], "ro", label="overlap with the nearest")
    overlap.set(ylim=(0, 1.05), ylabel="share of experts in common")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    bars, points = axes[2].get_legend_handles_labels(), overlap.get_legend_handles_labels()
    axes[2].legend(bars[0] + points[0], bars[1] + points[1], fontsize="small", loc="center right")
    figure.suptitle(
        f"{results['facts']['count']} facts with random answers, "
        f"{memory['top_k']} of {memory['num_experts']:,} experts each"
    )
    plotting.save(figure, path, dpi=120)


def main(arguments: study.Arguments) -> None:
    config = arguments.config
    model, facts = study.load(config, "random")
    questions = [fact.question for fact in facts]
    directory = study.open_study(arguments.workdir, config, model, facts)
    features_QD = functools.cache(lambda: expert_router.calibration_features(config, model, questions))
    measured = {}
    for number, (name, training) in enumerate(ROUTERS.items(), 1):
        title = f"router {number} of {len(ROUTERS)}, {name}"

        def tune(training=training, title=title):
            selected = selections(config, model, training, features_QD(), questions)
            return memorize(config, model, facts, selected, title)

        measured[name] = study.cached(directory / f"{name}.json", tune)
    results = {
        "routers": measured,
        "facts": {"count": len(facts), "dataset": config.data.facts},
        "memory": dataclasses.asdict(config.memory),
        **study.totals(measured.values()),
    }
    study.finish(directory, results, table, claims, draw)


if __name__ == "__main__":
    study.start(main)
