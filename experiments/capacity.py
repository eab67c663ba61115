"""How much a memory holds: large sets of random numbers (abstract, section 5), and what happens when it is full.

    python -m experiments.capacity --workdir=runs/capacity
    python -m experiments.capacity --workdir=runs/capacity --counts=100000

Facts are entries of a phone book, ten random digits each, so log2(10^10) = 33.2 bits that nobody can guess. Sets of
the sizes in --counts are memorized by the config's own memory. Then a hundred facts are memorized by smaller and
smaller memories, and four hundred by a small one: as the load F*K/N (facts times experts selected by each, per expert)
rises, each expert has to serve more facts. Dense LoRAs with as many trained parameters as two of these memories are
measured for comparison. Tuning ends when every fact is certified and recalled, or with the budget of epochs.

`bits per parameter` counts the floats of the rows that facts have trained, and a fact only if greedy decoding returns
it; `coded` is the number of bits that the model saves in coding the digits, those of wrong answers included, which is
how the capacities of 2 (arXiv 2404.05405) and 3.6 bits per parameter (arXiv 2505.24832) were measured. The results of
finished cells are kept, so that more --counts may be added to a finished study.

Takes 2.3 minutes on 2 x86-64 cores (jax 0.10.2), of which 5,000 facts take 52 s; 100,000 facts alone take 14 minutes,
15.8 GB, and 21 GB of disk while a checkpoint is written. Expect:

    facts   memory                     load   recall   epochs   facts/s   bits per parameter   coded
    100     down_proj, 32 of 4,096     0.78   100%         17     113.4               0.0028
    100     down_proj, 32 of 256       12.5   100%         28     110.9               0.0139
    100     down_proj, 32 of 64          50   100%         98      45.8               0.0507
    400     down_proj, 32 of 64         200    81%        100      50.7               0.1632    0.19
    100     o_proj, 32 of 256          12.5   100%         45      74.3               0.0277
    100     o_proj, 32 of 64             50    99%        100      41.7               0.1004
    100     down_proj, 2 of 256        0.78   100%         75      49.0               0.0484
    100     down_proj, 2 of 64          3.1    85%        100      34.9               0.0788
    100     down_proj, 2 of 16         12.5    50%        100      15.6               0.1081    0.18
    100     down_proj, 2 of 4            50     4%        100       1.1               0.0324    0.47
    100     LoRA of rank 27                   100%         47       9.6               0.0126
    100     LoRA of rank 2                     96%        100       5.2               0.1639
    1,000   down_proj, 32 of 2^20     0.031   100%         24     180.0               0.0012
    5,000   down_proj, 32 of 2^20      0.15   100%         23     208.9               0.0013
    100,000 down_proj, 32 of 2^20       3.1   100%         37     233.4               0.0036
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import numpy as np
from absl import flags

from experiments.shared import flops, plotting, study
from experiments.shared.claims import Claim
from lamini_jax import UserError
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, DataConfig
from lamini_jax.memory import experts
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.training import run

FACTS = 100
# Memories that are filled up: facts, target, K and N, of which only squares suit product keys.
MEMORIES = (
    *((FACTS, "down_proj", 32, num_experts) for num_experts in (2**12, 2**8, 2**6)),
    (4 * FACTS, "down_proj", 32, 2**6),
    *((FACTS, "o_proj", 32, num_experts) for num_experts in (2**8, 2**6)),
    *((FACTS, "down_proj", 2, num_experts) for num_experts in (2**8, 2**6, 2**4, 2**2)),
)
# Memories that are compared with a LoRA of the nearest rank, which memorizes as many facts.
BESIDE = (("down_proj", 2**8), ("down_proj", 2**4))
BITS = math.log2(10**10)
LARGE = 1000  # facts, at least, of a set that counts as large
PUBLISHED = {"arXiv 2404.05405": 2.0, "arXiv 2505.24832": 3.6}
# The paper's "8B + 2B parameters memorize at least 1B facts".
PAPER_FACTS, PAPER_TRAINED, PAPER_BACKBONE = 1e9, 2e9, 8e9


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number of facts and what memorizes them: a memory or, if `rank` is set, a LoRA."""

    count: int
    target: str = ""
    top_k: int = 0
    num_experts: int = 0
    rank: int = 0

    @property
    def name(self) -> str:
        if self.rank:
            return f"{self.count} facts, LoRA of rank {self.rank}"
        return f"{self.count} facts, {self.target}, {self.top_k} of {self.num_experts}"


def define_flags() -> None:
    flags.DEFINE_list("counts", ["100", "1000", "5000"], "Sizes of the sets that the config's memory memorizes.")


def cells(config: Config, counts: list[int]) -> list[Cell]:
    """All cells of the study, small ones first."""
    grid = [Cell(*memory) for memory in MEMORIES]
    loras = []
    for target, num_experts in BESIDE:
        shape = experts.expert_shape(config.backbone, dataclasses.replace(config.memory, target=target))
        rank = max(1, round(num_experts * shape.floats / flops.lora_rank_parameters(config.backbone)))
        loras.append(Cell(FACTS, rank=rank))
    return list(dict.fromkeys([*grid, *loras, *own_sets(config, counts)]))


