"""How much a memory holds: large sets of random numbers (the abstract, section 5), and what happens when it is full.

    python -m experiments.capacity --workdir=runs/capacity
    python -m experiments.capacity --workdir=runs/capacity --counts=20000

Facts are entries of a phone book, ten random digits each, so log2(10^10) = 33.2 bits that nobody can guess. Sets of
--counts of them are memorized by the config's own memory. Then a hundred are memorized by smaller and smaller memories,
and four hundred by a small one: as the load F*K/N (facts, experts selected by each, experts) rises, each expert has to
serve more facts. Beside them stand dense LoRAs with as many trained parameters as two of these memories have. Tuning
ends when every fact is certified and recalled, or with the budget of epochs.

`bits per parameter` counts the floats of the rows that facts have trained, and a fact only if greedy decoding returns
it; `coded` is the bits that the model saves in coding the digits, wrong ones included, which is how the capacities of
2 (arXiv 2404.05405) and 3.6 bits per parameter (arXiv 2505.24832) were measured. Each cell of the study that has
finished is kept, so that more --counts may be added to a finished one.

Takes 10 minutes on 2 x86-64 cores (jax 0.10.2), 4 of them for 5,000 facts; 20,000 facts alone take 14 minutes and 17.7
GB. Expect:

    facts   memory                     load   recall   epochs   facts/s   bits per parameter   coded
    100     down_proj, 32 of 4,096     0.78   100%         17      17.1               0.0027
    100     down_proj, 32 of 256       12.5   100%         25      15.8               0.0137
    100     down_proj, 32 of 64          50   100%         59      10.3               0.0507
    400     down_proj, 32 of 64         200    85%        100       8.5               0.1723    0.20
    100     o_proj, 32 of 256          12.5   100%         50      13.7               0.0274
    100     o_proj, 32 of 64             50    91%        100       8.3               0.0923
    100     down_proj, 2 of 256        0.78   100%         55      11.6               0.0470
    100     down_proj, 2 of 64          3.1    84%        100       6.2               0.0757
    100     down_proj, 2 of 16         12.5    51%        100       2.7               0.1034    0.17
    100     down_proj, 2 of 4            50     5%        100       0.2               0.0406    0.55
    100     LoRA of rank 27                   100%         57       4.9               0.0126
    100     LoRA of rank 2                     95%        100       2.2               0.1622
    1,000   down_proj, 32 of 2^20     0.031   100%         20      33.0               0.0012
    5,000   down_proj, 32 of 2^20      0.15   100%         29      34.3               0.0013
    20,000  down_proj, 32 of 2^20      0.61   100%         32      41.6               0.0017
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.parts import figures, study
from experiments.parts.claims import claim
from lamini_jax import backbone, bank, command, model, router, runs
from lamini_jax.config import BackboneConfig, Config
from lamini_jax.data import facts as facts_lib
from lamini_jax.errors import UserError

_CONFIG = command.define_config()
command.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.", required=True)
_COUNTS = flags.DEFINE_list("counts", ["100", "1000", "5000"], "Sizes of the sets that the config's memory memorizes.")

FACTS = 100
# Memories that are filled up: facts, target, K and N, of which only squares suit product keys.
MEMORIES = (
    *((FACTS, "down_proj", 32, num_experts) for num_experts in (2**12, 2**8, 2**6)),
    (4 * FACTS, "down_proj", 32, 2**6),
    *((FACTS, "o_proj", 32, num_experts) for num_experts in (2**8, 2**6)),
    *((FACTS, "down_proj", 2, num_experts) for num_experts in (2**8, 2**6, 2**4, 2**2)),
)
# A LoRA that memorizes as many facts beside each of these memories, of the nearest rank.
BESIDE = (("down_proj", 32, 2**8), ("down_proj", 2, 2**4))
BITS = math.log2(10**10)
LARGE = 1000  # facts, from which on a set counts as large
PUBLISHED = {"arXiv 2404.05405": 2.0, "arXiv 2505.24832": 3.6}
# The paper's "8B + 2B parameters memorize at least 1B facts".
PAPER_FACTS, PAPER_TRAINED, PAPER_BACKBONE = 1e9, 2e9, 8e9


@dataclasses.dataclass(frozen=True)
class Cell:
    """Some facts and what memorizes them: a memory, or with a rank a LoRA."""

    count: int
    target: str = ""
    selected: int = 0
    num_experts: int = 0
    rank: int = 0

    @property
    def name(self) -> str:
        if self.rank:
            return f"{self.count} facts, LoRA of rank {self.rank}"
        return f"{self.count} facts, {self.target}, {self.selected} of {self.num_experts}"


def floats_per_rank(config: BackboneConfig) -> int:
    """Trained parameters of a LoRA of rank 1 on every linear layer."""
    return config.num_layers * sum(map(sum, backbone.linear_shapes(config).values()))


def cells(config: Config, counts: list[int]) -> list[Cell]:
    """All of the study, small ones first."""
    own = config.memory
    grid = [Cell(*memory) for memory in MEMORIES]
    loras = []
    for target, _, num_experts in BESIDE:
        shape = bank.row_shape(config.backbone, dataclasses.replace(own, target=target))
        rank = max(1, round(num_experts * shape.floats / floats_per_rank(config.backbone)))
        loras.append(Cell(FACTS, rank=rank))
    return list(dict.fromkeys([*grid, *loras, *own_sets(config, counts)]))


def own_sets(config: Config, counts: list[int]) -> list[Cell]:
    """The sets that the config's memory memorizes."""
    memory = config.memory
    return [Cell(count, memory.target, memory.selected, memory.num_experts) for count in sorted(counts)]


