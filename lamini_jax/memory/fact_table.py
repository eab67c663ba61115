"""What a memory of facts answers from, in this process: its facts, the router that finds them, and their experts."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lamini_jax.backbone import answering, frozen_model
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.decoding import Sampling
from lamini_jax.backbone.frozen_model import Adapters, FrozenModel
from lamini_jax.config import Config
from lamini_jax.memory import experts, storage
from lamini_jax.memory.routers.facts import NONE, FactRouter, Found
from lamini_jax.memory.scope import Scope
from lamini_jax.memory.store import Contents, StoredFact
from lamini_jax.runtime import sharding


class Candidate(NamedTuple):
    """A stored wording that a question may have asked for: its score is infinite if both are the same."""

    fact: StoredFact
    wording: str
    score: float


@dataclasses.dataclass(frozen=True)
class FactTable:
    """The contents of a store, ready to answer. It is never changed: a memory that changes gets another one."""

    config: Config
    model: FrozenModel
    contents: Contents
    router: FactRouter
    loads_N: np.ndarray  # how many facts have each expert

    @classmethod
    def of(cls, config: Config, model: FrozenModel, scope: Scope, contents: Contents) -> "FactTable":
        """The table of a store's contents."""
        before, router = Contents([], [], {}, contents.version - 1), FactRouter.empty(model, scope)
        table = cls(config, model, before, router, np.zeros(config.memory.num_experts, np.int32))
        return table.changed(list(zip(contents.facts, contents.keys, strict=True)), contents.rows)

    def changed(
        self,
        put: Sequence[tuple[StoredFact, np.ndarray]] = (),
        rows: Mapping[int, bytes] | None = None,
        forget: Sequence[str] = (),
        free: Sequence[int] = (),
    ) -> "FactTable":
        """The table after what `FactStore.write` does with the same arguments.

        What takes longer in a larger memory, if all that changes is that new facts are put, is to copy lists and dicts,
        and the keys on their devices: nothing else is made anew, or sent there.
        """
        router, loads_N = self.router.changed(put, forget), self.loads_N.copy()
        old = [i for i in (*forget, *(fact.id for fact, _ in put)) if i in self.router.places]
        _count(loads_N, map(self.fact, old), -1)
        _count(loads_N, (fact for fact, _ in put), 1)
        table = {**self.contents.rows, **(rows or {})}
        for expert in free:
            table.pop(expert, None)
        contents = Contents(router.facts, router.keys, table, self.contents.version + 1)
        return dataclasses.replace(self, contents=contents, router=router, loads_N=loads_N)

    def fact(self, fact_id: str) -> StoredFact:
        """The fact with this id."""
        return self.router.facts[self.router.places[fact_id]]

    def find(self, questions: Sequence[str], threshold: float) -> Found:
        """What each question selects."""
        find = functools.partial(self.router.find, self.model, threshold=threshold)
        return frozen_model.map_questions(self.model, questions, find)

    def nearest(self, question: str) -> list[Candidate]:
        """The stored wordings that the scope compares a question with, the best first."""
        judge = functools.partial(self.router.judged, self.model)
        (wording_X,), (score_X,) = frozen_model.map_questions(self.model, [question], judge)
        router = self.router
        order_X = np.argsort(-score_X, kind="stable")
        found = ((wording_X[i], float(score_X[i])) for i in order_X)
        return [Candidate(router.facts[router.fact_W[i]], router.texts[i], score) for i, score in found]

    def ask(
        self,
        questions: Sequence[str],
        found: Found,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> list[answering.Answer]:
        """The answers to questions of which is known what they select.

        A question in other words is answered as the stored wording that it was found by, because that was certified.
        Questions that select nothing are answered by the backbone alone, by the program that knows no memory.
        """
        answers, fires_B = {}, found.fact_B != NONE
        for index_X in map(np.flatnonzero, (fires_B, ~fires_B)):
            some = jax.tree.map(operator.itemgetter(index_X), found)
            texts, adapter_fn = self.prepared([questions[i] for i in index_X], some)
            different = list(texts if sampling else dict.fromkeys(texts))
            given = answering.ask_in_order(self.model, adapter_fn, different, max_new_tokens, sampling)
            by_text = dict(zip(different, given, strict=True))
            answers |= dict(zip(index_X.tolist(), given if sampling else map(by_text.get, texts), strict=True))
        return [answers[number] for number in range(len(questions))]

    def prepared(self, questions: list[str], found: Found) -> tuple[list[str], AdapterFn]:
        """What is answered for these questions, with which adapters: all of them select a fact, or none does."""
        if (found.fact_B == NONE).all():
            return questions, answering.BARE
        texts = [self.router.texts[wording] for wording in found.wording_B]
        return texts, answering.handed(self.model, texts, found, self.adapters)

    def adapter_fn(self, threshold: float) -> AdapterFn:
        """The memory as adapters of the backbone, none at all for a batch in which no question is in a fact's scope."""
        return AdapterFn(lambda *prompts: self.router.find(self.model, *prompts, threshold), self.adapters)

    def adapters(self, found: Found) -> Adapters:
        """The adapters of what questions have selected."""
        if (np.asarray(found.fact_B) == NONE).all():
            return Adapters(selection=found)
        return storage.builder(self._rows, self.config)(found)

    def _rows(self, expert_ids_BK: np.ndarray) -> dict[str, jax.Array]:
        """rows_BKR of some experts, which are sent to the devices as questions need them; zeros for EMPTY_SLOT."""
        shape = experts.expert_shape(self.config.backbone, self.config.memory)
        rows = [self.contents.rows.get(expert, b"") for expert in expert_ids_BK.ravel().tolist()]
        parts = storage.rows_from_bytes(rows, shape, self.config.memory.dtype)
        axes, leading = ("batch", None, *experts.AXES[1:]), expert_ids_BK.shape
        return {name: sharding.put(part.reshape(*leading, *part.shape[1:]), *axes) for name, part in parts.items()}


def _count(loads_N: np.ndarray, facts: Iterable[StoredFact], times: int) -> None:
    """Counts so many times that these facts have their experts."""
    np.add.at(loads_N, np.fromiter((expert for fact in facts for expert in fact.experts), np.int64), times)
