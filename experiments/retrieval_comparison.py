"""Sections 4 and 10: memory experts compared with information retrieval and LoRA, on the same facts.

    pip install -e .[report]
    python -m experiments.retrieval_comparison --workdir=runs/retrieval_comparison

A phone book is put into a B-tree (SQLite), inverted indexes (TF-IDF of words and of three letters in a row, BM25), an
exact vector index over the router's queries (faiss), a LoRA and memory experts. Each is asked about every entry as it
was stored (`verbatim`), with one or two edited characters (`typos`) and in other words (`rephrased`), and about names
that are not in the book (`unknown`), where the only right answer is none. An answer is exact, wrong (a hallucination)
or not given. Beside a real backbone the facts are those of the config, with their true answers, and `unknown` are
questions that follow them in their data set; they have no other words, unless the config names the phone book.

Retrieval always finds something, so it answers only if the score reaches a threshold: the one with the best result in a
calibration, where an exact answer counts 1, a wrong one -1 and no answer 0. The calibration has equally many questions
of each kind; except for the verbatim ones, which have only one wording, they differ from those of the test. The models
cannot refuse by themselves: `+ refusal` applies the same rule to the probability of the answer's least likely token.
`+ known experts` needs no calibration: it answers only if all experts that the question selects are trained, which the
frozen router shows before anything is decoded. `facts` is the other kind of memory, which answers only questions in a
stored fact's scope; with `+ refusal`, its threshold too is that of the calibration. Latency is that of one question,
from text to text; bytes are those of the index and the answers, of LoRA's adapters, of the experts that facts have
selected, or of the memory's files. A killed run continues with the system that it was measuring.

Takes 2 minutes on 2 x86-64 cores (jax 0.10.2). Expect all systems without `+` to answer all 1,000 verbatim questions
exactly. Wrong answers to typos, rephrased and unknown: LoRA 51%, 99.5% and 100%, memory experts 98%, 100% and 100%,
with known experts none of 3,000; TF-IDF of letters 0, 0 and 2 questions. A threshold on the share of known experts from
the calibration (0.70) would have let 3 wrong answers through.
"""

import dataclasses
import statistics
import timeit
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import retrieval_comparison_systems as retrieval
from experiments.retrieval_comparison_systems import Reply, System
from experiments.shared import flops, held_out, plotting, sizes, study
from experiments.shared.claims import Claim
from lamini_jax import Fact, UserError, api
from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import AdapterFn, Answer
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, DataConfig
from lamini_jax.fact_memory import FactMemory
from lamini_jax.memory import experts, routers
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.runtime import cli, processes
from lamini_jax.training import run

RETRIEVAL = ("b_tree", "tfidf_words", "tfidf_letters", "bm25", "vector")
MODELS = ("lora", "mome")
REFUSING, KNOWN = " + refusal", " + known experts"
CALIBRATION = 250  # questions of each kind, fewer where there are fewer facts

QUESTION = "What is the phone number of ", "?"
TEMPLATES = (
    "Give me {}'s phone number.",
    "How can I reach {} by phone?",
    "Which number do I dial for {}?",
    "{}: what is the number?",
    "Under what number is {} listed?",
)
CALIBRATION_TEMPLATES = (
    "Tell me the phone number of {}.",
    "What number does {} have?",
    "I want to call {}. Which number?",
)
_SURE = 1e3  # the score of a stored wording, which is infinite
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Asked = dict[str, list[tuple[str, str | None]]]  # by kind: a question, and its answer if it has one


def edited(text: str, rng: np.random.Generator, taken: Collection[str]) -> str:
    """`text` with one or two characters inserted, deleted, replaced or swapped with the next; never one of `taken`."""
    result = text
    while result == text or result in taken:
        result = text
        for _ in range(rng.integers(1, 3)):
            at, letter = int(rng.integers(len(result) - 1)), _LETTERS[rng.integers(len(_LETTERS))]
            rest = result[at:]
            edits = letter + rest, rest[1:], letter + rest[1:], rest[1::-1] + rest[2:]
            result = result[:at] + edits[rng.integers(len(edits))]
    return result


