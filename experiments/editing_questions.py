"""What `editing` stores and asks: facts, the same in other words and with typos, and questions that nobody stored."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.retrieval_comparison import QUESTION, TEMPLATES
from lamini_jax import Config, UserError
from lamini_jax.data import benchmarks, world
from lamini_jax.data import facts as facts_lib
from lamini_jax.data.datasets import phone_book

NO_FACT = -1
FILES = ("wikibigedit", "zsre", "counterfact")  # what is asked beside a real backbone by default
GENERATED = "phone_book"  # beside the tiny one
TOKENS = 32  # of an answer at most
UNRELATED, SAMPLED = 1000, 200  # questions of nq_open, and of each benchmark
MOST, MOST_TYPOS = 1000, 500  # questions of each other kind, however many facts there are
TYPOS = ("typo1", "typo2")
# The kind of the questions in `others`, which are those most like the facts'.
_NEAR = {"zsre_same_subject": "same_subject"}
_WORD, _LETTERS = re.compile(r"[^\W\d_]{4,}"), "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Row:
    """A fact, other wordings of its question, and questions like it that nobody stored."""

    question: str
    answer: str
    rephrased: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Asked:
    """A set of facts in the order in which they are stored, and what is asked about them."""

    name: str
    facts: list[Row]
    about: dict[str, list[tuple[str, int]]]  # by kind: a question and the number of the fact that it asks for
    strangers: dict[str, list[str]]  # by kind: questions that nobody stored

    @property
    def near(self) -> str:
        """The kind of strangers that are most like the facts."""
        return near(self.name)

    def sample(self, most: int, facts: int | None = None) -> "Asked":
        """So many questions of a kind at most (with typos half as many), spread over the first facts; all strangers."""
        few = self.facts[:facts]

        def some(kind):
            pairs = [pair for pair in self.about[kind] if pair[1] < len(few)]
            return spread(pairs, most // 2 if kind in TYPOS else most)

        return dataclasses.replace(self, facts=few, about={kind: some(kind) for kind in self.about})

    @property
    def fingerprint(self) -> str:
        """A hash of all texts."""
        values = json.dumps([[dataclasses.astuple(row) for row in self.facts], self.about, self.strangers])
        return hashlib.sha256(values.encode()).hexdigest()[:16]


def near(name: str) -> str:
    """What the `others` of a set are called."""
    return _NEAR.get(name.partition("-")[0], "others")


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of some values, evenly spread over them."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]


def typo(rng: np.random.Generator, text: str) -> str:
    """`text` with a letter of a word of four or more swapped, dropped, doubled or replaced; the same without such."""
    words = [match.span() for match in _WORD.finditer(text)]
    result = text
    while words and result == text:
        start, end = words[rng.integers(len(words))]
        at = int(rng.integers(start, end - 1))
        rest, letter = text[at:], _LETTERS[rng.integers(len(_LETTERS))]
        edits = rest[1::-1] + rest[2:], rest[1:], rest[0] + rest, letter + rest[1:]
        result = text[:at] + edits[rng.integers(len(edits))]
    return result


def asked(name: str, rows: Sequence[Row], strangers: dict[str, list[str]], seed: int) -> Asked:
    """All questions about some facts. What is itself a stored question counts as no other wording, typo or stranger."""
    rng, stored = np.random.default_rng((seed, 4)), {row.question for row in rows}
    once = [typo(rng, row.question) for row in rows]
    about = {
        "verbatim": [(row.question, i) for i, row in enumerate(rows)],
        "rephrased": [(text, i) for i, row in enumerate(rows) for text in row.rephrased],
        "typo1": [(text, i) for i, text in enumerate(once)],
        "typo2": [(typo(rng, text), i) for i, text in enumerate(once)],
    }
    for kind in ("rephrased", *TYPOS):
        most = MOST_TYPOS if kind in TYPOS else MOST
        about[kind] = spread([pair for pair in about[kind] if pair[0] not in stored], most)
    others = dict.fromkeys(text for row in rows for text in row.others if text not in stored)
    kinds = {near(name): spread(list(others), MOST), **strangers}
    unknown = {kind: [text for text in texts if text not in stored] for kind, texts in kinds.items()}
    return Asked(
        name,
        list(rows),
        {kind: pairs for kind, pairs in about.items() if pairs},
        {kind: texts for kind, texts in unknown.items() if texts},
    )


def load(config: Config, tokenizer, names: Sequence[str], file: str | None, counts: Sequence[int]) -> list[Asked]:
    """The sets to ask, each with so many facts of each count. Raises UserError for one that there is not."""
    strangers, found = _strangers(config, tokenizer), []
    for name in [Path(file).stem] if file else names or _default(config):
        path = file or str(Path(config.data.dir).expanduser() / "editing" / f"{name}.jsonl")
        if name == GENERATED and not file:
            rows = generated(max(counts), config.seed)
        elif config.data.dir or file:
            rows = read(path, tokenizer, config.backbone.max_seq_len)
        else:
            raise UserError(f"--sets={name}: name the folder that has editing/{name}.jsonl as --config.data.dir")
        for count in counts:
            if count > len(rows):
                raise UserError(f"--counts={count}: {name} has {len(rows)} facts; ask for no more")
            title = name if len(counts) == 1 else f"{name}-{count}"
            found.append(asked(title, rows[:count], strangers, config.seed))
    return found


def _default(config: Config) -> Sequence[str]:
    return FILES if config.backbone.path else (GENERATED,)


def read(path: str, tokenizer, max_seq_len: int) -> list[Row]:
    """The facts of a file that the backbone can represent, with those of their questions that it can."""
    rows: dict[str, Row] = {}
    for number, record in enumerate(facts_lib.read_questions(path, tokenizer, max_seq_len), 1):
        texts = {key: record.get(key, []) for key in ("rephrased", "others")}
        listed = all(isinstance(some, list) and all(isinstance(t, str) for t in some) for some in texts.values())
        if not isinstance(record.get("answer"), str) or not listed:
            raise UserError(f'{path}, row {number}: needs an "answer", and lists of texts as "rephrased" and "others"')
        kept = {key: tuple(fitting(some, tokenizer, max_seq_len)) for key, some in texts.items()}
        row = Row(record["question"], record["answer"], **kept)
        if _fits(row, tokenizer, max_seq_len):
            rows.setdefault(row.question, row)
    return list(rows.values())


def _fits(row: Row, tokenizer, max_seq_len: int) -> bool:
    if not row.answer.strip() or tokenizer.why_unsupported(row.answer, exactly=True):
        return False
    return len(tokenizer.prompt(row.question)) + len(tokenizer.completion(row.answer)) <= max_seq_len


def fitting(texts: Iterable[str], tokenizer, max_seq_len: int) -> list[str]:
    """The questions that can be asked and leave room for a whole answer."""

    def fits(text):
        allowed = text.strip() and not tokenizer.why_unsupported(text, exactly=False)
        return allowed and len(tokenizer.prompt(text)) + TOKENS <= max_seq_len

    return [text for text in texts if fits(text)]


def generated(count: int, seed: int) -> list[Row]:
    """Entries of a phone book; `others` are people with a stored first name and another last name."""
    names, numbers = [], []
    for question, number in itertools.islice(phone_book.pairs(seed), 2 * count):
        names.append(question.removeprefix(QUESTION[0]).removesuffix(QUESTION[1]))
        numbers.append(number)
    stored, rows = set(names[:count]), []
    for i, (name, stranger) in enumerate(zip(names[:count], names[count:], strict=True)):
        alike = f"{name.split()[0]} {stranger.split()[1]}"
        others = () if alike in stored else (alike.join(QUESTION),)
        rows.append(Row(name.join(QUESTION), numbers[i], (TEMPLATES[i % len(TEMPLATES)].format(name),), others))
    return rows


def _strangers(config: Config, tokenizer) -> dict[str, list[str]]:
    """Questions that have nothing to do with any fact: of the files that there are, or else of the generated world."""
    length, rng = config.backbone.max_seq_len, np.random.default_rng((config.seed, 5))
    root = Path(config.data.dir).expanduser()
    searched = root / "editing" / "nq_open.jsonl"
    sources = {
        "unrelated": (searched, lambda: facts_lib.read_questions(str(searched), tokenizer, length), UNRELATED),
        "truthful_qa": (root / benchmarks.TRUTHFUL_QA_FILE, lambda: map(vars, benchmarks.truthful_qa(root)), SAMPLED),
        "mmlu": (root / "mmlu", lambda: map(vars, benchmarks.mmlu(root)), SAMPLED),
    }

    def some(texts, most):
        kept = fitting(dict.fromkeys(texts), tokenizer, length)
        return [kept[i] for i in rng.permutation(len(kept))[:most]]

    found = {
        kind: some((record["question"] for record in records()), most)
        for kind, (path, records, most) in sources.items()
        if config.data.dir and path.exists()
    }
    world_texts = (qa.question for kind in world.KINDS for qa in world.held_out(kind, SAMPLED, config.seed))
    return found or {"unrelated": some(world_texts, UNRELATED)}
