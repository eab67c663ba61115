"""The one who changes a server's memory: a thread that adds, changes and forgets, while others answer from it.

What is asked of it is in a journal before anybody is told so, and is carried out after a kill too. Each change is made
in a copy of the memory, whose table then replaces the one that questions are answered from.
"""

import contextlib
import copy
import dataclasses
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

from lamini_jax import edits
from lamini_jax.data import facts as facts_lib
from lamini_jax.data.facts import Fact
from lamini_jax.errors import PREEMPTED, Busy, Outdated, UserError
from lamini_jax.fact_memory import FactMemory
from lamini_jax.memory.fact_table import FactTable
from lamini_jax.memory.store import StoredFact, now
from lamini_jax.runtime import processes, sharding
from lamini_jax.serving.journal import FORGET, PUT, Event, Journal, Task
from lamini_jax.serving.work import Full

PENDING, CERTIFIED, FAILED = "pending", "certified", "failed"
# Facts are tuned so many at once: each number compiles programs of its own, and small ones let early facts hold soon.
_BATCHES = (64, 8, 1)
_MOST_PENDING = 10_000
_WAIT = 1.0  # seconds until another process that is at work in the memory is looked for again
_LACKING = "it is not answered exactly in each of its wordings; send it again to tune it further"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A fact as a server knows it."""

    id: str
    question: str
    answer: str
    also: tuple[str, ...]
    state: str
    date: str
    reason: str | None = None  # of a fact that failed
    experts: tuple[int, ...] = ()
    conflicts: tuple[str, ...] = ()  # ids of facts with other answers that the scope cannot tell apart


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a memory has, and what is to be done with it."""

    certified: int
    failed: int
    pending: int


