"""Judging what was not tuned: TruthfulQA (MC1, MC2) and MMLU (5-shot), of a backbone and of one with memory.

    python -m experiments.benchmarks --workdir=runs/benchmarks --config.data.dir=DATA
    python -m experiments.benchmarks --workdir=runs/benchmarks_memory --config.data.dir=DATA --memory_workdir=DIR

DATA holds TruthfulQA.csv and mmlu/{dev,test}/*.csv (`lamini_jax/data/benchmarks.py` says from where), DIR is one that
`lamini_jax.tune` has finished with: its config is then taken for all but data and mesh, and the backbone is judged with
its memory too. The score of a choice is the sum of its tokens' log-likelihoods, as in lm-evaluation-harness; each
question selects its own experts. Started again, it goes on after the last benchmark that was finished.

Takes 5 minutes on 2 x86-64 cores that do other work too (jax 0.10.2), and twice that with a memory. Expect chance of
the tiny backbone, before and after tuning 50 entries of a phone book:

                TruthfulQA MC1            MC2                       MMLU
    backbone    21.7% [19.0% to 24.7%]    49.3% [45.9% to 52.7%]    21.9% [20.4% to 23.4%]
    memory      21.7% [19.0% to 24.7%]    49.3% [45.9% to 52.7%]    21.8% [20.3% to 23.3%]

Guessing has 22.7% in MC1, and 45.0% in MC2. Nor does this backbone know letters: whatever the question, it prefers A or
D, which are right for 22.3% and 23.5%. Its context of 256 bytes is no fair test of MMLU: of 14,042 questions 2,840 fit
without examples, 36 with one, and 11,166 do not fit; of TruthfulQA's 817, 6 do not.
"""

import dataclasses
import time
from collections import Counter
from pathlib import Path

from absl import flags

from experiments.parts import study
from lamini_jax import command, memory, model, processes, recall
from lamini_jax.data import benchmarks
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.errors import UserError

_CONFIG = command.define_config()
command.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_MEMORY = flags.DEFINE_string("memory_workdir", None, "Directory that `lamini_jax.tune` has finished with.")
_PER_SUBJECT = flags.DEFINE_integer("per_subject", None, "MMLU's first questions of each subject only.", lower_bound=1)


def judged(
    name: str, base: model.Base, adapt: recall.Adapt, items: list[MultipleChoice], title: str
) -> dict[str, object]:
    """The results of one benchmark, on the items that fit in the context."""
    context = base.decoder.config.context
    fitting = benchmarks.fitting(items, base.tokenizer, context)
    if not fitting:
        raise UserError(
            f"{name}: none of its {len(items)} questions fits in --config.backbone.context={context} tokens"
        )
    total = sum(len(item.choices) for item in fitting)
    with processes.bar(total=total, desc=title, unit="choice") as progress:
        scores = recall.score(base, adapt, fitting, progress.update)
    left_out = len(items) - len(fitting)
    if name == "mmlu":
        shots = Counter(len(item.shots) for item in fitting)
        result = {**recall.mmlu_results(fitting, scores, left_out), "shots": dict(sorted(shots.items(), reverse=True))}
    else:
        result = {**recall.truthful_qa_results(fitting, scores), "left_out": left_out}
    return result


def table(results: dict) -> str:
    """The results as text."""

    def share(value, interval):
        return f"{100 * value:.1f}% [{' to '.join(f'{100 * end:.1f}%' for end in interval)}]"

    lines = [f"{'':<12}{'TruthfulQA MC1':<26}{'MC2':<26}MMLU"]
    for name, run in results["runs"].items():
        truthful, mmlu = run["truthful_qa"], run["mmlu"]
        mc1, mc2 = (share(truthful[key], truthful[f"{key}_interval"]) for key in ("mc1", "mc2"))
        lines.append(f"{name:<12}{mc1:<26}{mc2:<26}{share(mmlu['accuracy'], mmlu['interval'])}")
    shots = ", ".join(f"{count:,} with {number}" for number, count in mmlu["shots"].items())
    lines.append(f"TruthfulQA: {truthful['questions']:,} questions; {truthful['left_out']:,} do not fit in the context")
    lines.append(f"MMLU: {mmlu['questions']:,} questions ({shots} examples); {mmlu['left_out']:,} do not fit")
    return "\n".join(lines)


def main() -> None:
    config = model.configure(_CONFIG.value)
    if not config.data.dir:
        raise UserError(f"--config.data.dir is empty; name the folder of {benchmarks.TRUTHFUL_QA_FILE} and mmlu")
    items = {
        "truthful_qa": benchmarks.truthful_qa(config.data.dir),
        "mmlu": benchmarks.mmlu(config.data.dir, _PER_SUBJECT.value),
    }
    if _MEMORY.value:
        tuned = memory.config_of_run(Path(_MEMORY.value))
        config = dataclasses.replace(tuned, data=config.data, mesh=config.mesh)
    command.start(config.mesh)
    identity = {"config": dataclasses.asdict(config), "memory": _MEMORY.value}
    del identity["config"]["mesh"], identity["config"]["data"]
    identity["items"] = {name: benchmarks.fingerprint(items[name]) for name in items}
    directory = command.open_workdir(_WORKDIR.value, identity)
    started = time.time()
    base = model.load_base(config)
    judges = {"backbone": recall.bare}
    if _MEMORY.value:
        served = memory.of_run(config, Path(_MEMORY.value) / "checkpoints")
        judges["memory"] = memory.adapt_with(base, served, config)
    results = {"runs": {judge: {} for judge in judges}}
    for judge, adapt in judges.items():
        for name in items:
            results["runs"][judge][name] = study.kept(
                directory / f"{judge}_{name}.json",
                lambda name=name, judge=judge, adapt=adapt: judged(name, base, adapt, items[name], f"{judge}, {name}"),
            )
    results["environment"] = command.environment()
    results["seconds"] = round(time.time() - started, 1)
    command.write_json(directory / "results.json", results)
    processes.say(table(results))
    processes.say(f"{results['seconds']:.0f} s; {directory / 'results.json'}")


if __name__ == "__main__":
    command.run(main)
