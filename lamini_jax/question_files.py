"""What `ask` reads and prints: one question, the lines of the standard input, or a file of them."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lamini_jax.api import Answer, Memory, Source
from lamini_jax.backbone import checkpoints
from lamini_jax.data import facts
from lamini_jax.errors import UserError
from lamini_jax.runtime import processes, workdir


@dataclasses.dataclass(frozen=True)
class Asking:
    """Where questions go and how they are answered. What is wrong with a question is found before anything loads."""

    source: Source
    lookup: str | None = None
    temperature: float = 0.0
    seed: int = 0
    details: bool = False

    def one(self, question: str) -> None:
        """Prints the answer to a question as it grows."""
        self._check(question, "--question")
        self._print(self.source.load(self.lookup), question, self.seed)

    def lines(self, lines: Iterable[bytes]) -> None:
        """Prints the answer to each line; blank ones are skipped."""
        memory = self.source.load(self.lookup)
        for number, line in enumerate(lines, 1):
            where = f"standard input, line {number}"
            try:
                question = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: is not UTF-8 (byte {error.start + 1})") from None
            if question.strip():
                self._check(question, where)
                self._print(memory, question, self.seed + number)

    def file(self, questions: str, output: str) -> None:
        """Writes each object of a JSONL file with its answer added to it."""
        config = self.source.config.backbone
        records = facts.read_questions(questions, checkpoints.load_tokenizer(config), config.max_seq_len)
        if not Path(output).absolute().parent.is_dir():
            raise UserError(f"--output={output}: its directory does not exist")
        memory = self.source.load(self.lookup)
        answers = memory.ask([record["question"] for record in records], None, self.temperature, self.seed)
        lines = []
        for record, answer in zip(records, answers, strict=True):
            lines.append(json.dumps({**record, "generated": answer.text, **self._details(answer)}))
        workdir.write_text(output, "\n".join(lines) + "\n")
        processes.print_once(f"{len(lines)} answers in {output}")

    def _check(self, question: str, where: str) -> None:
        config = self.source.config.backbone
        facts.check_question(question, checkpoints.load_tokenizer(config), config.max_seq_len, where)

    def _print(self, memory: Memory, question: str, seed: int) -> None:
        """What may still become another character waits."""
        printed = ""
        for answer in memory.stream(question, self.temperature, seed):
            text = answer.text.rstrip("\ufffd")
            if processes.is_primary() and text.startswith(printed):
                print(text[len(printed) :], end="", flush=True)
                printed = text
        processes.print_once(answer.text[len(printed) :])
        if self.details:
            processes.print_once(f"  least likely token: {answer.probability:.4f}")
            processes.print_once(f"  trained experts: {answer.trained_experts} of {len(answer.experts)}")
            processes.print_once(f"  experts: {' '.join(map(str, answer.experts))}")

    def _details(self, answer: Answer) -> dict[str, Any]:
        if not self.details:
            return {}
        fields = {"trained_experts": answer.trained_experts, "expert_ids": answer.experts}
        return {"probability": answer.probability, **fields}