class Tuner:
    """Changes a memory in the background. `publish` is called, in its thread, with each new table."""

    def __init__(self, memory: FactMemory, publish: Callable[[FactTable], None]):
        """Raises UserError if the journal beside the memory cannot be used."""
        self._memory, self._own, self._publish = memory, copy.copy(memory), publish
        self._journal = Journal(memory.directory)
        self._conflicts = self._journal.conflicts()
        # What is in the journal. What could not be forgotten is tried again.
        self._tasks = {
            task.fact: dataclasses.replace(task, reason=None) if task.kind == FORGET else task
            for task in self._journal.tasks()
        }
        self._waiting: list[tuple[set[int], Future]] = []
        self._changed = threading.Condition()  # guards all of these
        self._ending = threading.Event()
        self._thread = threading.Thread(target=sharding.carried(self._run), name="tuner", daemon=True)

    def start(self) -> None:
        """Begins, with what a server that ended before has left undone."""
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """Ends as soon as it can: what is not done then will be when a server starts again."""
        self._ending.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        with self._changed:
            for _, future in self._waiting:
                _finish(future)
            self._waiting = []
        if not self._thread.is_alive():
            self._journal.close()

    @property
    def alive(self) -> bool:
        """Whether what is asked will be done."""
        return self._thread.is_alive()

    def put(self, facts: Sequence[dict]) -> dict[str, str]:
        """Writes down that these facts are to be added or changed. Returns by id what that will do: ADD, UPDATE, NONE.

        Raises UserError for bad facts and for two answers to one question, and Full.
        """
        read = facts_lib.read(facts, self._own.model.tokenizer, self._own.model.max_seq_len)
        with self._changed:
            ids = {fact.id for fact in read}
            self._check(read, ids)
            known = {fact.id: self._entry(fact.id) for fact in read}
            todo = [fact for fact in read if not _same(known[fact.id], fact)]
            if sum(task.reason is None for task in self._tasks.values()) + len(todo) > _MOST_PENDING:
                raise Full(f"{_MOST_PENDING} facts are pending; send more when some of them hold")
            date = now()
            tasks = [Task(0, PUT, fact.id, fact.question, fact.answer, fact.also, date) for fact in todo]
            events = [Event(fact.id, "changed" if known[fact.id] else "added", date) for fact in todo]
            self._ask(tasks, events)
            doing = {fact.id: "UPDATE" if known[fact.id] else "ADD" for fact in todo}
            return {fact.id: doing.get(fact.id, "NONE") for fact in read}

    def forget(self, fact: str) -> None:
        """Writes down that a fact is to be forgotten. Raises KeyError if there is none with this id."""
        with self._changed:
            if self._entry(fact) is None:
                raise KeyError(fact)
            self._ask([Task(0, FORGET, fact, date=now())], [])

    def settled(self, facts: Collection[str]) -> Future:
        """Is done when nothing that was asked of these facts until now is left to do."""
        future: Future = Future()
        with self._changed:
            numbers = {self._tasks[fact].number for fact in facts if self._is_pending(fact)}
            if numbers:
                self._waiting.append((numbers, future))
            else:
                future.set_result(None)
        return future

    def entry(self, fact: str) -> Entry | None:
        """The fact with this id, or None."""
        with self._changed:
            return self._entry(fact)

    def entries(self, search: str = "") -> list[Entry]:
        """All facts, in the order in which they came; with `search`, those with this text in any field."""
        with self._changed:
            table = self._memory.table
            stored = [fact.id for fact in table.contents.facts]
            new = [fact for fact in self._tasks if fact not in table.router.places]
            found = [entry for fact in (*stored, *new) if (entry := self._entry(fact, table))]
        text = search.lower()
        return [fact for fact in found if text in "\n".join((fact.id, fact.question, *fact.also, fact.answer)).lower()]

    def history(self, fact: str) -> list[Event] | None:
        """What happened to a fact, the oldest first; None if there is none with this id."""
        with self._changed:
            entry = self._entry(fact)
            events = self._journal.history(fact) if entry else []
        # What other commands have stored has no history.
        return events or [Event(fact, entry.state, entry.date, entry.reason)] if entry else None

    @property
    def figures(self) -> Figures:
        """How many facts are in which state."""
        with self._changed:
            table, reasons = self._memory.table, [task.reason for task in self._tasks.values()]
        certified = table.router.holding
        failed = len(table.contents.facts) - certified + sum(reason is not None for reason in reasons)
        return Figures(certified, failed, sum(reason is None for reason in reasons))

    def _check(self, read: Sequence[Fact], ids: set[str]) -> None:
        """Raises UserError if a fact asks the same as another one, stored or pending, and has another answer."""
        pending = [Fact(task.fact, task.question, task.answer, task.also) for task in self._tasks.values()]
        pending = [fact for fact in pending if fact.question and fact.id not in ids]
        gone = ids | self._tasks.keys()  # as they are stored, they will not be any more
        edits.check_wordings([*read, *pending], self._memory.table, gone)

    def _ask(self, tasks: list[Task], events: list[Event]) -> None:
        if not tasks:
            return
        for task in self._journal.ask(tasks, events):
            replaced = self._tasks.pop(task.fact, None)
            self._tasks[task.fact] = task
            if replaced:
                self._settle([replaced])
        self._changed.notify_all()

    def _is_pending(self, fact: str) -> bool:
        return fact in self._tasks and self._tasks[fact].reason is None

    def _entry(self, fact: str, table: FactTable | None = None) -> Entry | None:
        task, table = self._tasks.get(fact), table or self._memory.table
        place = table.router.places.get(fact)
        stored = None if place is None else table.contents.facts[place]
        experts = () if stored is None else stored.experts
        conflicts = tuple(self._conflicts.get(fact, ()))
        if task is None:
            return None if stored is None else _stored(stored, conflicts)
        if task.kind == FORGET:
            kept = stored and task.reason and dataclasses.replace(_stored(stored, conflicts), reason=task.reason)
            return kept or None
        state = PENDING if task.reason is None else FAILED
        given = task.question, task.answer, task.also, state, task.date, task.reason
        return Entry(fact, *given, experts, conflicts)

    def _run(self) -> None:
        with processes.in_background(self._ending):
            while tasks := self._next():
                try:
                    self._guard(tasks, self._carry_out_forget if tasks[0].kind == FORGET else self._carry_out_put)
                except Exception:  # the journal cannot be written: what is to be done stays to be done
                    _log.exception("the journal cannot be written")
                    self._ending.wait(_WAIT)

    def _next(self) -> list[Task]:
        """What to do next, all of it of one kind, when there is something; nothing at the end."""
        with self._changed:
            while not self._ending.is_set():
                todo = [task for task in self._tasks.values() if task.reason is None]
                if gone := [task for task in todo if task.kind == FORGET]:
                    return gone
                if todo:
                    return todo[: next(size for size in _BATCHES if size <= len(todo))]
                self._changed.wait()
        return []

    def _guard(self, tasks: list[Task], carry_out: Callable[[list[Task]], None]) -> None:
        """Carries tasks out, each by itself if they fail together, so that one of them is to blame."""
        try:
            carry_out(tasks)
            return
        except (Busy, Outdated) as error:
            _log.warning("%s", error)
            if isinstance(error, Outdated):
                with contextlib.suppress(UserError):
                    self._own.refresh()
                    self._hand_out()
            self._ending.wait(_WAIT)
            return
        except UserError as error:
            if error.status == PREEMPTED:
                return
            reason = str(error)
        except Exception as error:  # whatever it is, the server goes on, and says so
            _log.exception("%d facts could not be tuned", len(tasks))
            reason = f"unexpected {type(error).__name__}"
        if len(tasks) > 1:
            for task in tasks:
                if not self._ending.is_set():
                    self._guard([task], carry_out)
            return
        self._fail(tasks[0], reason)

    def _carry_out_put(self, tasks: list[Task]) -> None:
        facts = [{"question": task.question, "answer": task.answer, "also": task.also} for task in tasks]
        change = self._own.add(facts)
        self._hand_out()
        date, events, table = now(), [], self._own.table
        for task in tasks:
            holds = table.fact(task.fact).certified
            events.append(Event(task.fact, CERTIFIED if holds else FAILED, date, None if holds else _LACKING))
        with self._changed:
            # Of a fact that is to be forgotten since, nothing more is written.
            gone = {task.fact for task in self._tasks.values() if task.kind == FORGET}
            pairs = [pair for pair in change.conflicts if gone.isdisjoint(pair)]
            self._journal.done(tasks, [event for event in events if event.fact not in gone], pairs)
            self._remove(tasks)

    def _carry_out_forget(self, tasks: list[Task]) -> None:
        ids = [task.fact for task in tasks]
        self._own.erase_traces(ids)
        if stored := [fact for fact in ids if fact in self._own.table.router.places]:
            self._own.forget(stored)
            self._hand_out()
        with self._changed:
            self._journal.forgotten(ids, tasks)
            self._remove(tasks)

    def _hand_out(self) -> None:
        self._publish(self._own.table)

    def _fail(self, task: Task, reason: str) -> None:
        with self._changed:
            self._journal.failed(task, Event(task.fact, FAILED, now(), reason))
            if self._tasks.get(task.fact) == task:
                self._tasks[task.fact] = dataclasses.replace(task, reason=reason)
            self._settle([task])

    def _remove(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if self._tasks.get(task.fact) == task:
                del self._tasks[task.fact]
        self._conflicts = self._journal.conflicts()
        self._settle(tasks)

    def _settle(self, tasks: Sequence[Task]) -> None:
        """Tells those who wait for these tasks."""
        numbers, waiting = {task.number for task in tasks}, []
        for left, future in self._waiting:
            left -= numbers
            if left:
                waiting.append((left, future))
            else:
                _finish(future)
        self._waiting = waiting


def _finish(future: Future) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(None)


def _stored(fact: StoredFact, conflicts: tuple[str, ...]) -> Entry:
    state, reason = (CERTIFIED, None) if fact.certified else (FAILED, _LACKING)
    return Entry(fact.id, fact.question, fact.answer, fact.also, state, fact.date, reason, fact.experts, conflicts)


def _same(entry: Entry | None, fact: Fact) -> bool:
    """Whether a fact is stored as it is, or will be."""
    if entry is None or entry.state == FAILED:
        return False
    return (entry.answer, tuple(entry.also)) == (fact.answer, fact.also)
