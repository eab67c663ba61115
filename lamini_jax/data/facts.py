"""Facts: questions with the one answer that a model has to return exactly, from a user's JSONL or from a dataset."""

import codecs
import dataclasses
import hashlib
import json
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from lamini_jax.errors import UserError

ANSWERS = ("true", "random")
DATASETS = ("world", "phone_book", "truthful_qa")
RANDOM_LENGTH = 32

_RANDOM_SYMBOLS = string.ascii_uppercase + string.digits
_LINES_NAMED = 5  # a warning about a thousand lines names this many


@dataclasses.dataclass(frozen=True)
class Fact:
    """One question and its answer; `id` depends on the question alone."""

    id: str
    question: str
    answer: str


def fact_id(question: str) -> str:
    """A name for the fact that this question asks for: the same in every file, order and run."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def random_answer(rng: np.random.Generator) -> str:
    """32 upper-case letters and digits, like the paper's `OKCNLRZ0JTVT1SFNEMYJYM7UDTDQPKNQ` (table 1)."""
    return "".join(_RANDOM_SYMBOLS[i] for i in rng.integers(len(_RANDOM_SYMBOLS), size=RANDOM_LENGTH))


def random_answer_to(question: str, seed: int) -> str:
    """The random answer to a question: a function of both arguments, so that no other fact can change it."""
    digest = hashlib.sha256(f"{seed}:{question}".encode()).digest()
    return random_answer(np.random.default_rng(list(digest)))


def read_jsonl(path: str, tokenizer, context: int) -> list[Fact]:
    """A user's own facts, in order, from lines like {"question": "...", "answer": "..."}.

    Other keys and blank lines are skipped; a repeated fact counts once, with a warning. Raises UserError, with the file
    and the line, for what is not a fact, a fact of more than `context` tokens, or a question with two answers.
    """
    facts: dict[str, Fact] = {}
    first_lines: dict[str, int] = {}
    repeats: list[str] = []
    for number, record in _records(path, '{"question": "...", "answer": "..."}'):
        where = f"{path}, line {number}"
        question, answer = _text(record, "question", where), _text(record, "answer", where)
        for key, text in (("question", question), ("answer", answer)):
            if refusal := tokenizer.refusal(text, exactly=key == "answer"):
                raise UserError(f'{where}: "{key}" {refusal}')
        _check_length(len(tokenizer.prompt(question)) + len(tokenizer.completion(answer)), context, "the fact", where)
        known = facts.setdefault(question, Fact(fact_id(question), question, answer))
        first = first_lines.setdefault(question, number)
        if known.answer != answer:
            raise UserError(f"{where}: answers the question of line {first} differently; keep one of them")
        if first != number:
            repeats.append(f"line {number} repeats line {first}")
    if not facts:
        raise UserError(f'{path}: has no facts; write one per line, like {{"question": "...", "answer": "..."}}')
    if repeats:
        more = f" and {len(repeats) - _LINES_NAMED} more" if len(repeats) > _LINES_NAMED else ""
        logging.warning("%s: %s%s; each fact counts once", path, ", ".join(repeats[:_LINES_NAMED]), more)
    return list(facts.values())


def read_questions(path: str, tokenizer, context: int) -> list[dict[str, Any]]:
    """The objects of a file with lines like {"question": "..."}, whole, in order, repeated ones included.

    Raises UserError, with the file and the line, for anything else and where `context` has no room left for an answer.
    """
    objects = []
    for number, record in _records(path, '{"question": "..."}'):
        where = f"{path}, line {number}"
        question = _text(record, "question", where)
        check_question(question, tokenizer, context, where)
        objects.append(record)
    if not objects:
        raise UserError(f'{path}: has no questions; write one per line, like {{"question": "..."}}')
    return objects


def check_question(question: str, tokenizer, context: int, where: str) -> None:
    """Raises UserError, naming `where` it stands, for a question that is empty or leaves no room for an answer."""
    _text({"question": question}, "question", where)
    if refusal := tokenizer.refusal(question, exactly=False):
        raise UserError(f"{where}: the question {refusal}")
    _check_length(len(tokenizer.prompt(question)), context - 1, "the question", where)


def load(name: str, answers: str, count: int, seed: int, directory: str) -> list[Fact]:
    """The first `count` facts of a dataset, with their true answers or with random ones (section 2).

    phone_book has its own digits for both. Raises UserError, with the flag, for values that make no sense.
    """
    facts = load_up_to(name, answers, count, seed, directory)
    if len(facts) < count:
        raise UserError(f"--config.data.count={count}: {name} has {len(facts)} facts; ask for no more")
    return facts


def load_up_to(name: str, answers: str, count: int, seed: int, directory: str) -> list[Fact]:
    """Like `load`, but all facts of a dataset that has fewer."""
    if name not in DATASETS:
        raise UserError(f"--config.data.facts={name}: must be one of {', '.join(DATASETS)}")
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r}: must be one of {', '.join(ANSWERS)}")
    if count < 1:
        raise UserError(f"--config.data.count={count}: must be at least 1")
    # Here, because it imports tensorflow_datasets, which takes a second that a user's own JSONL should not pay.
    from lamini_jax.data import builders

    if name == "world":
        dataset = builders.world(answers, seed)
    elif name == "phone_book":
        dataset = builders.phone_book(count, seed)
    else:
        dataset = builders.truthful_qa(answers, seed, directory)
    return [Fact(**row) for row in builders.rows(dataset, min(count, builders.size(dataset)))]


def _records(path: str, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON object of each line that is not blank, with its line number."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, _record(line, f"{path}, line {number}", example)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory; name a JSONL file in it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file that can") from error


def _record(line: bytes, where: str, example: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error.msg}, column {error.colno}); write it like {example}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: nests too deeply or has too long a number; write it like {example}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object; write it like {example}")
    return value


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise UserError(f'{where}: has no "{key}"; add it')
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is not a string; put it in double quotes')
    if not value.strip():
        raise UserError(f'{where}: "{key}" is empty; fill it in or delete the line')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f'{where}: "{key}" has {half}, half of a character; write the whole one') from error
    return value


def _check_length(tokens: int, allowed: int, what: str, where: str) -> None:
    if tokens > allowed:
        raise UserError(f"{where}: {what} takes {tokens} tokens, and {allowed} are allowed; shorten it")
