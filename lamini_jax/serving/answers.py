"""From a question to what the engine has to do: which fact answers it, if one does, and with which adapter."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lamini_jax.backbone.frozen_model import Adapters
from lamini_jax.memory.fact_table import FactTable
from lamini_jax.memory.routers.facts import NONE, Found
from lamini_jax.memory.scope.wordings import normalized
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.runtime import sharding
from lamini_jax.serving.state import State

BASE, MEMORY = "base", "memory"  # the names of the models


@dataclasses.dataclass(frozen=True)
class Told:
    """What the memory found for a question: the fact that answers it, and the two best ones' scores."""

    fact: str | None = None
    score: float | None = None  # None: there is no fact; infinite: it is a stored wording
    runner_up: str | None = None
    runner_up_score: float | None = None
    tokens: tuple[int, ...] = ()  # of the prompt that is answered, if a fact fires
    adapters: Adapters | None = None

    @property
    def content(self) -> dict[str, Any]:
        """The field `memory` of answers. JSON has no infinity: such a score is null."""
        scores = (None if score is None or math.isinf(score) else score for score in (self.score, self.runner_up_score))
        score, runner_up_score = scores
        values = {"fact": self.fact, "score": score, "certified": self.fact is not None}
        return {**values, "runner_up": self.runner_up, "runner_up_score": runner_up_score}

    @property
    def headers(self) -> dict[str, str]:
        found = {"x-lamini-fact": self.fact or "", "x-lamini-certified": str(self.fact is not None).lower()}
        return found if self.score is None else {**found, "x-lamini-score": f"{self.score:.4f}"}


class Asking:
    """Looks questions up, one after the other, in a thread of its own beside the engine's."""

    def __init__(self, state: State):
        self._state = state
        self._thread = ThreadPoolExecutor(1, "asking")
        self._look_up = sharding.carried(functools.partial(look_up, state))

    async def __call__(self, loop, question: str) -> Told:
        told = await loop.run_in_executor(self._thread, self._look_up, question)
        if told.fact is None:
            self._state.refused += 1
        else:
            self._state.fired += 1
        return told


def look_up(state: State, question: str) -> Told:
    """What the memory has for a question. A text that is no question of its own has nothing."""
    tokenizer, engine = state.memory.model.tokenizer, state.engine
    if not normalized(question) or tokenizer.why_unsupported(question, exactly=False):
        return Told()
    if len(tokenizer.prompt(question)) > engine.model.max_seq_len:
        return Told()
    table = state.memory.table  # once: it may be replaced at any time
    found = table.find([question], state.memory.threshold)
    (fact, runner_up), scores = _ids(table, found), (float(found.score_B[0]), float(found.runner_up_score_B[0]))
    told = Told(None, scores[0], runner_up, scores[1])
    if fact is None:
        return told
    wording = table.router.texts[found.wording_B[0]]
    tokens = tuple(tokenizer.prompt(wording))
    return dataclasses.replace(told, fact=fact, tokens=tokens, adapters=_adapters(table, found, engine.rank))


def publish(state: State, table: FactTable) -> None:
    """Has questions answered from another table, after what it needs is compiled."""
    warm(state, table)
    state.memory.table = table


def warm(state: State, table: FactTable) -> None:
    """Compiles what looking up questions in a table takes, and reads what is read once."""
    for question in _questions_of_all_widths(state):
        table.find([question], state.memory.threshold)
    if table.router.holding:
        _adapters(table, table.router.handing(np.zeros(1, np.int64)), state.engine.rank)


def _questions_of_all_widths(state: State) -> Iterable[str]:
    """Questions whose prompts are padded to each length that occurs."""
    model, question = state.memory.model, "Who?"
    while len(model.tokenizer.prompt(question)) <= model.max_seq_len:
        yield question
        question = f"{question} {question}"


def _ids(table: FactTable, found: Found) -> tuple[str | None, str | None]:
    numbers = found.fact_B[0], found.runner_up_B[0]
    fact, runner_up = (None if number == NONE else table.router.facts[number].id for number in numbers)
    return fact, runner_up


def _adapters(table: FactTable, found: Found, rank: int) -> Adapters:
    """The adapters of what one question has found, with as many experts as a slot has room for."""
    missing = rank - found.expert_ids_BK.shape[1]
    ids_BK = np.pad(found.expert_ids_BK, ((0, 0), (0, missing)), constant_values=EMPTY_SLOT)
    gates_BK = np.pad(found.gates_BK, ((0, 0), (0, missing)))
    return table.adapters(found.replace(expert_ids_BK=ids_BK, gates_BK=gates_BK))