def measure(
    cell: Cell, config: Config, base: model.Base, facts, features_QD: np.ndarray, directory: Path, title: str
) -> dict:
    """Memorizes the facts of a cell; what it took, and what is recalled. `features_QD` are what routers train on."""
    if cell.rank:
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=cell.rank))
        tuned = runs.tune_lora(config, base, facts, directory, title, until_all_hold=True)
        trained = cell.rank * floats_per_rank(base.decoder.config)
        spread = {}
    else:
        wanted = {"num_experts": cell.num_experts, "selected": cell.selected, "target": cell.target}
        config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **wanted))
        routing = router.train(config, features_QD)
        tuned = runs.tune_memory(config, base, lambda: routing, facts, directory, title, until_all_hold=True)
        spread = router.spread(tuned.expert_ids_FK, cell.num_experts)
        trained = spread["experts_used"] * bank.row_shape(base.decoder.config, config.memory).floats
    exact_F, _ = runs.recalled(base, tuned.adapt, facts)
    log, recalled = tuned.log, int(exact_F.sum())
    frozen = sum(leaf.size for leaf in jax.tree.leaves(base.params))
    coded = float(np.maximum(BITS - log.total_F / math.log(2), 0).sum())
    tuning_seconds = sum(log.seconds)
    return {
        **dataclasses.asdict(cell),
        **spread,
        "trained_parameters": trained,
        "recall": recalled / cell.count,
        "recalled": recalled,
        "certificates": study.certificates(tuned.certified_F, exact_F),
        "lost": log.lost,
        "epochs": log.epoch,
        "tuning_seconds": tuning_seconds,
        "facts_per_second": recalled / tuning_seconds,
        "bits_per_parameter": recalled * BITS / trained,
        "bits_per_parameter_with_backbone": recalled * BITS / (trained + frozen),
        "coded_bits_per_parameter": coded / trained,
    }


def arithmetic(best: float) -> dict[str, float]:
    """What the paper's largest claim needs, and how many facts fit at some bits per trained parameter."""

    def holds(bits: float) -> float:
        return PAPER_TRAINED * bits / BITS

    return {
        "needed_bits_per_trained_parameter": PAPER_FACTS * BITS / PAPER_TRAINED,
        "needed_bits_per_parameter_with_backbone": PAPER_FACTS * BITS / (PAPER_TRAINED + PAPER_BACKBONE),
        "facts_at_published_capacities": {name: holds(bits) for name, bits in PUBLISHED.items()},
        "facts_at_best_measured": holds(best),
        "best_measured": best,
    }


def breaking(memories: list[dict]) -> dict[str, dict]:
    """Of each target and K: the largest load at which all is recalled, and the smallest at which it is not."""
    found = {}
    for memory in memories:
        series = found.setdefault(f"{memory['target']}, K = {memory['selected']}", {"holds": None, "breaks": None})
        name, choose = ("holds", max) if memory["recall"] == 1 else ("breaks", min)
        known = series[name]
        series[name] = memory["load"] if known is None else choose(known, memory["load"])
    return found