def questions(facts: Sequence[Fact], strangers: Sequence[Fact], seed: int) -> tuple[Asked, Asked]:
    """The questions of the test and of the calibration, each with strangers of its own; only names are rephrased."""
    count, calibrating = len(facts), min(CALIBRATION, len(facts))
    stored = {fact.question for fact in facts}
    by_name = all(fact.question.startswith(QUESTION[0]) for fact in facts)

    def asked(facts, stream, templates, strangers):
        rng = np.random.default_rng((seed, stream))
        answers = [fact.answer for fact in facts]
        texts = {
            "verbatim": [fact.question for fact in facts],
            "typos": [edited(fact.question, rng, stored) for fact in facts],
        }
        if by_name:
            names = [fact.question.removeprefix(QUESTION[0]).removesuffix(QUESTION[1]) for fact in facts]
            texts["rephrased"] = [templates[i % len(templates)].format(name) for i, name in enumerate(names)]
        known = {kind: list(zip(questions, answers, strict=True)) for kind, questions in texts.items()}
        return known | {"unknown": [(fact.question, None) for fact in strangers]}

    picked = np.random.default_rng((seed, 2)).permutation(count)[:calibrating]
    test = asked(facts, 0, TEMPLATES, strangers[:count])
    return test, asked([facts[i] for i in picked], 1, CALIBRATION_TEMPLATES, strangers[count : count + calibrating])


def threshold(replies: Sequence[Reply], answers: Sequence[str | None]) -> float:
    """The least score of an answer that gives the best result, where an exact answer counts 1, a wrong one -1.

    Of equally good thresholds it is the highest, halfway between the last accepted score and the next one.
    """
    given = sorted((pair for pair in zip(replies, answers, strict=True) if pair[0].text), key=lambda p: -p[0].score)
    scores = [reply.score for reply, _ in given]
    earned = np.cumsum([1 if reply.text == answer else -1 for reply, answer in given])
    ends = [i for i in range(len(given)) if i + 1 == len(given) or scores[i + 1] < scores[i]]
    best = max(ends, key=lambda i: earned[i], default=None)
    if best is None or earned[best] <= 0:
        return float(np.nextafter(scores[0], np.inf)) if scores else 0.0
    return (scores[best] + scores[best + 1]) / 2 if best + 1 < len(scores) else scores[best]


def judge(replies: Sequence[Reply], answers: Sequence[str | None], least: float | None) -> dict[str, Any]:
    """How many answers are exact, wrong and not given."""
    texts = [reply.text if least is None or reply.score >= least else None for reply in replies]
    none = sum(not text for text in texts)
    exact = sum(bool(text) and text == answer for text, answer in zip(texts, answers, strict=True))
    return {"questions": len(texts), "exact": exact, "wrong": len(texts) - none - exact, "none": none}


def model_system(
    model: FrozenModel, adapter_fn: AdapterFn, facts: Sequence[Fact], size: int, trained_ids: np.ndarray | None = None
) -> System:
    """Greedy decoding, cut off one token after the book's longest answer. `trained_ids` are the trained experts."""
    longest = 1 + max(len(model.tokenizer.completion(fact.answer)) for fact in facts)

    def reply(said: Answer) -> Reply:
        known = None if trained_ids is None else float(np.isin(said.selection.expert_ids_BK, trained_ids).mean())
        return Reply(said.text, said.probability, known)

    def answer(texts):
        said = dict(answering.ask(model, adapter_fn, texts, longest))
        return [reply(said[i]) for i in range(len(texts))]

    return System(answer, size)


def fact_system(memory: FactMemory, facts: Sequence[Fact]) -> System:
    """A memory of facts, which answers with the nearest fact and says whether the question is in its scope."""
    longest = 1 + max(len(memory.model.tokenizer.completion(fact.answer)) for fact in facts)

    def answer(texts):
        found = memory.find(texts)
        said = memory.ask_about(texts, [one.best for one in found], longest)
        pairs = zip(said, found, strict=True)
        return [Reply(each.text, min(one.score, _SURE), float(one.fact is not None)) for each, one in pairs]

    return System(answer, sum(path.stat().st_size for path in memory.directory.rglob("*") if path.is_file()))


def latency(system: System, texts: Sequence[str]) -> float:
    """The median of seconds per question, one at a time."""
    system.answer(texts[:1])
    return statistics.median(timeit.timeit(lambda text=text: system.answer([text]), number=1) for text in texts)


