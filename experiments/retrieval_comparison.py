"""Sections 4 and 10: memory experts next to information retrieval and LoRA, on the same facts.

    pip install -e .[report]
    python -m experiments.retrieval_comparison --workdir=runs/retrieval_comparison

A phone book is put into a B-tree (SQLite), inverted indexes (TF-IDF of words and of three letters in a row, BM25), an
exact vector index over the router's queries (faiss), a LoRA and memory experts. Each is asked about every entry as it
was stored (`verbatim`), with one or two edited characters (`typos`) and in other words (`rephrased`), and about names
that are not in the book (`unknown`), where the only right answer is none. An answer is exact, wrong (a hallucination)
or not given.

Retrieval always finds something, so it answers only from a score on that earns most in a calibration, where an exact
answer earns 1, a wrong one costs 1 and none counts nothing. The calibration has as many questions of each of the four
kinds; all but the verbatim ones, which have one wording only, are others than those of the test. The models have no
refusal of their own: `+ refusal` answers by the same rule, on the probability of the answer's least likely token.
`+ known experts` needs no calibration: it answers if facts have trained all of the experts that the question selects,
which the frozen router tells before anything is decoded. Latency is that of one question, text in and text out; bytes
are those of the index and the answers, of LoRA's adapters, of the experts' rows that facts have selected. A killed run
continues with the system that it was at.

Takes 5 minutes on 2 x86-64 cores (jax 0.10.2). Expect all systems to answer all 1,000 verbatim questions exactly.
Wrong of typos, rephrased and unknown: LoRA 51%, 100% and 100%, memory experts 98%, 100% and 100%, with known experts
none of 3,000; TF-IDF of letters 0, 0 and 2 questions. A threshold on the share of known experts from the calibration
(0.70) would have let 3 wrong answers through.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.parts import figures, retrieval, study
from experiments.parts.claims import claim
from experiments.parts.retrieval import Reply
from lamini_jax import bank, command, lora, model, processes, recall, router, runs, sharding
from lamini_jax.config import Config, DataConfig
from lamini_jax.data import builders
from lamini_jax.data import facts as facts_lib
from lamini_jax.data.facts import Fact

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the comparison.", required=True)
_FACTS = flags.DEFINE_integer("facts", 1000, "Entries of the phone book.", lower_bound=4)
_LORA_EPOCHS = flags.DEFINE_integer("lora_epochs", 30, "Epochs of LoRA, which has no other end.", lower_bound=1)

SETS = ("verbatim", "typos", "rephrased", "unknown")
RETRIEVAL = ("b_tree", "tfidf_words", "tfidf_letters", "bm25", "vector")
MODELS = ("lora", "mome")
REFUSING, KNOWN = " + refusal", " + known experts"
CALIBRATION = 250  # questions of each kind, fewer where there are fewer facts
TIMED = 30

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
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Asked = dict[str, list[tuple[str, str | None]]]  # by kind: a question, and its answer if it has one


def edited(text: str, rng: np.random.Generator, taken: Collection[str]) -> str:
    """`text` with one or two characters inserted, left out, replaced or swapped with the next, and none of `taken`."""
    result = text
    while result == text or result in taken:
        result = text
        for _ in range(rng.integers(1, 3)):
            at, letter = int(rng.integers(len(result) - 1)), _LETTERS[rng.integers(len(_LETTERS))]
            rest = result[at:]
            edits = letter + rest, rest[1:], letter + rest[1:], rest[1::-1] + rest[2:]
            result = result[:at] + edits[rng.integers(len(edits))]
    return result


def questions(facts: Sequence[Fact], seed: int) -> tuple[Asked, Asked]:
    """What the systems are asked in the test and in the calibration."""
    count, calibrating = len(facts), min(CALIBRATION, len(facts))
    stored = {fact.question for fact in facts}
    strangers = [text for text, _ in itertools.islice(builders.phone_entries(3 * count, seed), count, None)]

    def asked(facts, stream, templates, unknown):
        rng = np.random.default_rng((seed, stream))
        typos = [edited(fact.question, rng, stored) for fact in facts]
        names = [fact.question.removeprefix(QUESTION[0]).removesuffix(QUESTION[1]) for fact in facts]
        rephrased = [templates[i % len(templates)].format(name) for i, name in enumerate(names)]
        answers = [fact.answer for fact in facts]
        return {
            "verbatim": [(fact.question, fact.answer) for fact in facts],
            "typos": list(zip(typos, answers, strict=True)),
            "rephrased": list(zip(rephrased, answers, strict=True)),
            "unknown": [(text, None) for text in unknown],
        }

    picked = np.random.default_rng((seed, 2)).permutation(count)[:calibrating]
    test = asked(facts, 0, TEMPLATES, strangers[:count])
    return test, asked([facts[i] for i in picked], 1, CALIBRATION_TEMPLATES, strangers[count : count + calibrating])


def threshold(replies: Sequence[Reply], answers: Sequence[str | None]) -> float:
    """The score from which on answers earn most: an exact one earns 1, a wrong one costs 1.

    Of equally good thresholds the highest, halfway to the best score that it refuses.
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
    """How many answers are exact, wrong and not given, with the 95% interval of the wrong ones' share."""
    texts = [reply.text if least is None or reply.score >= least else None for reply in replies]
    none = sum(not text for text in texts)
    exact = sum(bool(text) and text == answer for text, answer in zip(texts, answers, strict=True))
    wrong = len(texts) - none - exact
    return {
        "questions": len(texts),
        "exact": exact,
        "wrong": wrong,
        "none": none,
        "wrong_interval": recall.wilson(wrong, len(texts)),
    }


