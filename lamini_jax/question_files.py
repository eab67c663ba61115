"""What `ask` reads and prints: one question, the lines of the standard input, or a file of questions."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from typing import Any

from lamini_jax.api import Source
from lamini_jax.backbone import checkpoints
from lamini_jax.data import facts
from lamini_jax.errors import UserError
from lamini_jax.memories import Answer, Memory
from lamini_jax.runtime import processes, workdir

# Fields that --details adds to a line of answers; those of _FOUND if it is a memory of facts.
_DETAILS = ("probability", "trained_experts", "expert_ids")
_FOUND = ("fact", "score", "runner_up", "runner_up_score", "certified")
_REFUSAL = "not in memory"


@dataclasses.dataclass(frozen=True)
class Asking:
    """The memory that is asked, and how it answers. Questions of a flag or a file are checked before it is loaded."""

    source: Source
    lookup: str | None = None
    temperature: float = 0.0
    seed: int = 0
    details: bool = False
    bare: bool = False  # with the memory turned off
    outside: str = "answer"  # or "refuse": what happens to questions that ask for no fact

    def one(self, question: str) -> None:
        """Prints the answer to a question as it grows."""
        config = self.source.config.backbone
        facts.check_question(question, checkpoints.load_tokenizer(config), config.max_seq_len, "--question")
        self._print(self._load(), question, self.seed)

    def lines(self, lines: Iterable[bytes]) -> None:
        """Prints the answer to each line that is not blank. Raises UserError at the end if some were not answered."""
        memory, refused = self._load(), 0
        for number, line in enumerate(lines, 1):
            where = f"standard input, line {number}"
            try:
                question = line.decode().rstrip("\r\n")
                if question.strip():
                    facts.check_question(question, memory.model.tokenizer, memory.model.max_seq_len, where)
                    self._print(memory, question, self.seed + number)
            except UnicodeDecodeError as error:
                print(f"{where}: is not UTF-8 (byte {error.start + 1})", file=sys.stderr)
                refused += 1
            except UserError as error:
                print(error, file=sys.stderr)
                refused += 1
        if refused:
            raise UserError(f"{refused} of {number} lines of the standard input were not answered, as said above")

    def file(self, questions: str, output: str) -> None:
        """Writes each object of a JSONL file with its answer added to it."""
        config = self.source.config.backbone
        records = facts.read_questions(questions, checkpoints.load_tokenizer(config), config.max_seq_len)
        added = ("generated", *(self._fields if self.details else ()))
        for number, record in enumerate(records, 1):
            for name in added:
                if name in record:
                    where = f"{questions}, question {number}"
                    raise UserError(f'{where}: has a field "{name}", which the answer needs; rename it')
        workdir.check_output("output", output)
        memory = self._load()
        questions = [record["question"] for record in records]
        answers = memory.ask(questions, None, self.temperature, self.seed, self.outside)
        lines = []
        for record, answer in zip(records, answers, strict=True):
            added = {"generated": answer.text, **self._details(answer)}
            line = json.dumps({**record, **added}, ensure_ascii=False)
            # Half of a character, which UTF-8 cannot hold, becomes the escape that it was in the questions.
            lines.append(line.encode("utf-8", "backslashreplace").decode())
        workdir.write_text(output, "\n".join(lines) + "\n")
        processes.print_once(f"{len(lines)} answers in {output}")

    def _load(self) -> Memory:
        memory = self.source.load(self.lookup)
        return memory.bare() if self.bare else memory

    @property
    def _fields(self) -> tuple[str, ...]:
        """What --details adds."""
        return _DETAILS + (_FOUND if self.source.config.router.kind == "facts" else ())

    def _print(self, memory: Memory, question: str, seed: int) -> None:
        """Prints the answer as it grows; the bytes of an incomplete character wait for those that complete it."""
        printed = ""
        for answer in memory.stream(question, self.temperature, seed, self.outside):
            text = _REFUSAL if answer.text is None else answer.text.rstrip("\ufffd")
            if processes.is_primary() and text.startswith(printed):
                print(text[len(printed) :], end="", flush=True)
                printed = text
        processes.print_once((_REFUSAL if answer.text is None else answer.text)[len(printed) :])
        if self.details:
            processes.print_once(f"  least likely token: {answer.probability:.4f}")
            processes.print_once(f"  trained experts: {answer.trained_experts} of {len(answer.experts)}")
            processes.print_once(f"  experts: {' '.join(map(str, answer.experts))}")
            if self.source.config.router.kind == "facts" and not self.bare:
                processes.print_once(
                    f"  fact: {answer.fact}, score {_score(answer.score)}, threshold {memory.threshold:.2f}"
                )
                processes.print_once(f"  runner-up: {answer.runner_up}, score {_score(answer.runner_up_score)}")
                processes.print_once(f"  certified: {'yes' if answer.certified else 'no'}")

    def _details(self, answer: Answer) -> dict[str, Any]:
        if not self.details:
            return {}
        values = answer.probability, answer.trained_experts, answer.experts, answer.fact, _finite(answer.score)
        values += answer.runner_up, _finite(answer.runner_up_score), answer.certified
        return dict(zip(self._fields, values, strict=False))


def _finite(score: float | None) -> float | None:
    """A score as JSON can hold it: that of a stored wording, and that of no fact, are infinite."""
    return score if score is not None and math.isfinite(score) else None


def _score(score: float | None) -> str:
    return (
        "none"
        if score is None or score == -math.inf
        else "of a stored wording"
        if score == math.inf
        else f"{score:.2f}"
    )