def contenders(
    config: Config, model: FrozenModel, router: routers.Router, facts: list[Fact], directory: Path, lora_epochs: int
) -> dict[str, Callable[[], tuple[System, dict]]]:
    """By name, a function that prepares the system and returns it with a description of its training."""

    def training(tuned: run.Tuned) -> dict:
        rest = {"certified_F": tuned.certified_F.tolist(), "tuning_seconds": sum(tuned.progress.seconds)}
        return {"epochs": tuned.progress.epoch, **rest}

    def tuned_lora():
        budget = dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, epochs=lora_epochs))
        tuned = run.lora_run(budget, model, facts, directory / "lora", "LoRA").result()
        size = 4 * flops.trained_parameters(config, "lora")  # bytes of float32
        return model_system(tuned.model, tuned.adapter_fn, facts, size), training(tuned)

    def tuned_memory():
        title = "memory experts"
        tuned = run.memory_run(config, model, facts, directory / "mome", title, router, until_all_hold=True).result()
        used = np.unique(tuned.expert_ids_FK)
        floats = experts.expert_shape(config.backbone, config.memory).floats
        size = used.size * floats * np.dtype(config.memory.dtype).itemsize
        system = model_system(tuned.model, tuned.adapter_fn, facts, size, used)
        return system, training(tuned) | {"experts_used": used.size}

    def living_memory():
        router = dataclasses.replace(config.router, kind="facts")
        changed = dataclasses.replace(config.memory, top_k=2, positions="answer", dtype="bfloat16")
        memory = api.open_memory(directory / "memory", dataclasses.replace(config, memory=changed, router=router))
        added = memory.add(facts)
        certified_F = [fact.certified for fact in memory.facts()]
        used = {"experts_used": len(memory.table.contents.rows), "tuning_seconds": added.seconds}
        return fact_system(memory, facts), {"epochs": added.epochs, "certified_F": certified_F, **used}

    def embed(texts):
        return expert_router.queries(model, router, texts)

    return {
        "b_tree": lambda: (retrieval.b_tree(facts), {}),
        "tfidf_words": lambda: (retrieval.tfidf(facts, "word"), {}),
        "tfidf_letters": lambda: (retrieval.tfidf(facts, "char_wb"), {}),
        "bm25": lambda: (retrieval.bm25(facts), {}),
        "vector": lambda: (retrieval.vector(facts, embed), {}),
        "lora": tuned_lora,
        "mome": tuned_memory,
        "facts": living_memory,
    }


def measured(make, asked: Asked, calibration: Asked, num_facts: int, timed: int) -> dict:
    """All replies of a system, its latency and its size."""
    system, extra = make()

    def replies(asked):
        return {kind: system.answer([text for text, _ in pairs]) for kind, pairs in asked.items()}

    result = {"test": replies(asked), "calibration": replies(calibration)}
    if certified := extra.pop("certified_F", None):
        verbatim = zip(result["test"]["verbatim"], asked["verbatim"], strict=True)
        exact_F = np.array([reply.text == answer for reply, (_, answer) in verbatim])
        result["certificates"] = study.certificates(np.array(certified), exact_F)
    seconds = latency(system, [text for text, _ in asked["verbatim"][:timed]])
    return result | {"latency_seconds": seconds, "bytes_per_fact": system.size / num_facts, **extra}


def row(found: dict, asked: Asked, calibration: Asked, refusal: str) -> dict:
    """Judges a system's replies: all, or with REFUSING those above a threshold, or with KNOWN those all `known`."""

    def flat(parts):
        return [part for kind in asked for part in parts[kind]]

    def read(kinds):
        return {kind: [Reply(*reply) for reply in replies] for kind, replies in kinds.items()}

    test, least = read(found["test"]), None
    if refusal == KNOWN:
        test, least = {kind: [r._replace(score=r.known) for r in some] for kind, some in test.items()}, 1.0
    elif refusal == REFUSING:
        least = threshold(flat(read(found["calibration"])), [answer for _, answer in flat(calibration)])
    counts = {kind: judge(test[kind], [answer for _, answer in asked[kind]], least) for kind in asked}
    rest = {name: value for name, value in found.items() if name not in ("test", "calibration")}
    return {"threshold": least, "sets": counts, **rest}


def rows(found: dict[str, dict], asked: Asked, calibration: Asked) -> dict[str, dict]:
    """A row for each system, one more for each model with `+ refusal`, and one with `+ known experts`."""
    result = {}
    for name, replies in found.items():
        result[name] = row(replies, asked, calibration, REFUSING if name in RETRIEVAL and name != "b_tree" else "")
        if name in MODELS:
            result[name + REFUSING] = row(replies, asked, calibration, REFUSING)
    result["mome" + KNOWN] = row(found["mome"], asked, calibration, KNOWN)
    result["facts"] = row(found["facts"], asked, calibration, KNOWN)
    result["facts" + REFUSING] = row(found["facts"], asked, calibration, REFUSING)
    return result