def claims(results: list[dict], own: list[dict]) -> list[dict[str, str]]:
    """What the paper claims beside what was measured; `own` is the sets that the config's memory memorized."""
    memories = [result for result in results if not result["rank"]]
    whole = [result for result in own if result["recall"] == 1]
    if whole:
        most = max(whole, key=lambda result: result["count"])
        sets = f"all {most['count']:,} facts of the largest set recalled completely, {most['epochs']} epochs, "
        sets += f"{most['facts_per_second']:.1f} facts per second; {len(whole)} of {len(own)} sets are complete"
    else:
        sets = f"none of {len(own)} sets is recalled completely"
    shared = [result for result in memories if result["load"] > 1]
    holding = [result for result in shared if result["recall"] == 1]
    loads = "; ".join(
        f"{name}: holds up to {_load(load['holds'])}, breaks at {_load(load['breaks'])}"
        for name, load in breaking(memories).items()
    )
    best = max(results, key=lambda result: result["bits_per_parameter"])
    numbers = arithmetic(best["bits_per_parameter"])
    needed, in_all = (
        numbers["needed_bits_per_trained_parameter"],
        numbers["needed_bits_per_parameter_with_backbone"],
    )
    return [
        claim(
            "Memory experts memorize large sets of random numbers exactly (abstract, section 5)",
            sets,
            bool(whole) and max(result["count"] for result in whole) >= LARGE,
            len(whole) == len(own),
        ),
        claim(
            "The same expert may serve several facts, and all of them are memorized (section 7.1)",
            f"loads: {loads}; {len(holding)} of {len(shared)} memories above load 1 are complete",
            *(result in holding for result in shared or [None]),
        ),
        claim(
            "2B parameters of memory beside a backbone of 8B memorize at least 1B facts (section 5)",
            f"with ten digits per fact that needs {needed:.1f} bits per trained parameter, more than the 16 that a "
            f"bfloat16 has, or {in_all:.1f} if the frozen 8B counted too; published capacities are 2 and 3.6, the most "
            f"that was recalled here is {best['bits_per_parameter']:.3f} ({best['name']}), with which 2B parameters "
            f"hold {numbers['facts_at_best_measured']:,.0f} facts",
            numbers["best_measured"] >= needed,
            numbers["best_measured"] >= in_all,
        ),
    ]


def _load(load: float | None) -> str:
    return "none" if load is None else f"{load:.3g}"


def table(results: list[dict]) -> str:
    """The results as text."""
    lines = [
        f"{'cell':<40}{'load':>8}{'used':>8}{'overlap':>9}{'trained':>12}{'recall':>8}{'epochs':>8}{'lost':>6}"
        f"{'facts/s':>9}{'bits/param':>12}{'coded':>9}"
    ]
    for r in results:
        shared = f"{r['load']:>8.3g}{r['experts_used']:>8}{r['mean_overlap']:>9.4f}" if not r["rank"] else " " * 25
        lines.append(
            f"{r['name']:<40}{shared}{r['trained_parameters']:>12,}{100 * r['recall']:>7.1f}%{r['epochs']:>8}"
            f"{r['lost']:>6}{r['facts_per_second']:>9.2f}{r['bits_per_parameter']:>12.4f}"
            f"{r['coded_bits_per_parameter']:>9.4f}"
        )
    return "\n".join(lines)


def _counts() -> list[int]:
    for text in _COUNTS.value:
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"--counts={','.join(_COUNTS.value)}: {text!r} is not a positive whole number")
    if not _COUNTS.value:
        raise UserError("--counts is empty: name at least one number of facts")
    return [int(text) for text in _COUNTS.value]


def main() -> None:
    config, counts = model.configure(_CONFIG.value), _counts()
    command.start(config.mesh)
    planned = cells(config, counts)
    facts = facts_lib.load("phone_book", "random", max(cell.count for cell in planned), config.seed, "")
    base = model.load_base(config)
    directory = study.directory_of(_WORKDIR.value, config, backbone=base.fingerprint)

    @functools.cache
    def features_QD(count):
        return model.calibration_features(config, base, [fact.question for fact in facts[:count]])

    results = []
    for number, cell in enumerate(planned, 1):
        place = directory / cell.name.replace(", ", "_").replace(" ", "_")
        title = f"cell {number} of {len(planned)}: {cell.name}"

        def measured(cell=cell, place=place, title=title):
            some, features = facts[: cell.count], features_QD(cell.count)
            return {"name": cell.name, **measure(cell, config, base, some, features, place, title)}

        results.append(study.kept(place / "result.json", measured))
    sets = own_sets(config, counts)
    own = [result for cell, result in zip(planned, results, strict=True) if cell in sets]
    found = {
        "cells": results,
        "bits_per_fact": BITS,
        "published_bits_per_parameter": PUBLISHED,
        "loads": breaking([result for result in results if not result["rank"]]),
        "paper_arithmetic": arithmetic(max(result["bits_per_parameter"] for result in results)),
        "claims": claims(results, own),
        "certificates": study.added(result["certificates"] for result in results),
        "seconds": round(sum(result["seconds"] for result in results), 1),
    }
    study.finish(directory, found, table(results), figures.capacity)


if __name__ == "__main__":
    command.run(main)
