"""Standard benchmarks, on which nothing was tuned: TruthfulQA (MC1, MC2) and MMLU (5-shot), without and with memory.

    python -m experiments.benchmarks --workdir=runs/benchmarks --config.data.dir=DATA
    python -m experiments.benchmarks --workdir=runs/benchmarks_memory --config.data.dir=DATA --memory_workdir=DIR

DATA holds TruthfulQA.csv and mmlu/{dev,test}/*.csv (`lamini_jax/data/benchmarks.py` says from where). DIR is the work
directory of a finished `lamini_jax.tune`: then its config is used, except for data and execution, and the backbone is
judged with its memory too. The score of a choice is the sum of its tokens' log-likelihoods, as in
lm-evaluation-harness; each question selects its own experts. Started again, it continues after the last benchmark that
was finished.

Takes 5 minutes on 2 x86-64 cores that do other work too (jax 0.10.2), and twice that with a memory. Expect the tiny
backbone to be no better than chance, before and after tuning 50 entries of a phone book:

                TruthfulQA MC1            MC2                       MMLU
    backbone    21.7% [19.0% to 24.7%]    49.3% [45.9% to 52.7%]    21.9% [20.4% to 23.4%]
    memory      21.7% [19.0% to 24.7%]    49.3% [45.9% to 52.7%]    21.8% [20.3% to 23.3%]

Guessing gets 22.7% in MC1, and 45.0% in MC2. In MMLU this backbone prefers A or D whatever the question; these are
right for 22.3% and 23.5%. With its context of 256 bytes MMLU is no fair test: of 14,042 questions 2,840 fit without
examples, 36 with one, and 11,166 do not fit; of TruthfulQA's 817, 6 do not.
"""

import dataclasses
import time
from collections import Counter
from pathlib import Path

from absl import flags

from experiments.shared import study
from lamini_jax import UserError
from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.answering import BARE, AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import DataConfig
from lamini_jax.data import benchmarks
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.evaluation import multiple_choice
from lamini_jax.memory import storage
from lamini_jax.runtime import processes


def define_flags() -> None:
    flags.DEFINE_string("memory_workdir", None, "Work directory of a finished `lamini_jax.tune`.")
    flags.DEFINE_integer("per_subject", None, "Use only so many of MMLU's questions per subject.", lower_bound=1)


def load_items(directory: str, per_subject: int | None) -> dict[str, list[MultipleChoice]]:
    """The items of both benchmarks."""
    return {"truthful_qa": benchmarks.truthful_qa(directory), "mmlu": benchmarks.mmlu(directory, per_subject)}


def judged(name: str, model: FrozenModel, adapter_fn: AdapterFn, items: list[MultipleChoice], title: str) -> dict:
    """The results of one benchmark, on the items that fit in the context."""
    length = model.max_seq_len
    fitting = benchmarks.fitting(items, model.tokenizer, length)
    if not fitting:
        flag = f"--config.backbone.max_seq_len={length}"
        raise UserError(f"{name}: none of its {len(items)} questions fits in {flag} tokens")
    total = sum(len(item.choices) for item in fitting)
    with processes.progress_bar(total=total, desc=title, unit="choice") as progress:
        scores = multiple_choice.score(model, adapter_fn, fitting, progress.update)
    left_out = len(items) - len(fitting)
    if name == "mmlu":
        shots = sorted(Counter(len(item.shots) for item in fitting).items(), reverse=True)
        return {**multiple_choice.mmlu_results(fitting, scores, left_out), "shots": dict(shots)}
    return {**multiple_choice.truthful_qa_results(fitting, scores), "left_out": left_out}


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


def main(arguments: study.Arguments) -> None:
    config, memory_workdir, data = arguments.config, arguments.flags.memory_workdir, arguments.config.data
    if not data.dir:
        raise UserError(f"--config.data.dir is empty; name the folder of {benchmarks.TRUTHFUL_QA_FILE} and mmlu")
    items = load_items(data.dir, arguments.flags.per_subject)
    if memory_workdir:
        tuned = storage.run_config(Path(memory_workdir))
        config = dataclasses.replace(tuned, data=data, execution=config.execution)
    model, started = frozen_model.load(config), time.time()
    identity = {"memory": memory_workdir, "items": {name: benchmarks.fingerprint(items[name]) for name in items}}
    # The fingerprints stand for the files' contents; where the files are does not matter.
    directory = study.open_study(arguments.workdir, dataclasses.replace(config, data=DataConfig()), model, **identity)
    judges = {"backbone": BARE}
    if memory_workdir:
        memory = storage.load_run(config, Path(memory_workdir) / "checkpoints")
        judges["memory"] = storage.adapter_fn(model, memory, config)
    runs = {judge: {} for judge in judges}
    for judge, adapter_fn in judges.items():
        for name in items:
            path, title = directory / f"{judge}_{name}.json", f"{judge}, {name}"
            runs[judge][name] = study.cached(path, judged, name, model, adapter_fn, items[name], title)
    study.finish(directory, {"runs": runs, "seconds": round(time.time() - started, 1)}, table)


if __name__ == "__main__":
    study.start(main, define_flags)
