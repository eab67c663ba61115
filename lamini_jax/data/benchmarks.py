"""TruthfulQA and MMLU as multiple choice: a context, and choices, of which the right ones should be the likeliest.

Both are read from files that the user has downloaded, in the layout of their authors:

    DIRECTORY/TruthfulQA.csv                                    github.com/sylinrl/TruthfulQA
    DIRECTORY/mmlu/{dev,test}/SUBJECT_{dev,test}.csv            github.com/hendrycks/test
"""

import csv
import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Sequence

from lamini_jax.errors import UserError

TRUTHFUL_QA_FILE = "TruthfulQA.csv"
TRUTHFUL_QA_URL = f"https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/{TRUTHFUL_QA_FILE}"
MMLU_URL = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"

_LETTERS = "ABCD"
_SHOTS = 5


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """A question with the texts that may follow it."""

    subject: str
    question: str  # selects the experts
    ending: str  # of the context, after the examples
    choices: tuple[str, ...]
    right: tuple[bool, ...]
    header: str = ""
    shots: tuple[str, ...] = ()  # examples with their answers

    @property
    def context(self) -> str:
        """All text before a choice."""
        return self.header + "".join(self.shots) + self.ending


def truthful_qa(directory: str | pathlib.Path) -> list[MultipleChoice]:
    """TruthfulQA (arXiv 2109.07958) in the CSV's order; of a question's choices, the best answer comes first.

    Asked zero-shot, "Q: QUESTION\\nA:" with " ANSWER" as a choice. lm-evaluation-harness puts six solved examples of
    the authors before that, and reads the answers from another file: its figures are not exactly comparable. Raises
    UserError, with the line, for a file that is missing or not TruthfulQA's.
    """
    path = pathlib.Path(directory).expanduser() / TRUTHFUL_QA_FILE
    columns = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    items = []
    for category, question, best, *lists in truthful_qa_rows(_read(path, TRUTHFUL_QA_URL), str(path), columns):
        correct, incorrect = ([text.strip() for text in answers.split(";") if text.strip()] for answers in lists)
        correct, incorrect = list(dict.fromkeys([best, *correct])), list(dict.fromkeys(incorrect))
        choices = tuple(f" {answer}" for answer in correct + incorrect)
        right = (True,) * len(correct) + (False,) * len(incorrect)
        items.append(MultipleChoice(category, question, f"Q: {question}\nA:", choices, right))
    return items


def truthful_qa_rows(content: bytes, origin: str, columns: Sequence[str]) -> Iterator[list[str]]:
    """Some columns of TruthfulQA's CSV, row by row. Raises UserError if one is missing or empty in some row."""
    advice = f"fetch it again from {TRUTHFUL_QA_URL}"
    (_, names), *rows = _table(content, origin) or [(1, [])]
    missing = [name for name in columns if name not in names]
    if missing:
        raise UserError(f"{origin}: is not TruthfulQA's CSV (line 1 does not name {missing[0]!r}); {advice}")
    if not rows:
        raise UserError(f"{origin}: has no questions; {advice}")
    for line, row in rows:
        values = dict(zip(names, map(str.strip, row), strict=False))
        # A list of separators alone is empty.
        empty = [name for name in columns if not values.get(name, "").strip("; ")]
        if empty:
            raise UserError(f"{origin}, line {line}: has nothing in the column {empty[0]!r}; {advice}")
        yield [values[name] for name in columns]


def mmlu(directory: str | pathlib.Path, per_subject: int | None = None) -> list[MultipleChoice]:
    """MMLU (arXiv 2009.03300): the first `per_subject` test questions of each subject, or all, with 5 examples each.

    The prompt is that of the authors' code, except for a doubled space before the subject, which lm-evaluation-harness
    leaves out too. Raises UserError, with the line, for files that are missing or not MMLU's.
    """
    root = pathlib.Path(directory).expanduser() / "mmlu"
    paths = sorted((root / "test").glob("*_test.csv"))
    if not paths:
        raise UserError(f"{root / 'test'}: has no SUBJECT_test.csv; unpack {MMLU_URL} as {root}")
    items = []
    for path in paths:
        name = path.name.removesuffix("_test.csv")
        subject = name.replace("_", " ")
        header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        examples = _letter_questions(root / "dev" / f"{name}_dev.csv")[:_SHOTS]
        shots = tuple(f"{asked} {letter}\n\n" for asked, letter in examples)
        for asked, letter in _letter_questions(path)[:per_subject]:
            right = tuple(letter == other for other in _LETTERS)
            choices = tuple(f" {other}" for other in _LETTERS)
            items.append(MultipleChoice(subject, asked, asked, choices, right, header, shots))
    return items


def fitting(items: Sequence[MultipleChoice], tokenizer, max_seq_len: int) -> list[MultipleChoice]:
    """The items that fit with each of their choices in `max_seq_len` tokens, with as many examples as fit.

    The last example is dropped first, as in the code of MMLU's authors; items that do not fit without any are left out.
    """
    kept = []
    for item in items:
        while not _fits(item, tokenizer, max_seq_len) and item.shots:
            item = dataclasses.replace(item, shots=item.shots[:-1])
        if item.shots or _fits(item, tokenizer, max_seq_len):
            kept.append(item)
    return kept


def fingerprint(items: Sequence[MultipleChoice]) -> str:
    """A hash of a list of items, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.question, item.context, item.choices, item.right]).encode())
    return digest.hexdigest()[:16]


def _fits(item: MultipleChoice, tokenizer, max_seq_len: int) -> bool:
    parts = (tokenizer.continuation(item.context, choice) for choice in item.choices)
    return all(len(before) + len(after) <= max_seq_len for before, after in parts)


def _letter_questions(path: pathlib.Path) -> list[tuple[str, str]]:
    """Of each row, the question with its lettered answers, up to the place of the right letter, and that letter."""
    questions = []
    for line, row in _table(_read(path, MMLU_URL), str(path)):
        if len(row) != 6:
            raise UserError(f"{path}, line {line}: has {len(row)} columns instead of 6 (question, A, B, C, D, letter)")
        question, *answers, letter = row
        if letter not in tuple(_LETTERS):
            raise UserError(f"{path}, line {line}: the right answer is {letter!r}, which is none of A, B, C and D")
        lettered = [f"{name}. {answer}" for name, answer in zip(_LETTERS, answers, strict=True)]
        questions.append(("\n".join([question, *lettered, "Answer:"]), letter))
    if not questions:
        raise UserError(f"{path}: has no questions; fetch it again from {MMLU_URL}")
    return questions


def _read(path: pathlib.Path, url: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); it comes from {url}") from error


def _table(content: bytes, origin: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV that are not blank, each with the number of its last line."""
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{origin}, line {line}: is not UTF-8; save the file as UTF-8") from error
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{origin}, line {reader.line_num}: is not CSV ({error})") from error
