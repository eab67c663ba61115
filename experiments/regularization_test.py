"""Table 1: what a model still answers after it has memorized true or random answers, question by question.

    python -m experiments.regularization_test --workdir=runs/regularization_test [--study=runs/randomization_test]

LoRA, memory experts on the attention's output projection and memory experts on the MLP's are tuned on the same facts,
with true and with random answers, as in `experiments.randomization_test`; --study uses the runs of such a study
instead of tuning again. Then the backbone and each of them answer the same held-out questions: accuracy with its 95%
interval, and the p-value of the exact paired test (McNemar's) that nothing changed. With --config.data.dir, TruthfulQA
(MC1, MC2) and MMLU are judged by likelihood as in `experiments.benchmarks`, for a backbone with enough context, on
questions that no run was tuned on: MC2, which is not a count, with the paired t-test. Beside a real backbone these take
the place of the world's questions, and are fewer (`shared/sizes.py`). Answers count as barely changed if at most one in
twenty changes from right to wrong or back (for MC2, if its mean changes by at most 0.05). The study that --study names
must have the same config.

Takes half a minute on 2 x86-64 cores (jax 0.10.2) with a finished study, without the benchmarks. Of 420 held-out
questions the backbone answers 90.0%; expect 90.0% after each of the four memory runs, 87.6% after LoRA on true answers
(19 lost, 9 won, p = 0.09) and 0.2% after LoRA on random ones.
"""

from pathlib import Path

import numpy as np
import scipy.stats
from absl import flags

from experiments.shared import held_out, plotting, random_answer_runs, study
from experiments.shared.claims import Claim, percent
from lamini_jax import UserError
from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data import datasets
from lamini_jax.data.world import QA
from lamini_jax.evaluation import intervals, multiple_choice, recall

PER_KIND = 20  # held-out questions of each kind of the world
SAMPLES = 4  # answers that the table shows, in addition to that of a tuned fact
WIDEST = 70  # characters of an answer that the table shows
BARELY = 0.05  # the share of a test's answers that may change
# By test, the benchmark that it uses and the function that judges an item's scores.
JUDGES = {
    "truthful_qa mc1": ("truthful_qa", multiple_choice.mc1),
    "truthful_qa mc2": ("truthful_qa", multiple_choice.mc2),
    "mmlu": ("mmlu", multiple_choice.likeliest),
}


def define_flags() -> None:
    flags.DEFINE_string("study", None, "Directory of a randomization_test; without it, tunes its own runs.")


def judged(model: FrozenModel, adapter_fn: AdapterFn, questions: list[QA], items: dict[str, list]) -> dict[str, list]:
    """By test, the score of each question: whether it is right, or MC2's share. `items` must fit in the context."""
    earned = {"heldout": recall.accuracy(model, adapter_fn, questions)} if questions else {}
    scores = {name: multiple_choice.score(model, adapter_fn, group) for name, group in items.items()}
    for test, (name, judge) in JUDGES.items():
        if items.get(name):
            earned[test] = list(map(judge, items[name], scores[name]))
    return earned


def compared(before: list, after: list) -> dict:
    """The mean with its 95% interval, how many are worse and better than before, and the p-value of no change."""
    before_Q, after_Q = np.array(before, float), np.array(after, float)
    lost, won = int((after_Q < before_Q).sum()), int((after_Q > before_Q).sum())
    counts = isinstance(after[0], bool)
    if not lost + won:
        p = 1.0
    elif counts:
        p = scipy.stats.binomtest(lost, lost + won).pvalue
    else:
        p = scipy.stats.ttest_rel(before_Q, after_Q).pvalue if after_Q.size > 1 else 1.0
    interval = intervals.wilson(int(after_Q.sum()), after_Q.size) if counts else intervals.normal(after)
    return {
        "questions": after_Q.size,
        "accuracy": float(after_Q.mean()),
        "interval": interval,
        "lost": lost,
        "won": won,
        "changed": (lost + won) / after_Q.size if counts else abs(float((after_Q - before_Q).mean())),
        "p": float(p),
    }


def claims(results: dict) -> list[Claim]:
    """The claims of Table 1: the tuned fact comes back, other answers stay."""
    # A test in which the backbone answers nothing right has nothing to lose.
    before = {test: start for test, start in results["runs"]["backbone"]["tests"].items() if start["accuracy"] > 0}
    judgements = []
    for method in random_answer_runs.PAPER_METHODS if before else ():
        tuned = {answers: results["runs"][f"{method}/{answers}"]["tests"] for answers in datasets.ANSWERS}
        parts = [
            f"{test}: {percent(start['accuracy'])} before"
            + "".join(
                f", {percent(tests[test]['accuracy'])} after {answers} answers ({tests[test]['lost']} lost, "
                f"{tests[test]['won']} won, p {tests[test]['p']:.2g})"
                for answers, tests in tuned.items()
            )
            for test, start in before.items()
        ]
        judgements.append(
            Claim(
                f"Held-out answers barely change by memorizing ({method}; Table 1)",
                f"Right answers of {'; '.join(parts)}",
                {
                    f"at most {BARELY:.0%} of each test's answers change after {answers} answers": all(
                        tests[test]["changed"] <= BARELY for test in before
                    )
                    for answers, tests in tuned.items()
                },
            )
        )
    returned = {name: run["fact"]["exact"] for name, run in results["runs"].items() if name != "backbone"}
    comes_back = Claim(
        "The trained fact comes back exactly, a random string included (Table 1)",
        f"In {sum(returned.values())} of {len(returned)} runs",
        {f"it comes back after {name}": exact for name, exact in returned.items()},
    )
    return [*judgements, comes_back]


