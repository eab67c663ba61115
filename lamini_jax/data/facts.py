"""Facts: questions with the one answer that a model has to return exactly; and reading them from users' JSONL files."""

import codecs
import dataclasses
import hashlib
import json
import math
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from lamini_jax.errors import UserError
from lamini_jax.runtime import paths

RANDOM_LENGTH = 32

_RANDOM_SYMBOLS = string.ascii_uppercase + string.digits
_LINES_NAMED = 5  # a warning about a thousand lines names this many


@dataclasses.dataclass(frozen=True)
class Fact:
    """One question and its answer; `id` depends on the question alone. `also` are other wordings of the question."""

    id: str
    question: str
    answer: str
    also: tuple[str, ...] = ()

    @property
    def wordings(self) -> tuple[str, ...]:
        return self.question, *self.also


Facts = str | os.PathLike | Iterable[Fact | Mapping[str, Any]]


def fact_id(question: str) -> str:
    """The id of the fact with this question: the same in every file, order and run."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def random_answer(rng: np.random.Generator) -> str:
    """32 upper-case letters and digits, like the paper's `OKCNLRZ0JTVT1SFNEMYJYM7UDTDQPKNQ` (table 1)."""
    return "".join(_RANDOM_SYMBOLS[i] for i in rng.integers(len(_RANDOM_SYMBOLS), size=RANDOM_LENGTH))


def random_answer_to(question: str, seed: int) -> str:
    """The random answer to a question: it depends only on the arguments, so that other facts do not change it."""
    digest = hashlib.sha256(f"{seed}:{question}".encode()).digest()
    return random_answer(np.random.default_rng(list(digest)))


def read(facts: Facts, tokenizer, max_seq_len: int, may_be_empty: bool = False) -> list[Fact]:
    """A user's own facts, in order: a JSONL file of lines like {"question": "...", "answer": "..."}, or such mappings.

    Blank lines are skipped. Raises UserError as `from_records` does, and for what is not such a line.
    """
    if isinstance(facts, str | os.PathLike):
        origin = os.fspath(facts)
        lines = json_lines(origin, '{"question": "...", "answer": "..."}')
        records = ((f"line {number}", record) for number, record in lines)
    else:
        mappings = (vars(fact) if isinstance(fact, Fact) else fact for fact in facts)
        origin, records = "facts", ((f"fact {number}", fact) for number, fact in enumerate(mappings, 1))
    return from_records(origin, records, tokenizer, max_seq_len, may_be_empty)


def from_records(
    origin: str, records: Iterable[tuple[str, Any]], tokenizer, max_seq_len: int, may_be_empty: bool = False
) -> list[Fact]:
    """Facts from pairs of a place in `origin` ("line 3") and an object with "question", "answer" and perhaps "also".

    Other keys are ignored; a repeated fact counts once, with a warning. Raises UserError, saying where, for what is not
    a fact, a fact of more than `max_seq_len` tokens, or a question with two answers.
    """
    facts: dict[str, Fact] = {}
    first: dict[str, tuple[str, str, str]] = {}  # of each wording: the place, the question and the answer
    repeats: list[str] = []
    for place, record in records:
        where = f"{origin}, {place}"
        fact = _checked_fact(record, where, tokenizer, max_seq_len)
        for wording in fact.wordings:
            known_place, question, answer = first.setdefault(wording, (place, fact.question, fact.answer))
            if answer != fact.answer:
                raise UserError(f"{where}: answers the question of {known_place} differently; keep one of them")
            if question != fact.question:
                raise UserError(f"{where}: has the wording {wording!r}, as {known_place}; keep one of them")
        if facts.setdefault(fact.question, fact).also != fact.also:
            raise UserError(f"{where}: has other wordings than {first[fact.question][0]}; keep one of them")
        if (known_place := first[fact.question][0]) != place:
            repeats.append(f"{place} repeats {known_place}")
    if not facts and not may_be_empty:
        raise UserError(f'{origin}: has no facts; write one per line, like {{"question": "...", "answer": "..."}}')
    if repeats:
        more = f" and {len(repeats) - _LINES_NAMED} more" if len(repeats) > _LINES_NAMED else ""
        logging.warning("%s: %s%s; each fact counts once", origin, ", ".join(repeats[:_LINES_NAMED]), more)
    return list(facts.values())