def own_sets(config: Config, counts: list[int]) -> list[Cell]:
    """The sets that the config's memory memorizes."""
    memory = config.memory
    return [Cell(count, memory.target, memory.top_k, memory.num_experts) for count in sorted(counts)]


def tune(cell: Cell, config: Config, model: FrozenModel, facts, features, place: tuple[Path, str]):
    """The tuned memory or LoRA of a cell, the number of its trained parameters, and its `selection_stats`.

    `features(count)` returns what routers train on (features_QD); `place` is the run's directory and title.
    """
    if cell.rank:
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=cell.rank))
        tuned = run.lora_run(config, model, facts, *place, until_all_hold=True).result()
        return tuned, flops.trained_parameters(config, "lora"), {}
    wanted = {"num_experts": cell.num_experts, "top_k": cell.top_k, "target": cell.target}
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **wanted))
    _, trained = itertools.islice(expert_router.projections(config, features(cell.count)), 2)  # after one epoch
    router = expert_router.make(config, *trained)
    tuned = run.memory_run(config, model, facts, *place, router=router, until_all_hold=True).result()
    stats = expert_router.selection_stats(tuned.expert_ids_FK, cell.num_experts)
    return tuned, stats["experts_used"] * experts.expert_shape(config.backbone, config.memory).floats, stats


def measure(cell: Cell, config: Config, model: FrozenModel, facts, features, place: tuple[Path, str]) -> dict:
    """Memorizes the first facts; returns what it took, and what is recalled."""
    facts = facts[: cell.count]
    tuned, trained, stats = tune(cell, config, model, facts, features, place)
    exact_F, _ = tuned.recalled()
    progress, recalled = tuned.progress, int(exact_F.sum())
    coded = float(np.maximum(BITS - progress.total_F / math.log(2), 0).sum())
    tuning_seconds = sum(progress.seconds)
    return {
        "name": cell.name,
        **dataclasses.asdict(cell),
        **stats,
        "trained_parameters": trained,
        "recall": recalled / cell.count,
        "recalled": recalled,
        "certificates": study.certificates(tuned.certified_F, exact_F),
        "lost": progress.lost,
        "epochs": progress.epoch,
        "tuning_seconds": tuning_seconds,
        "facts_per_second": recalled / tuning_seconds,
        "bits_per_parameter": recalled * BITS / trained,
        "coded_bits_per_parameter": coded / trained,
    }


def arithmetic(best: float) -> dict[str, float]:
    """What the paper's largest claim needs, and how many facts fit with the most bits per trained parameter."""
    return {
        "needed_bits_per_trained_parameter": PAPER_FACTS * BITS / PAPER_TRAINED,
        "needed_bits_per_parameter_with_backbone": PAPER_FACTS * BITS / (PAPER_TRAINED + PAPER_BACKBONE),
        "facts_at_best_measured": PAPER_TRAINED * best / BITS,
        "best_measured": best,
    }


def breaking(memories: list[dict]) -> dict[str, dict]:
    """By target and K: the largest load at which all facts are recalled, and the smallest at which they are not."""
    loads = {}
    for memory in memories:
        series = loads.setdefault(f"{memory['target']}, K = {memory['top_k']}", {"holds": None, "breaks": None})
        name, choose = ("holds", max) if memory["recall"] == 1 else ("breaks", min)
        known = series[name]
        series[name] = memory["load"] if known is None else choose(known, memory["load"])
    return loads


def claims(results: dict) -> list[Claim]:
    """The paper's claims, with what was measured."""
    measured = results["cells"]
    own = [cell for cell in measured if cell["own"]]
    memories = [cell for cell in measured if not cell["rank"]]
    whole = [cell for cell in own if cell["recall"] == 1]
    if whole:
        most = max(whole, key=lambda cell: cell["count"])
        sets = f"All {most['count']:,} facts of the largest set recalled completely, {most['epochs']} epochs, "
        sets += f"{most['facts_per_second']:.1f} facts per second; {len(whole)} of {len(own)} sets are complete"
    else:
        sets = f"None of {len(own)} sets is recalled completely"
    shared = [cell for cell in memories if cell["load"] > 1]
    holding = [cell for cell in shared if cell["recall"] == 1]
    loads = "; ".join(
        f"{name}: holds up to {_load(load['holds'])}, breaks at {_load(load['breaks'])}"
        for name, load in breaking(memories).items()
    )
    best, numbers = max(measured, key=lambda cell: cell["bits_per_parameter"]), results["paper_arithmetic"]
    needed, in_all = numbers["needed_bits_per_trained_parameter"], numbers["needed_bits_per_parameter_with_backbone"]
    return [
        Claim(
            "Memory experts memorize large sets of random numbers exactly (abstract, section 5)",
            sets,
            {
                f"a set of at least {LARGE:,} facts is complete": any(cell["count"] >= LARGE for cell in whole),
                "all sets are complete": len(whole) == len(own),
            },
        ),
        Claim(
            "The same expert may serve several facts, and all of them are memorized (section 7.1)",
            f"Loads: {loads}; {len(holding)} of {len(shared)} memories above load 1 are complete",
            {f"{cell['name']} is complete": cell in holding for cell in shared}
            or {"a memory above load 1 was measured": False},
        ),
        Claim(
            "2B parameters of memory beside a backbone of 8B memorize at least 1B facts (section 5)",
            f"With ten digits per fact that needs {needed:.1f} bits per trained parameter, more than the 16 that a "
            f"bfloat16 has, or {in_all:.1f} if the frozen 8B counted too; published capacities are 2 and 3.6, the most "
            f"that was recalled here is {best['bits_per_parameter']:.3f} ({best['name']}), with which 2B parameters "
            f"hold {numbers['facts_at_best_measured']:,.0f} facts",
            {
                f"{needed:.1f} bits per trained parameter recalled": numbers["best_measured"] >= needed,
                f"{in_all:.1f} bits per trained parameter recalled": numbers["best_measured"] >= in_all,
            },
        ),
    ]