def model_system(
    base: model.Base, adapt: recall.Adapt, facts: Sequence[Fact], size: int, trained_ids: np.ndarray | None = None
) -> retrieval.System:
    """Greedy decoding; answers are cut off one token after the longest of the book. `trained_ids`: facts' experts."""
    longest = 1 + max(len(base.tokenizer.completion(fact.answer)) for fact in facts)

    def reply(said: recall.Answer) -> Reply:
        known = None if trained_ids is None else float(np.isin(said.expert_ids, trained_ids).mean())
        return Reply(said.text, said.probability, known)

    def answer(texts):
        said = dict(recall.ask(base, adapt, texts, longest))
        return [reply(said[i]) for i in range(len(texts))]

    return retrieval.System(answer, size)


def latency(system: retrieval.System, texts: Sequence[str]) -> float:
    """The median of seconds per question, one at a time."""
    system.answer(texts[:1])
    seconds = []
    for text in texts:
        started = time.perf_counter()
        system.answer([text])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def contenders(config: Config, base: model.Base, routing: router.Router, facts, directory: Path, lora_epochs: int):
    """name -> what makes the system ready and returns it with what there is to say of its training."""

    def tuned_lora():
        budget = dataclasses.replace(config, tuning=dataclasses.replace(config.tuning, epochs=lora_epochs))
        tuned = runs.tune_lora(budget, base, facts, directory / "lora", "LoRA")
        adapters = jax.eval_shape(lambda: lora.init(base.decoder, config.lora.rank, jax.random.key(0)))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(adapters))
        return model_system(base, tuned.adapt, facts, size), training(tuned)

    def tuned_memory():
        tuned = runs.tune_memory(config, base, lambda: routing, facts, directory / "mome", "memory experts", True)
        used = np.unique(tuned.expert_ids_FK)
        row = bank.row_shape(config.backbone, config.memory).floats * np.dtype(config.memory.dtype).itemsize
        facts_of = training(tuned) | {"experts_used": used.size}
        return model_system(base, tuned.adapt, facts, used.size * row, used), facts_of

    def training(tuned):
        log = tuned.log
        return {"epochs": log.epoch, "certified_F": tuned.certified_F.tolist(), "tuning_seconds": sum(log.seconds)}

    ready: dict[str, Callable[[], tuple[retrieval.System, dict]]] = {
        "b_tree": lambda: (retrieval.b_tree(facts), {}),
        "tfidf_words": lambda: (retrieval.tfidf(facts, "word"), {}),
        "tfidf_letters": lambda: (retrieval.tfidf(facts, "char_wb"), {}),
        "bm25": lambda: (retrieval.bm25(facts), {}),
        "vector": lambda: (retrieval.vector(facts, lambda texts: model.queries(base, routing, texts)), {}),
        "lora": tuned_lora,
        "mome": tuned_memory,
    }
    return ready