def share(row: dict, outcome: str, kinds: Sequence[str] = ()) -> float:
    """The share of an outcome over some sets of questions, or over all."""
    kinds = kinds or list(row["sets"])
    return sum(row["sets"][kind][outcome] for kind in kinds) / sum(row["sets"][kind]["questions"] for kind in kinds)


def claims(results: dict) -> list[Claim]:
    """The paper's claims, with what was measured."""
    systems = results["systems"]
    verbatim, knowing = systems["mome"]["sets"]["verbatim"], systems[f"mome{KNOWN}"]
    asked_otherwise = [kind for kind in systems["mome"]["sets"] if kind != "verbatim"]
    reworded = [kind for kind in asked_otherwise if kind != "unknown"]
    wrong = {name: share(system, "wrong") for name, system in systems.items()}
    invented = {name: share(system, "wrong", asked_otherwise) for name, system in systems.items()}
    better = {name: 0 < wrong[name] < wrong["lora"] for name in RETRIEVAL}
    percents = ", ".join(f"{name} {100 * wrong[name]:.1f}%" for name in ("lora", *RETRIEVAL, f"lora{REFUSING}"))
    others = [invented[name] for name in RETRIEVAL]
    return [
        Claim(
            "Memory experts return the facts that they were tuned on and hallucinate none of them (section 7)",
            f"Of {verbatim['questions']} questions as they were stored, {verbatim['exact']} are answered exactly, "
            f"{verbatim['wrong']} wrongly and {verbatim['none']} not at all",
            {
                "all are answered exactly": verbatim["exact"] == verbatim["questions"],
                "99 of a hundred are": verbatim["exact"] >= 0.99 * verbatim["questions"],
            },
        ),
        Claim(
            "Information retrieval mitigates hallucination and does not remove it (sections 4 and 10)",
            f"Wrong answers over all kinds of questions: {percents}; {sum(better.values())} of {len(better)} "
            "retrieval systems give some and fewer than LoRA",
            {f"{name} gives some wrong answers, and fewer than LoRA": holds for name, holds in better.items()},
        ),
        # Refusing is not in the paper.
        Claim(
            "Memory experts remove hallucination where information retrieval does not (sections 4, 7 and 10)",
            f"Of other questions ({', '.join(asked_otherwise)}) memory experts answer "
            f"{100 * invented['mome']:.1f}% wrongly ({100 * share(systems['mome'], 'wrong', ['unknown']):.1f}% of the "
            f"unknown ones), or {100 * invented[f'mome{REFUSING}']:.1f}% where an unlikely answer is refused. Where "
            "questions are refused that select experts which no fact has trained, it is "
            f"{100 * invented[f'mome{KNOWN}']:.1f}%, with {100 * share(knowing, 'exact', ['verbatim']):.1f}% of the "
            "verbatim questions answered exactly and "
            f"{100 * share(knowing, 'exact', reworded):.1f}% of {' and '.join(reworded)}. Retrieval systems "
            f"answer {100 * min(others):.1f}% to {100 * max(others):.1f}% wrongly",
            {
                "memory experts give no wrong answers": invented["mome"] == 0,
                "they give fewer than any retrieval system": invented["mome"] < min(others),
            },
        ),
        Claim(
            "The same of a memory whose questions select a fact or nothing (not in the paper)",
            f"Of other questions it answers {100 * invented['facts']:.2f}% wrongly, and "
            f"{100 * share(systems['facts'], 'exact', reworded):.1f}% of {' and '.join(reworded)} exactly; with the "
            f"threshold of the calibration {100 * invented[f'facts{REFUSING}']:.2f}% and "
            f"{100 * share(systems[f'facts{REFUSING}'], 'exact', reworded):.1f}%. Retrieval systems answer "
            f"{100 * min(others):.2f}% to {100 * max(others):.2f}% wrongly",
            {
                "it gives no wrong answers": invented["facts"] == 0,
                "it gives fewer than the paper's router": invented["facts"] < invented["mome"],
            },
        ),
    ]