def _load(load: float | None) -> str:
    return "none" if load is None else f"{load:.3g}"


def table(results: dict) -> str:
    """The results as text."""
    lines = [
        f"{'cell':<40}{'load':>8}{'used':>8}{'overlap':>9}{'trained':>12}{'recall':>8}{'epochs':>8}{'lost':>6}"
        f"{'facts/s':>9}{'bits/param':>12}{'coded':>9}"
    ]
    for r in results["cells"]:
        shared = f"{r['load']:>8.3g}{r['experts_used']:>8}{r['mean_overlap']:>9.4f}" if not r["rank"] else " " * 25
        lines.append(
            f"{r['name']:<40}{shared}{r['trained_parameters']:>12,}{100 * r['recall']:>7.1f}%{r['epochs']:>8}"
            f"{r['lost']:>6}{r['facts_per_second']:>9.2f}{r['bits_per_parameter']:>12.4f}"
            f"{r['coded_bits_per_parameter']:>9.4f}"
        )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Recall against load, bits against trained parameters, and epochs against load."""
    measured = results["cells"]
    most_experts = max(cell["num_experts"] for cell in measured)
    series = {}
    for cell in measured:
        name = "dense LoRA" if cell["rank"] else f"{cell['target']}, K = {cell['top_k']}"
        name += ", more facts" if cell["num_experts"] == most_experts else ""
        series.setdefault(name, []).append(cell)
    figure, axes = plotting.plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    for (name, group), marker in zip(series.items(), "os^Dvx*", strict=False):
        memories = [] if group[0]["rank"] else sorted(group, key=lambda cell: cell["load"])
        label = name if memories else None  # a LoRA has no load: an empty line keeps the colours equal in all panels
        loads = [cell["load"] for cell in memories]
        axes[0].plot(loads, [100 * cell["recall"] for cell in memories], f"{marker}-", mfc="none", label=label)
        axes[2].plot(loads, [cell["epochs"] for cell in memories], f"{marker}-", mfc="none", label=label)
        trained = [cell["trained_parameters"] for cell in group]
        axes[1].plot(trained, [cell["bits_per_parameter"] for cell in group], marker, mfc="none", label=name)
    needed = results["paper_arithmetic"]["needed_bits_per_trained_parameter"]
    lines = {**PUBLISHED, "1B facts in 2B parameters need": needed}
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
    plotting.save(figure, path, dpi=120)


def main(arguments: study.Arguments) -> None:
    config, counts = arguments.config, study.positive_integers("counts", arguments.flags.counts)
    if not counts:
        raise UserError("--counts is empty: name at least one number of facts")
    planned, own = cells(config, counts), own_sets(config, counts)
    book = DataConfig("phone_book", max(cell.count for cell in planned))
    model, facts = study.load(dataclasses.replace(config, data=book), "random")
    directory = study.open_study(arguments.workdir, config, model)  # more facts may be added to a finished one

    @functools.cache
    def features(count):
        return expert_router.calibration_features(config, model, [fact.question for fact in facts[:count]])

    measured = []
    for number, cell in enumerate(planned, 1):
        title = f"cell {number} of {len(planned)}: {cell.name}"
        place = directory / cell.name.replace(", ", "_").replace(" ", "_"), title
        result = study.cached(place[0] / "result.json", measure, cell, config, model, facts, features, place)
        measured.append(result | {"own": cell in own})
    results = {
        "cells": measured,
        "paper_arithmetic": arithmetic(max(cell["bits_per_parameter"] for cell in measured)),
        **study.totals(measured),
    }
    study.finish(directory, results, table, claims, draw)


if __name__ == "__main__":
    study.start(main, define_flags)
