"""What a memory of facts answers from, in this process: its facts, the router that finds them, and their experts."""

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lamini_jax.backbone import answering, frozen_model
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.decoding import Sampling
from lamini_jax.backbone.frozen_model import Adapters, FrozenModel
from lamini_jax.config import Config
from lamini_jax.memory import experts, storage
from lamini_jax.memory.routers.facts import NONE, FactRouter, Found, Wordings
from lamini_jax.memory.scope import Scope
from lamini_jax.memory.scope.wordings import Statistics, Words, normalized
from lamini_jax.memory.store import Contents, StoredFact
from lamini_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class FactTable:
    """The contents of a store, ready to answer. It is never changed: a memory that changes gets another one."""

    config: Config
    model: FrozenModel
    scope: Scope
    contents: Contents
    statistics: Statistics  # of the wordings of the facts that answer

    @classmethod
    def of(cls, config: Config, model: FrozenModel, scope: Scope, contents: Contents) -> "FactTable":
        """The table of a store's contents."""
        statistics = Statistics(Words(model))
        statistics.add(text for fact in contents.facts if fact.certified for text in fact.wordings)
        return cls(config, model, scope, contents, statistics)

    def changed(
        self,
        put: Sequence[tuple[StoredFact, np.ndarray]] = (),
        rows: Mapping[int, bytes] | None = None,
        forget: Sequence[str] = (),
        free: Sequence[int] = (),
    ) -> "FactTable":
        """The table after what `FactStore.write` does with the same arguments."""
        places, contents = self.places, self.contents
        facts, keys, statistics = list(contents.facts), list(contents.keys), self.statistics.copy()
        gone = [places[fact_id] for fact_id in (*forget, *(fact.id for fact, _ in put)) if fact_id in places]
        statistics.remove(text for place in gone if facts[place].certified for text in facts[place].wordings)
        statistics.add(text for fact, _ in put if fact.certified for text in fact.wordings)
        for fact, key_WC in put:
            if fact.id in places:
                facts[places[fact.id]], keys[places[fact.id]] = fact, key_WC
            else:
                facts.append(fact)
                keys.append(key_WC)
        if forget:
            dropped = {places[fact_id] for fact_id in forget}
            facts, keys = ([x for place, x in enumerate(xs) if place not in dropped] for xs in (facts, keys))
        table = {**contents.rows, **(rows or {})}
        for expert in free:
            table.pop(expert, None)
        return dataclasses.replace(
            self, contents=Contents(facts, keys, table, contents.version + 1), statistics=statistics
        )

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """The place of each fact by its id."""
        return {fact.id: place for place, fact in enumerate(self.contents.facts)}

    def fact(self, fact_id: str) -> StoredFact:
        """The fact with this id."""
        return self.contents.facts[self.places[fact_id]]

    @functools.cached_property
    def asking(self) -> dict[str, StoredFact]:
        """The fact of each wording, of which case, space and final punctuation do not count."""
        return {normalized(text): fact for fact in self.contents.facts for text in fact.wordings}

    @functools.cached_property
    def holding(self) -> list[StoredFact]:
        """The facts that answer: a fact that is not certified does not. The router knows them by their numbers here."""
        return [fact for fact in self.contents.facts if fact.certified]

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each fact that answers by its id."""
        return {fact.id: number for number, fact in enumerate(self.holding)}

    @functools.cached_property
    def loads(self) -> Counter[int]:
        """How many facts have each expert."""
        return Counter(expert for fact in self.contents.facts for expert in fact.experts)

    @functools.cached_property
    def router(self) -> FactRouter:
        """Finds the facts that answer."""
        kept = [key for fact, key in zip(self.contents.facts, self.contents.keys, strict=True) if fact.certified]
        texts = [text for fact in self.holding for text in fact.wordings]
        fact_W = np.repeat(np.arange(len(kept)), [len(key_WC) for key_WC in kept])
        key_WC = np.concatenate(kept) if kept else np.zeros((0, self.scope.width), np.float16)
        experts_F = [fact.experts for fact in self.holding]
        return FactRouter(self.scope, self.statistics, Wordings(texts, key_WC, fact_W), experts_F)

    def find(self, questions: Sequence[str], threshold: float) -> Found:
        """What each question selects."""
        find = functools.partial(self.router.find, self.model, threshold=threshold)
        return frozen_model.map_questions(self.model, questions, find)

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
        texts = [self.router.wordings.texts[wording] for wording in found.wording_B]
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
