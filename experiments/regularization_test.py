"""Table 1: what a model still answers after it has memorized true or random answers, question by question.

    python -m experiments.regularization_test --workdir=runs/regularization_test [--study=runs/randomization_test]

LoRA, memory experts on the attention's output projection and memory experts on the MLP's are tuned on the same facts,
with true and with random answers, as in `experiments.randomization_test`; --study takes its six runs over and tunes
nothing again. Then the backbone and each of them answer the same held-out questions: accuracy with its 95% interval,
and the exact paired test (McNemar) of whether it changed. With --config.data.dir, TruthfulQA (MC1, MC2) and MMLU are
scored as well (`experiments.benchmarks`), which a backbone with the context for them can answer.

Not yet run from end to end at full size.
"""

import json
import time

import numpy as np
import scipy.stats
from absl import flags

from experiments import figures, six_runs
from experiments.claims import claim, share
from lamini_jax import command, model, processes, recall
from lamini_jax.data import benchmarks, world
from lamini_jax.data.world import QA

_CONFIG = command.define_config()
command.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_STUDY = flags.DEFINE_string("study", None, "Directory of a randomization_test; empty: runs of its own.")

PER_KIND = 20  # held-out questions of each kind of the world
PER_SUBJECT = 5  # questions of each subject of MMLU
SAMPLES = 4  # answers that the table shows, beside that of a tuned fact
CHANGED = 0.05  # p below which an accuracy has changed


def answered(base: model.Base, adapt: recall.Adapt, questions: list[QA], samples: list[str]) -> dict:
    """Which questions are right, and the text of some answers."""
    return {"right": recall.accuracy(base, adapt, questions), "samples": recall.answers(base, adapt, samples)}


def scored(base: model.Base, adapt: recall.Adapt, items: dict[str, list]) -> dict:
    """TruthfulQA's and MMLU's figures, on the items that fit in the context."""
    results = {}
    for name, group in items.items():
        fitting = benchmarks.fitting(group, base.tokenizer, base.decoder.config.context)
        scores = recall.score(base, adapt, fitting)
        if name == "mmlu":
            results[name] = recall.mmlu_results(fitting, scores, len(group) - len(fitting))
        else:
            results[name] = recall.truthful_qa_results(fitting, scores)
    return results


def compared(before: list[bool], after: list[bool]) -> dict:
    """Accuracy with its 95% interval, and the p of McNemar's exact test that it is what it was."""
    before_Q, after_Q = np.array(before), np.array(after)
    lost, won = int((before_Q & ~after_Q).sum()), int((~before_Q & after_Q).sum())
    p = scipy.stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    return {
        "accuracy": float(after_Q.mean()),
        "interval": recall.wilson(int(after_Q.sum()), after_Q.size),
        "lost": lost,
        "won": won,
        "p": float(p),
    }


def claims(results: dict) -> list[dict]:
    """Table 1: the tuned fact comes back, other answers stay."""
    before, found = results["runs"]["backbone"], []
    for method in six_runs.METHODS:
        tuned = {answers: results["runs"][f"{method}/{answers}"] for answers in ("true", "random")}
        told = [
            f"{share(run['accuracy'])} after {answers} answers ({run['lost']} lost, {run['won']} won, p {run['p']:.2g})"
            for answers, run in tuned.items()
        ]
        found.append(
            claim(
                f"held-out answers barely change by memorizing ({method}; Table 1)",
                f"{share(before['accuracy'])} before, {', '.join(told)}",
                *(run["p"] >= CHANGED for run in tuned.values()),
            )
        )
    returned = {name: run["fact"]["exact"] for name, run in results["runs"].items() if name != "backbone"}
    found.append(
        claim(
            "the trained fact comes back exactly, a random string included (Table 1)",
            f"in {sum(returned.values())} of {len(returned)} runs",
            *returned.values(),
        )
    )
    return found


def table(results: dict) -> str:
    """The results and the sample answers as text."""
    lines = [f"{'run':<24}{'held-out':<28}{'lost':>6}{'won':>6}{'p':>9}"]
    for name, run in results["runs"].items():
        interval = f"{share(run['accuracy'])} [{' to '.join(map(share, run['interval']))}]"
        lines.append(f"{name:<24}{interval:<28}{run['lost']:>6}{run['won']:>6}{run['p']:>9.2g}")
        for benchmark, scores in run.get("scores", {}).items():
            figures_ = ("mc1", "mc2") if benchmark == "truthful_qa" else ("accuracy",)
            told = ", ".join(f"{key} {share(scores[key])}" for key in figures_)
            lines.append(f"  {benchmark}: {told} of {scores['questions']:,} questions")
    for number, qa in enumerate(results["samples"]):
        lines.append(f"\n{qa['question']}  (right: {qa['answer']})")
        lines += [f"  {name:<22}{run['samples'][number]}" for name, run in results["runs"].items()]
    for name, run in results["runs"].items():
        if name != "backbone":
            lines.append(f"\n{run['fact']['question']}  (tuned: {run['fact']['answer']})")
            lines.append(f"  {name:<22}{run['fact']['generated']}")
    return "\n".join(lines)


def main() -> None:
    config = model.configure(_CONFIG.value)
    command.start(config.mesh)
    started = time.time()
    directory = command.open_workdir(_WORKDIR.value, {"study": _STUDY.value})
    study = six_runs.prepare(config, _STUDY.value or str(directory / "runs"))
    kinds = [kind for kind in world.KINDS if config.data.facts != "world" or kind not in world.FACT_KINDS]
    questions = [qa for kind in kinds for qa in world.held_out(kind, PER_KIND, config.seed)]
    samples = questions[:: len(questions) // SAMPLES][:SAMPLES]
    asked = [qa.question for qa in samples]
    items = {}
    if config.data.dir:
        items["truthful_qa"] = benchmarks.truthful_qa(config.data.dir)
        items["mmlu"] = benchmarks.mmlu(config.data.dir, PER_SUBJECT)
    found = {}
    for name in ("backbone", *six_runs.RUNS):
        saved = directory / f"{name.replace('/', '_')}.json"
        if not processes.agree(saved.exists()):
            if name == "backbone":
                adapt, fact = recall.bare, {}
            else:
                tuned, facts = six_runs.tune(study, name)
                adapt, fact = tuned.adapt, {"question": facts[0].question, "answer": facts[0].answer}
                fact["generated"] = recall.answers(study.base, adapt, [facts[0].question])[0]
                fact["exact"] = fact["generated"] == facts[0].answer
            result = {**answered(study.base, adapt, questions, asked), "fact": fact}
            if items:
                result["scores"] = scored(study.base, adapt, items)
            command.write_json(saved, result)
            processes.meet(name)
        found[name] = json.loads(saved.read_text())
    before = found["backbone"]["right"]
    results = {
        "questions": len(questions),
        "samples": [{"question": qa.question, "answer": qa.answer} for qa in samples],
        "runs": {name: {**compared(before, run.pop("right")), **run} for name, run in found.items()},
    }
    results["claims"] = claims(results)
    results["environment"] = command.environment()
    results["seconds"] = round(time.time() - started, 1)
    command.write_json(directory / "results.json", results)
    if processes.first():
        figures.regularization(results, directory / "figures.png")
    processes.say(table(results))
    processes.say(f"{results['seconds']:.0f} s; {directory / 'results.json'}, {directory / 'figures.png'}")


if __name__ == "__main__":
    command.run(main)