def measured(make, asked: Asked, calibration: Asked, num_facts: int) -> dict:
    """All replies of a system, its latency and its bytes."""
    system, extra = make()

    def replies(asked):
        return {kind: system.answer([text for text, _ in pairs]) for kind, pairs in asked.items()}

    result = {"test": replies(asked), "calibration": replies(calibration)}
    if certified := extra.pop("certified_F", None):
        verbatim = zip(result["test"]["verbatim"], asked["verbatim"], strict=True)
        exact_F = np.array([reply.text == answer for reply, (_, answer) in verbatim])
        result["certificates"] = study.certificates(np.array(certified), exact_F)
    seconds = latency(system, [text for text, _ in asked["verbatim"][:TIMED]])
    return result | {"latency_seconds": seconds, "bytes_per_fact": system.size / num_facts, **extra}


def row(found: dict, asked: Asked, calibration: Asked, refusal: str) -> dict:
    """What a system's replies come to: all, or by REFUSING those from a score on, or by KNOWN those all `known`."""

    def flat(parts):
        return [part for kind in SETS for part in parts[kind]]

    def read(kinds):
        return {kind: [Reply(*reply) for reply in replies] for kind, replies in kinds.items()}

    test, least = read(found["test"]), None
    if refusal == KNOWN:
        test, least = {kind: [r._replace(score=r.known) for r in some] for kind, some in test.items()}, 1.0
    elif refusal == REFUSING:
        least = threshold(flat(read(found["calibration"])), [answer for _, answer in flat(calibration)])
    counts = {kind: judge(test[kind], [answer for _, answer in asked[kind]], least) for kind in SETS}
    rest = {name: value for name, value in found.items() if name not in ("test", "calibration")}
    return {"threshold": least, "sets": counts, **rest}


def rows(found: dict[str, dict], asked: Asked, calibration: Asked) -> dict[str, dict]:
    """A row for each system, for each model one more that refuses, and one for memory experts that knows its own."""
    result = {}
    for name, replies in found.items():
        result[name] = row(replies, asked, calibration, REFUSING if name in RETRIEVAL and name != "b_tree" else "")
        if name in MODELS:
            result[name + REFUSING] = row(replies, asked, calibration, REFUSING)
    result["mome" + KNOWN] = row(found["mome"], asked, calibration, KNOWN)
    return result


def share(row: dict, outcome: str, kinds: Sequence[str] = SETS) -> float:
    """The share of an outcome over some sets of questions."""
    return sum(row["sets"][kind][outcome] for kind in kinds) / sum(row["sets"][kind]["questions"] for kind in kinds)


