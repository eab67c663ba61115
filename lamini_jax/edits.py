"""What a change of facts means for a memory: what is tuned, with which experts, and what is stored."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lamini_jax.config import identity
from lamini_jax.data.facts import Fact
from lamini_jax.errors import UserError
from lamini_jax.memory import allocation
from lamini_jax.memory.fact_table import FactTable
from lamini_jax.memory.routers import facts as fact_router
from lamini_jax.memory.scope.wordings import normalized
from lamini_jax.memory.store import StoredFact, now
from lamini_jax.runtime import paths, processes, workdir
from lamini_jax.training import additions
from lamini_jax.training.additions import Addition

_UNFINISHED = "adding"


class Plan(NamedTuple):
    """What a list of facts changes in a memory."""

    new: list[Fact]
    changed: list[Fact]  # that have another answer or other wordings
    again: list[Fact]  # that are in it but do not hold
    same: list[Fact]
    gone: list[StoredFact]  # that are to be forgotten

    @property
    def tuned(self) -> list[Fact]:
        """The facts to tune."""
        return [*self.new, *self.changed, *self.again]

    def __str__(self) -> str:
        counts = {"new": self.new, "changed": self.changed, "not yet held": self.again, "the same": self.same}
        counts["to forget"] = self.gone
        return ", ".join(f"{len(facts)} {name}" for name, facts in counts.items() if facts) or "nothing to do"


class Edit(NamedTuple):
    """What is written into the store, the table after that, and what came of it."""

    put: list[tuple[StoredFact, np.ndarray]]
    rows: dict[int, bytes]
    forget: list[str]
    free: list[int]
    after: FactTable
    epochs: int = 0
    conflicts: tuple[tuple[str, str], ...] = ()  # ids of facts with other answers that the scope cannot tell apart
    generated: tuple[str, ...] = ()  # what each of `put` was answered with

    @property
    def writing(self) -> dict[str, Any]:
        """The arguments of `FactStore.write`."""
        return {"put": self.put, "rows": self.rows, "forget": self.forget, "free": self.free}


def plan(table: FactTable, facts: Sequence[Fact], replace: bool = False, failing: Sequence[str] = ()) -> Plan:
    """Compares facts with those of a memory, of which those with the ids `failing` do not hold.

    `replace` forgets what is not in the list. Raises UserError for a question that is stored in another writing.
    """
    places, stored = table.router.places, table.contents.facts
    new, changed, again, same = [], [], [], []
    for fact in facts:
        known = stored[places[fact.id]] if fact.id in places else None
        if known is None:
            new.append(fact)
        elif (known.answer, known.also) != (fact.answer, fact.also):
            changed.append(fact)
        else:
            (same if known.certified and fact.id not in failing else again).append(fact)
    listed = {fact.id for fact in facts}
    gone = [fact for fact in stored if fact.id not in listed] if replace else []
    check_wordings(facts, table, {fact.id for fact in gone} | listed)
    return Plan(new, changed, again, same, gone)


def check_wordings(facts: Sequence[Fact], table: FactTable | None = None, without: Collection[str] = ()) -> None:
    """Raises UserError if a question has no words, or asks the same as another one with another answer.

    Other ones are those of these facts, and those of the table's, but for the table's with the ids `without`.
    """
    asking = table.router.asking if table else {}
    owners: dict[str, Fact | StoredFact] = {}
    for fact in facts:
        for wording in fact.wordings:
            if not (same := normalized(wording)):
                raise UserError(f"the question {wording!r} has no words; write it out")
            stored = [table.fact(fact_id) for fact_id in asking.get(same, ()) if fact_id not in without]
            for other in (owners.setdefault(same, fact), *stored):
                if other.id != fact.id and other.answer != fact.answer:
                    both = f"{wording!r} asks the same as {other.question!r} (id {other.id})"
                    raise UserError(f"{both}, whose answer is {other.answer!r}; keep one of them, or change that one")


def forgetting(table: FactTable, ids: Sequence[str]) -> Edit:
    """Facts are forgotten: their experts are as if they had never been given out."""
    return _Draft.without(table, ids).edit([], list(ids))


def tuning(table: FactTable, plan: Plan, directory: Path, threshold: float) -> Edit:
    """Tunes what a plan says until it holds, or the budget ends; what it needs to go on is kept in the directory."""
    gone = [fact.id for fact in plan.gone]
    if not plan.tuned:
        return forgetting(table, gone)
    draft = _Draft.without(table, [*gone, *(fact.id for fact in plan.changed)])
    draft.additions = {fact.id: _addition(table.fact(fact.id)) for fact in plan.again}
    with _unfinished(table, plan, directory) as unfinished:
        draft.tune(plan.tuned, unfinished)
    return _judged(draft, plan, gone, threshold)


def finished(directory: Path) -> None:
    """Removes what `tuning` has kept, once its result is in the store."""
    _remove(directory / _UNFINISHED)


@dataclasses.dataclass
class _Draft:
    """A memory while it is changed: who has which experts, and what has become of them."""

    table: FactTable
    loads_N: np.ndarray
    released: set[int]  # experts of facts that are gone, or have others now
    additions: dict[str, Addition] = dataclasses.field(default_factory=dict)  # facts that are tuned
    rows: dict[int, bytes] = dataclasses.field(default_factory=dict)  # that are new or changed
    holds: dict[str, bool] = dataclasses.field(default_factory=dict)
    epochs: int = 0

    @classmethod
    def without(cls, table: FactTable, ids: Sequence[str]) -> "_Draft":
        """The memory without some of its facts."""
        draft = cls(table, table.loads_N.copy(), set())
        for fact_id in ids:
            draft.release(table.fact(fact_id).experts)
        return draft

    def release(self, experts: Sequence[int]) -> None:
        """Takes experts back from a fact."""
        self.loads_N[list(experts)] -= 1
        self.released.update(experts)
        for expert in experts:
            if not self.loads_N[expert]:
                self.rows.pop(expert, None)

    def tune(self, facts: Sequence[Fact], directory: Path) -> None:
        """Gives facts experts and tunes them; those that do not hold begin anew with more experts."""
        memory, top_k = self.table.config.memory, self.table.config.memory.top_k
        todo = {fact.id: fact for fact in facts}
        for number in range(allocation.ROUNDS):
            without = [fact for fact_id, fact in todo.items() if fact_id not in self.additions]
            experts_FK = allocation.give_out(self.loads_N, len(without), top_k)
            for fact, ids_K in zip(without, experts_FK.tolist(), strict=True):
                self.additions[fact.id] = Addition(fact.id, fact.wordings, fact.answer, tuple(ids_K))
                self.loads_N[ids_K] += 1
            self._settle(list(todo), directory / f"round-{number}")
            todo = {fact_id: fact for fact_id, fact in todo.items() if not self.holds[fact_id]}
            top_k *= allocation.MORE
            if not todo or number == allocation.ROUNDS - 1 or top_k > memory.num_experts:
                return
            for fact_id in todo:
                self.release(self.additions.pop(fact_id).experts)

    def _settle(self, ids: list[str], directory: Path) -> None:
        """Tunes facts, and with them whoever else has an expert that this has changed, until nobody is left to ask."""
        for number in itertools.count():
            asked = [self.additions[fact_id] for fact_id in ids]
            known = {expert: row for fact in asked for expert in fact.experts if (row := self._row(expert))}
            done = additions.tune(self.table.config, self.table.model, asked, known, directory / str(number))
            changed = {expert for expert, row in done.rows.items() if known.get(expert) != row}
            self.rows |= {expert: done.rows[expert] for expert in changed}
            self.epochs += done.epochs
            touched = self._sharing({expert for expert in changed if self.loads_N[expert] > 1}, set(ids))
            if not touched:
                self.holds |= dict(zip(ids, done.holds_F.tolist(), strict=True))
                return
            self.additions |= touched
            ids = [*ids, *touched]

    def _row(self, expert: int) -> bytes | None:
        """The row of an expert that has been trained. A free one begins anew, whoever has had it before."""
        stored = None if expert in self.released else self.table.contents.rows.get(expert)
        return self.rows.get(expert, stored)

    def _sharing(self, experts: set[int], known: set[str]) -> dict[str, Addition]:
        """The other facts that have one of these experts."""
        if not experts:
            return {}
        stored = {fact.id: _addition(fact) for fact in self.table.contents.facts} | self.additions
        return {i: fact for i, fact in stored.items() if i not in known and not experts.isdisjoint(fact.experts)}

    def edit(self, put: list[tuple[StoredFact, np.ndarray]], forget: list[str]) -> Edit:
        """What is written of it."""
        free = sorted(expert for expert in self.released if not self.loads_N[expert])
        after = self.table.changed(put, self.rows, forget, free)
        return Edit(put, self.rows, forget, free, after, self.epochs)


def _judged(draft: _Draft, plan: Plan, gone: list[str], threshold: float) -> Edit:
    """The edit, after its facts were asked for as anybody will ask for them, in each of their wordings."""
    table, tuned, date = draft.table, {fact.id: fact for fact in plan.tuned}, now()
    put = []
    for fact_id, holds in draft.holds.items():
        fact = tuned.get(fact_id) or table.fact(fact_id)
        when = date if fact_id in tuned else fact.date
        experts = draft.additions[fact_id].experts
        put.append(StoredFact(fact_id, fact.question, fact.answer, tuple(fact.also), holds, when, tuple(experts)))
    texts = [text for fact in put for text in fact.wordings]
    owner_W = np.repeat(np.arange(len(put)), [len(fact.wordings) for fact in put])
    key_WC = fact_router.keys(table.model, texts, table.router.scope)
    keys = [key_WC[owner_W == number] for number in range(len(put))]
    edit = draft.edit(list(zip(put, keys, strict=True)), gone)
    found = edit.after.find(texts, threshold)
    generated, conflicts = [fact.answer for fact in put], set()
    for place, (answer, owner) in enumerate(zip(edit.after.ask(texts, found), owner_W, strict=True)):
        if answer.text != put[owner].answer:
            generated[owner] = answer.text
        if found.runner_up_score_B[place] >= threshold:
            other = edit.after.contents.facts[found.runner_up_B[place]]
            if other.answer != put[owner].answer:
                conflicts.add(tuple(sorted((put[owner].id, other.id))))
    certified = [fact.certified and said == fact.answer for fact, said in zip(put, generated, strict=True)]
    if certified != [fact.certified for fact in put]:
        put = [dataclasses.replace(fact, certified=holds) for fact, holds in zip(put, certified, strict=True)]
        edit = draft.edit(list(zip(put, keys, strict=True)), gone)
    return edit._replace(conflicts=tuple(sorted(conflicts)), generated=tuple(generated))


def _addition(fact: StoredFact) -> Addition:
    return Addition(fact.id, fact.wordings, fact.answer, fact.experts)


@contextlib.contextmanager
def _unfinished(table: FactTable, plan: Plan, directory: Path) -> Iterator[Path]:
    """Where tuning keeps what it needs to go on: of use only for the same facts in the same memory, with the same
    optimizer in the same batches."""
    place, config, tuning = directory / _UNFINISHED, identity(table.config), table.config.tuning
    how = tuning.optimizer.name, tuning.batch_size, table.config.memory.top_k
    facts = [dataclasses.astuple(fact) for fact in plan.tuned]
    name = place / "plan.json"
    described = json.dumps([table.contents.version, config, how, facts])
    try:
        if not (name.is_file() and name.read_bytes() == described.encode()):
            _remove(place)
            place.mkdir(parents=True, exist_ok=True)
            workdir.write_text(name, described)
    except OSError as error:
        raise UserError(f"{place}: cannot be used ({error.strerror or error}); nothing has changed") from error
    processes.barrier("unfinished")
    yield place


def _remove(place: Path) -> None:
    if processes.is_primary() and place.exists():
        paths.remove(place)
    processes.barrier("removed")