def table(results: dict) -> str:
    """The results as text: per cent exact, wrong and not answered of each set."""
    kinds = "".join(f"{kind:>20}" for kind in results["examples"])
    lines = [f"{'exact / wrong / none':<22}{kinds}{'ms':>9}{'bytes/fact':>12}"]
    for name, system in results["systems"].items():
        cells = ""
        for kind in results["examples"]:
            parts = (f"{100 * share(system, outcome, [kind]):.1f}" for outcome in ("exact", "wrong", "none"))
            cells += f"{' / '.join(parts):>20}"
        lines.append(f"{name:<22}{cells}{1e3 * system['latency_seconds']:>9.2f}{system['bytes_per_fact']:>12,.0f}")
    lora_run, memory = results["systems"]["lora"], results["systems"]["mome"]
    lines.append(
        f"{results['facts']} facts; LoRA {lora_run['epochs']} epochs in {lora_run['tuning_seconds']:.0f} s, "
        f"{lora_run['certificates']['certified']} certified; memory experts {memory['epochs']} epochs in "
        f"{memory['tuning_seconds']:.0f} s, {memory['certificates']['certified']} certified, "
        f"{memory['experts_used']:,} experts used"
    )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """How each system answers the questions of each kind; then time per question and bytes per fact."""
    systems = results["systems"]
    names, kinds = list(systems), list(results["examples"])
    places = range(len(names))
    figure, axes = plotting.plt.subplots(2, 3, figsize=(15, 8.5), sharey=True, layout="constrained")
    for axis, kind in zip(axes[:, :2].flat, kinds, strict=False):
        left = [0.0] * len(names)
        for outcome, colour in (("exact", "tab:green"), ("none", "lightgrey"), ("wrong", "tab:red")):
            counts = [systems[name]["sets"][kind] for name in names]
            shares = [100 * count[outcome] / count["questions"] for count in counts]
            label = {"none": "no answer"}.get(outcome, outcome)
            axis.barh(places, shares, left=left, color=colour, label=label)
            left = [start + width for start, width in zip(left, shares, strict=True)]
        axis.set(title=f"{kind}: {results['examples'][kind]}", xlabel="% of questions", xlim=(0, 100))
        axis.title.set_fontsize("medium")
    for axis, key, factor, title in (
        (axes[0][2], "latency_seconds", 1e3, "milliseconds per question"),
        (axes[1][2], "bytes_per_fact", 1, "bytes per fact"),
    ):
        bars = axis.barh(places, [factor * systems[name][key] for name in names], color="tab:blue")
        axis.bar_label(bars, fmt=lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}", padding=3)
        axis.set(title=title, xscale="log")
        axis.margins(x=0.25)
    for axis in axes[:, :2].flat[len(kinds) :]:
        axis.set_axis_off()
    axes[0][0].set_yticks(places, names)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{results['facts']} facts, stored and tuned")
    plotting.save(figure, path)


def define_flags() -> None:
    flags.DEFINE_integer(
        "facts", 1000, "Entries of the phone book, which is not used beside a real backbone.", lower_bound=4
    )
    flags.DEFINE_integer("lora_epochs", 30, "Epochs of LoRA, which never stops earlier.", lower_bound=1)


def main(arguments: study.Arguments) -> None:
    cli.require("report", *retrieval.MODULES)
    config, lora_epochs = arguments.config, arguments.flags.lora_epochs
    if not config.backbone.path:
        config = dataclasses.replace(config, data=DataConfig("phone_book", arguments.flags.facts))
    model, facts = study.load(config, "true")
    directory = study.open_study(arguments.workdir, config, model, facts, lora_epochs=lora_epochs)
    processes.print_once(f"{len(facts)} facts; training the router ...")
    router = routers.train(config, model, [fact.question for fact in facts])
    strangers = held_out.following(config, model, 2 * len(facts))
    if not strangers:
        raise UserError(f"--config.data.count={config.data.count}: leaves no question of {config.data.facts} unknown")
    asked, calibration = questions(facts, strangers, config.seed)
    replies, timed = {}, sizes.of(config).timed
    makers = contenders(config, model, router, facts, directory, lora_epochs)
    with processes.progress_bar(makers.items(), unit="system") as bar:
        for name, make in bar:
            bar.set_postfix_str(name)
            path = directory / f"replies_{name}.json"
            replies[name] = study.cached(path, measured, make, asked, calibration, len(facts), timed)
    results = {
        "facts": len(facts),
        "examples": {kind: pairs[0][0] for kind, pairs in asked.items()},
        "systems": rows(replies, asked, calibration),
        **study.totals(replies.values()),
    }
    study.finish(directory, results, table, claims, draw)


if __name__ == "__main__":
    study.start(main, define_flags)