def claims(systems: dict[str, dict]) -> list[dict[str, str]]:
    """What the paper says, what came out, and whether that bears it out."""
    verbatim, asked_otherwise, knowing = systems["mome"]["sets"]["verbatim"], SETS[1:], systems[f"mome{KNOWN}"]
    wrong = {name: share(system, "wrong") for name, system in systems.items()}
    invented = {name: share(system, "wrong", asked_otherwise) for name, system in systems.items()}
    better = [0 < wrong[name] < wrong["lora"] for name in RETRIEVAL]
    percents = ", ".join(f"{name} {100 * wrong[name]:.1f}%" for name in ("lora", *RETRIEVAL, f"lora{REFUSING}"))
    others = [invented[name] for name in RETRIEVAL]
    return [
        # In part if 99 of a hundred are right.
        claim(
            "Memory experts return the facts that they were tuned on and hallucinate none of them (section 7)",
            f"of {verbatim['questions']} questions as they were stored, {verbatim['exact']} are answered exactly, "
            f"{verbatim['wrong']} wrongly and {verbatim['none']} not at all",
            verbatim["exact"] == verbatim["questions"],
            verbatim["exact"] >= 0.99 * verbatim["questions"],
        ),
        # Of a retrieval system it holds that gives fewer wrong answers than the model without retrieval, and some.
        claim(
            "Information retrieval mitigates hallucination and does not remove it (sections 4 and 10)",
            f"wrong answers over all four kinds of questions: {percents}; {sum(better)} of {len(better)} retrieval "
            "systems give some and fewer than LoRA",
            *better,
        ),
        # In part if memory experts give fewer wrong answers than any retrieval system. Refusing is not the paper's.
        claim(
            "Memory experts remove hallucination where information retrieval does not (sections 4, 7 and 10)",
            f"asked with typos, in other words or about unknown names, memory experts answer "
            f"{100 * invented['mome']:.1f}% wrongly ({100 * share(systems['mome'], 'wrong', ['unknown']):.1f}% of the "
            f"unknown names), or {100 * invented[f'mome{REFUSING}']:.1f}% where an unlikely answer is refused. Where "
            "questions are refused that select experts which no fact has trained, it is "
            f"{100 * invented[f'mome{KNOWN}']:.1f}%, with {100 * share(knowing, 'exact', ['verbatim']):.1f}% of the "
            "verbatim questions answered exactly and "
            f"{100 * share(knowing, 'exact', ['typos', 'rephrased']):.1f}% of typos and other words. Retrieval systems "
            f"answer {100 * min(others):.1f}% to {100 * max(others):.1f}% wrongly",
            invented["mome"] == 0,
            invented["mome"] < min(others),
        ),
    ]


def table(results: dict) -> str:
    """The results as text: per cent exact, wrong and not answered of each set."""
    lines = [f"{'exact / wrong / none':<22}" + "".join(f"{kind:>20}" for kind in SETS) + f"{'ms':>9}{'bytes/fact':>12}"]
    for name, system in results["systems"].items():
        cells = ""
        for kind in SETS:
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


def main() -> None:
    command.require("report", *retrieval.MODULES)
    config = model.configure(_CONFIG.value)
    config = dataclasses.replace(config, data=DataConfig("phone_book", _FACTS.value))
    sharding.use(config.mesh)
    facts = facts_lib.load(config.data.facts, "true", config.data.count, config.seed, config.data.dir)
    base = model.load_base(config)
    identity = {"lora_epochs": _LORA_EPOCHS.value, "facts": runs.fingerprint(facts), "backbone": base.fingerprint}
    directory = study.directory_of(_WORKDIR.value, config, **identity)
    print(f"{len(facts)} facts; training the router ...", flush=True)
    routing = model.make_router(config, base, [fact.question for fact in facts])
    asked, calibration = questions(facts, config.seed)
    found = {}
    makers = contenders(config, base, routing, facts, directory, _LORA_EPOCHS.value)
    with processes.bar(makers.items(), unit="system") as bar:
        for name, make in bar:
            bar.set_postfix_str(name)
            found[name] = study.kept(
                directory / f"replies_{name}.json", lambda make=make: measured(make, asked, calibration, len(facts))
            )
    systems = rows(found, asked, calibration)
    results = {
        "facts": len(facts),
        "calibration": {kind: len(pairs) for kind, pairs in calibration.items()},
        "examples": {kind: asked[kind][0][0] for kind in SETS},
        "systems": systems,
        "claims": claims(systems),
        "certificates": study.added(found[name]["certificates"] for name in MODELS),
        "seconds": round(sum(one["seconds"] for one in found.values()), 1),
    }
    study.finish(directory, results, table(results), figures.retrieval_comparison)


if __name__ == "__main__":
    command.run(main)