def _checked_fact(record: Any, where: str, tokenizer, max_seq_len: int) -> Fact:
    """The fact in a record. Raises UserError as `from_records` does."""
    if not isinstance(record, Mapping):
        raise UserError(f'{where}: is not an object with "question" and "answer"')
    question, answer = _text(record, "question", where), _text(record, "answer", where)
    also = record.get("also", [])
    if isinstance(also, str) or not isinstance(also, Sequence):
        raise UserError(f'{where}: "also" is not a list; write other wordings of the question like ["...", "..."]')
    also = tuple(_text({"also": wording}, "also", where) for wording in also)
    for key, text in (("question", question), ("answer", answer), *(("also", wording) for wording in also)):
        if reason := tokenizer.why_unsupported(text, exactly=key == "answer"):
            raise UserError(f'{where}: "{key}" {reason}')
    longest = max(len(tokenizer.prompt(wording)) for wording in (question, *also))
    _check_length(longest + len(tokenizer.completion(answer)), max_seq_len, "the fact", where)
    return Fact(fact_id(question), question, answer, tuple(text for text in dict.fromkeys(also) if text != question))


def fingerprint(facts: Sequence[Fact]) -> str:
    """A hash of a list of facts, in their order."""
    text = json.dumps([(fact.question, fact.answer) for fact in facts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_questions(path: str, tokenizer, max_seq_len: int) -> list[dict[str, Any]]:
    """The objects of a file with lines like {"question": "..."}, whole, in order, repeated ones included.

    Raises UserError, with the file and the line, for anything else and for questions that leave no room for an answer.
    """
    objects = []
    for number, record in json_lines(path, '{"question": "..."}'):
        where = f"{path}, line {number}"
        question = _text(record, "question", where)
        check_question(question, tokenizer, max_seq_len, where)
        objects.append(record)
    if not objects:
        raise UserError(f'{path}: has no questions; write one per line, like {{"question": "..."}}')
    return objects


def check_question(question: str, tokenizer, max_seq_len: int, where: str) -> None:
    """Raises UserError, beginning with `where`, for a question that is empty or leaves no room for an answer."""
    _text({"question": question}, "question", where)
    if reason := tokenizer.why_unsupported(question, exactly=False):
        raise UserError(f"{where}: the question {reason}")
    _check_length(len(tokenizer.prompt(question)), max_seq_len - 1, "the question", where)


def json_lines(path: str, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON object of each line that is not blank, with its line number."""
    try:
        with paths.as_path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, _record(line, f"{path}, line {number}", example)
    except (FileNotFoundError, ValueError) as error:  # a path with a NUL is a ValueError
        raise UserError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory; name a JSONL file in it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); name a file that can") from error


def _record(line: bytes, where: str, example: str) -> dict[str, Any]:
    def refuse(what: str):
        raise UserError(f"{where}: {what}; write it like {example}")

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                refuse(f"has the key {json.dumps(name)} {names.count(name)} times")
        return dict(pairs)

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(f"has {text}, which JSON cannot hold as a number")

    try:
        text = line.decode("utf-8")
        options = {"object_pairs_hook": checked, "parse_float": finite}
        value = json.loads(text, **options, parse_constant=lambda name: refuse(f"has {name}, which is not JSON"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error.msg}, column {error.colno}); write it like {example}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{where}: nests too deeply or has too long a number; write it like {example}") from None
    if not isinstance(value, dict):
        refuse(f"is {'an array' if isinstance(value, list) else 'a value'} and not a JSON object")
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
