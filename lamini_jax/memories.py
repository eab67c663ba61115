"""A memory beside its backbone, ready to answer: what all kinds of memories have in common, and the paper's kind."""

import abc
import copy
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.decoding import Sampling
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.data import facts as facts_lib
from lamini_jax.errors import UserError
from lamini_jax.memory import storage
from lamini_jax.memory.storage import StoredMemory

OUTSIDE = ("answer", "refuse")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model answered, how sure it was, and which experts the question selected.

    The other fields are those of a memory of facts: the fact that was found and the next best one (ids, None if there
    is none) with their scores, which count from the threshold on, and whether the answer is certified.
    """

    text: str | None  # None: the question is in no fact's scope, and the memory should refuse such questions
    probability: float  # of its least likely token
    experts: list[int]  # that the question selected
    trained_experts: int  # how many of them are trained: all for a question as it was tuned, fewer for most others
    fact: str | None = None
    score: float | None = None
    runner_up: str | None = None
    runner_up_score: float | None = None
    certified: bool = False


class Memory(abc.ABC):
    """A tuned memory with its backbone."""

    def __init__(self, config: Config, model: FrozenModel):
        self.config, self.model = config, model
        self._off = False

    def bare(self) -> "Memory":
        """The same model with its memory turned off: what the backbone answers by itself."""
        alone = copy.copy(self)
        alone._off = True
        return alone

    @property
    @abc.abstractmethod
    def adapter_fn(self) -> AdapterFn:
        """What the memory adds to the backbone for each question."""

    def ask(
        self,
        questions: str | Sequence[str],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        outside: str = "answer",
    ) -> Answer | list[Answer]:
        """The answer to a question, or the answers to several, which are answered in batches.

        Decoding is greedy unless a temperature is given. `outside="refuse"` has a memory of facts give no answer (None)
        to what it does not know. Raises UserError for a question that cannot be asked.
        """
        several = [questions] if isinstance(questions, str) else list(questions)
        for number, question in enumerate(several, 1):
            self.check_question(question, f"question {number}")
        answers = self._ask(several, max_new_tokens, _sampling(temperature, seed), outside)
        return answers[0] if isinstance(questions, str) else answers

    def stream(
        self, question: str, temperature: float = 0.0, seed: int = 0, outside: str = "answer"
    ) -> Iterator[Answer]:
        """The answer to one question as it grows, token by token."""
        self.check_question(question, "the question")
        yield from self._stream(question, _sampling(temperature, seed), outside)

    def check_question(self, question: str, where: str) -> None:
        """Raises UserError, beginning with `where`, for a question that cannot be asked."""
        facts_lib.check_question(question, self.model.tokenizer, self.model.max_seq_len, where)

    @abc.abstractmethod
    def _ask(
        self, questions: list[str], max_new_tokens: int | None, sampling: Sampling | None, outside: str
    ) -> list[Answer]: ...

    @abc.abstractmethod
    def _stream(self, question: str, sampling: Sampling | None, outside: str) -> Iterator[Answer]: ...


class ExpertMemory(Memory):
    """The paper's memory: a question selects the experts with the nearest keys, trained or not."""

    def __init__(self, config: Config, model: FrozenModel, stored: StoredMemory):
        super().__init__(config, model)
        self.stored = stored
        self._adapter_fn = storage.adapter_fn(model, stored, config)
        self._trained_ids = np.asarray(stored.expert_ids_S)

    @property
    def adapter_fn(self) -> AdapterFn:
        return answering.BARE if self._off else self._adapter_fn

    def _ask(self, questions, max_new_tokens, sampling, outside):
        check_outside(outside, self.config)
        arguments = self.model, self.adapter_fn, questions, max_new_tokens, sampling
        return [self._answer(answer) for answer in answering.ask_in_order(*arguments)]

    def _stream(self, question, sampling, outside):
        check_outside(outside, self.config)
        yield from map(self._answer, answering.stream(self.model, self.adapter_fn, question, sampling))

    def _answer(self, answer: answering.Answer) -> Answer:
        selected = [] if answer.selection is None else answer.selection.expert_ids_BK.tolist()
        trained = int(np.isin(selected, self._trained_ids).sum())
        return Answer(answer.text, answer.probability, selected, trained)


def check_outside(outside: str, config: Config) -> None:
    """Raises UserError if a memory of this config cannot tell which questions to refuse."""
    if outside != "answer" and config.router.kind != "facts":
        kind = config.router.kind
        raise UserError(f"--outside={outside}: a router of kind {kind} does not know which questions are outside")


def _sampling(temperature: float, seed: int) -> Sampling | None:
    return Sampling(jax.random.key(seed), np.float32(temperature)) if temperature else None