def shown(answer: str) -> str:
    """An answer in one line of a table."""
    text = "".join(letter if letter.isprintable() else " " for letter in answer)
    return text if len(text) <= WIDEST else f"{text[:WIDEST]} ... ({len(text)} characters)"


def table(results: dict) -> str:
    """The results and the sample answers as text."""
    lines = []
    for test, start in results["runs"]["backbone"]["tests"].items():
        heading = f"{test}, {start['questions']:,}"
        lines.append(f"{'run':<24}{heading:<28}{'worse':>6}{'better':>8}{'p':>9}")
        for name, run in results["runs"].items():
            after = run["tests"][test]
            interval = f"{percent(after['accuracy'])} [{' to '.join(map(percent, after['interval']))}]"
            lines.append(f"{name:<24}{interval:<28}{after['lost']:>6}{after['won']:>8}{after['p']:>9.2g}")
    for number, qa in enumerate(results["samples"]):
        lines.append(f"\n{qa['question']}  (right: {qa['answer']})")
        lines += [f"  {name:<22}{shown(run['samples'][number])}" for name, run in results["runs"].items()]
    for answers in datasets.ANSWERS:
        names = [name for name in random_answer_runs.PAPER_RUNS if name.endswith(f"/{answers}")]
        tuned = {name: results["runs"][name]["fact"] for name in names}
        fact = next(iter(tuned.values()))
        lines.append(f"\n{fact['question']}  (tuned: {fact['answer']})")
        lines += [f"  {name:<22}{shown(fact['generated'])}" for name, fact in tuned.items()]
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Accuracy of the backbone and after each run, one panel per test, with 95% intervals."""
    names, tests = list(results["runs"]), results["runs"]["backbone"]["tests"]
    colours = ["tab:gray", *(plotting.ANSWER_COLOURS[name.split("/")[1]] for name in names[1:])]
    size = 9 + 4 * (len(tests) - 1), 5
    figure, axes = plotting.plt.subplots(1, len(tests), figsize=size, squeeze=False, layout="constrained")
    for axis, (test, start) in zip(axes[0], tests.items(), strict=True):
        measured = [results["runs"][name]["tests"][test] for name in names]
        accuracies = np.array([one["accuracy"] for one in measured])
        low, high = np.array([one["interval"] for one in measured]).T
        axis.bar(names, accuracies, yerr=[accuracies - low, high - accuracies], color=colours, capsize=4)
        axis.axhspan(*start["interval"], color="tab:gray", alpha=0.15)
        axis.set(ylim=(0, 1.02), title=f"{test}: {start['questions']:,} questions")
        axis.tick_params(axis="x", labelrotation=90 if len(tests) > 1 else 20)
    axes[0][0].set_ylabel("share answered right")
    figure.suptitle("Questions that nothing was tuned on, before and after memorizing (Table 1)")
    plotting.save(figure, path, dpi=120)


def measure(
    setting: random_answer_runs.Setting, name: str, questions: list[QA], samples: list[QA], items: dict
) -> dict:
    """The scores and the answers of the backbone, or of one of the runs."""
    model, adapter_fn, fact = setting.model, answering.BARE, {}
    if name != "backbone":
        tuned, facts = random_answer_runs.tune(setting, name)
        model, adapter_fn = tuned.model, tuned.adapter_fn
        (generated,) = answering.answers(model, adapter_fn, [facts[0].question])
        fact = {"question": facts[0].question, "answer": facts[0].answer, "generated": generated}
        fact["exact"] = generated == facts[0].answer
    said = answering.answers(model, adapter_fn, [qa.question for qa in samples])
    return {"earned": judged(model, adapter_fn, questions, items), "samples": said, "fact": fact}


def main(arguments: study.Arguments) -> None:
    config, other = arguments.config, arguments.flags.study
    if other and not (Path(other) / "results.json").exists():
        raise UserError(f"--study={other}: no finished randomization_test")
    setting = random_answer_runs.prepare(config, other or f"{arguments.workdir}/runs")
    directory = study.open_study(arguments.workdir, config, setting.model, study=other)
    questions = held_out.world_questions(config, PER_KIND)
    items = held_out.benchmark_items(config, setting.model, setting.questions)
    samples = questions or [QA("", item.question, item.choices[0].strip()) for item in items["truthful_qa"]]
    samples = samples[:: max(len(samples) // SAMPLES, 1)][:SAMPLES]
    runs = {}
    for name in ("backbone", *random_answer_runs.PAPER_RUNS):
        path = directory / f"{name.replace('/', '_')}.json"
        runs[name] = study.cached(path, measure, setting, name, questions, samples, items)
    before = runs["backbone"]["earned"]
    for run in runs.values():
        run["tests"] = {test: compared(before[test], earned) for test, earned in run.pop("earned").items()}
    results = {"samples": [{"question": qa.question, "answer": qa.answer} for qa in samples], "runs": runs}
    study.finish(directory, results | study.totals(runs.values()), table, claims, draw)


if __name__ == "__main__":
    study.start(main, define_flags)
