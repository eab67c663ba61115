"""A living memory: facts are added in batches, asked in other words, told from look-alikes, forgotten and changed.

    pip install -e .[report,smollm2]
    python -m experiments.editing --workdir=runs/editing
    python -m experiments.editing --workdir=runs/editing_smollm2 --config=experiments/configs/smollm2_facts.py
        --config.full.optimizer.learning_rate=5e-5 --config.data.dir=DATA [--sets=zsre --counts=1000]
    python -m experiments.editing --workdir=runs/editing_mine --facts=FILE.jsonl --counts=50

DATA holds editing/{wikibigedit,zsre,counterfact,nq_open}.jsonl, TruthfulQA.csv and mmlu/; a line of these files, and of
FILE, is {"question": ..., "answer": ..., "rephrased": [...], "others": [...]}. Beside the tiny backbone the facts are
entries of a phone book, and look-alikes are other people of the same first name.

After each batch everything stored so far is asked by free-running greedy decoding to its natural end, 32 tokens at
most; of long lives at ten moments. In the end facts are asked in other words and with one or two typos, and so are
questions that nobody stored: `others`, which are most like the facts, `unrelated` ones that people asked a search
engine, TruthfulQA and MMLU. A threshold on the score lets 5%, 1% or 0.1% of `others` fire; `recall_at` counts the
rephrased questions that are above it and answered exactly. The memory has a threshold of its own, which has not seen
them; its rivals, at which thresholds are judged alike, work at the one of 1%.

The rivals: the bare backbone; TF-IDF of words and of letters, whose fact is put into the prompt, or whose fact's
experts answer; the key of GRACE (the last token's hidden state, Euclidean distance); one LoRA for all facts; full
fine-tuning. They are asked a sample. Beside a real backbone the last two are tuned on 100 facts for 30 epochs at most,
which the table says; full fine-tuning needs a lower rate than beside the tiny one (SmolLM2 diverges at 1e-3: from 8.2
nats to 10.4 in a step). Then the last two batches are forgotten: what is stored has to be that of the memory before,
bit for bit, and so have its answers. At last 200 facts get the answer of another one.

A killed study continues after the last part that was finished, of each set: a batch, a judgement, a rival.

Takes 2 minutes beside the tiny backbone on 2 x86-64 cores (jax 0.10.2), and beside SmolLM2 took 30 to 60 minutes a set
while other work ran, 5 to 11 of them for full fine-tuning, which fills 12 GB. experiments/README.md has what to expect.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments import editing_judging, editing_memory, editing_questions, editing_rivals
from experiments.editing_memory import Living
from experiments.editing_page import claims, draw, table
from experiments.shared import study
from lamini_jax import Config
from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import DataConfig
from lamini_jax.config import facts as facts_config
from lamini_jax.runtime import cli, processes

COUNT, COUNT_TINY = 1000, 300  # facts of a set beside a real backbone, and beside the one that ships
_RIVAL = "rival_"

Part = Callable[[Mapping[str, dict]], dict]


def define_flags() -> None:
    flags.DEFINE_list("counts", [], f"Facts of each set, several for several memories; {COUNT} by default.")
    flags.DEFINE_list("sets", [], f"Files in editing/ of --config.data.dir, or {editing_questions.GENERATED}.")
    flags.DEFINE_string("facts", None, "A file of the same form, instead of --sets.")
    flags.DEFINE_integer("batch", 100, "Facts that are added at a time.", lower_bound=1)


def editable(config: Config) -> Config:
    """The config if its memory is one of facts, and otherwise with the memory for facts of one's own."""
    if config.router.kind == "facts":
        return config
    router = dataclasses.replace(config.router, kind="facts")
    return dataclasses.replace(config, router=router, memory=facts_config(config.backbone).memory)


def parts(config: Config, model: FrozenModel, living: Living, directory: Path) -> dict[str, Part]:
    """By name and in order, the functions that measure a set; each gets the results of those before it."""
    batches = [f"batch_{number}" for number in range(len(living.batches))]
    growing = {name: lambda done, n=n: editing_memory.grow(living, n) for n, name in enumerate(batches)}

    def judged(done):
        told = {"verbatim": done[batches[-1]]["texts"]}
        return editing_judging.judge(living.system, living.asked, told) | editing_memory.space(living)

    def forgotten(done):
        return editing_memory.forget(living, done[batches[-1 - living.forgotten]])

    found = editing_rivals.rivals(config, model, living, directory)
    rivals = {_RIVAL + name: lambda done, measure=measure: measure() for name, measure in found.items()}
    # The longest come last: they need nothing of the memory, which forgetting and changing change.
    dense = {name: rivals.pop(_RIVAL + name) for name in editing_rivals.DENSE}
    return {
        **growing,
        "judged": judged,
        "bitwise": lambda done: editing_memory.bitwise(living),
        "latency": lambda done: editing_memory.latency(living),
        **rivals,
        **({"forgotten": forgotten} if living.forgotten else {}),
        "changed": lambda done: editing_memory.change(living),
        **{_RIVAL + name: part for name, part in dense.items()},
    }


def measured(ordered: Mapping[str, Part], directory: Path) -> dict[str, dict]:
    """The results of all parts of a set, measured now or read; a line for each."""
    directory.mkdir(exist_ok=True)
    done: dict[str, dict] = {}
    for number, (name, measure) in enumerate(ordered.items(), 1):
        done[name] = study.cached(directory / f"{name}.json", measure, done)
        title = f"{directory.name}, part {number} of {len(ordered)}: {name}"
        processes.print_once(f"{title}, {done[name]['seconds']:.1f} s")
    return done


def result_of(living: Living, done: Mapping[str, dict]) -> dict[str, Any]:
    """What is reported of a memory."""
    grown = [done[f"batch_{number}"] for number in range(len(living.batches))]
    found = [done["judged"], editing_memory.growth(living, grown), done["bitwise"], done["latency"]]
    together = {key: value for one in found for key, value in one.items()}
    intervals = {key: value for one in found for key, value in one.get("intervals", {}).items()}
    del together["seconds"]
    rest = {name: _without_seconds(done[name]) if name in done else None for name in ("forgotten", "changed")}
    return {"count": len(living.asked.facts), **together, "intervals": intervals, **rest}


def _without_seconds(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "seconds"}


def main(arguments: study.Arguments) -> None:
    cli.require("report", "sklearn")
    config, asked = editable(arguments.config), arguments.flags
    counts = study.positive_integers("counts", asked.counts) or [COUNT if config.backbone.path else COUNT_TINY]
    model = frozen_model.load(config)
    sets = editing_questions.load(config, model.tokenizer, asked.sets, asked.facts, counts)
    identity = {"batch": asked.batch, "sets": {one.name: one.fingerprint for one in sets}}
    # The fingerprints stand for the files' contents; where the files are does not matter.
    directory = study.open_study(arguments.workdir, dataclasses.replace(config, data=DataConfig()), model, **identity)
    results: dict[str, Any] = {"sets": {}, "rivals": {}}
    every = []
    for one in sets:
        place = directory / one.name
        living = Living(config, one, asked.batch, place / "memory")
        done = measured(parts(config, model, living, place), place)
        results["sets"][one.name] = result_of(living, done)
        rivals = {name.removeprefix(_RIVAL): part for name, part in done.items() if name.startswith(_RIVAL)}
        results["rivals"][one.name] = {name: _without_seconds(part) for name, part in rivals.items()}
        every += done.values()
    study.finish(directory, {**results, **study.totals(every)}, table, claims, draw)


if __name__ == "__main__":
    study.start(main, define_flags)
