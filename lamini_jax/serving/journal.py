"""What a server has promised to do with its memory, and what has become of each fact, in a SQLite file beside it.

A request is in the file, and on the disk, before it is acknowledged. What is deleted is overwritten, as in the memory's
own store; no answer that a fact had before is kept.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lamini_jax.errors import UserError
from lamini_jax.memory.store import transaction
from lamini_jax.runtime import paths

NAME = "journal.sqlite"
PUT, FORGET = "put", "forget"
_PATIENCE = 5.0  # seconds
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL,
    fact TEXT UNIQUE NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, also TEXT NOT NULL, date TEXT NOT NULL,
    reason TEXT);
CREATE TABLE IF NOT EXISTS history (number INTEGER PRIMARY KEY, fact TEXT NOT NULL, event TEXT NOT NULL,
    date TEXT NOT NULL, reason TEXT);
CREATE INDEX IF NOT EXISTS history_of ON history (fact);
CREATE TABLE IF NOT EXISTS conflicts (fact TEXT NOT NULL, other TEXT NOT NULL, PRIMARY KEY (fact, other));
"""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be done with a fact. Of several requests for the same fact, the last one counts."""

    number: int
    kind: str
    fact: str  # its id
    question: str = ""
    answer: str = ""
    also: tuple[str, ...] = ()
    date: str = ""
    reason: str | None = None  # why it could not be done; None: it is still to be done


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a fact."""

    fact: str
    event: str  # "added", "changed", "certified" or "failed"
    date: str
    reason: str | None = None


class Journal:
    """The file. Every method is one transaction, which is on the disk when it returns."""

    def __init__(self, directory: Path):
        """Opens the journal in a directory, or makes it.

        Raises UserError if that is in a bucket, if another server has it open, or if it is damaged.
        """
        if paths.is_remote(directory):
            raise UserError(f"{directory}: a server writes its journal on a disk of its machine; copy the memory there")
        self._path = directory / NAME
        with self._reporting():
            self._lock = self._locked()
            self._connection = sqlite3.connect(self._path, _PATIENCE, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA secure_delete = ON")
            self._connection.execute("PRAGMA synchronous = EXTRA")
            self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()
        os.close(self._lock)

    def tasks(self) -> list[Task]:
        """What is to be done, and what could not be, the oldest first."""
        names = ", ".join(field.name for field in dataclasses.fields(Task))
        with self._reporting():
            rows = self._connection.execute(f"SELECT {names} FROM tasks ORDER BY number").fetchall()
            return [Task(**{**vars(task := Task(*row)), "also": tuple(json.loads(task.also))}) for row in rows]

    def conflicts(self) -> dict[str, list[str]]:
        """The ids of the facts from which each fact is hard to tell apart."""
        found: dict[str, list[str]] = {}
        with self._reporting():
            for fact, other in self._connection.execute("SELECT fact, other FROM conflicts ORDER BY fact, other"):
                found.setdefault(fact, []).append(other)
        return found

    def history(self, fact: str) -> list[Event]:
        """What happened to a fact, the oldest first."""
        query = "SELECT fact, event, date, reason FROM history WHERE fact = ? ORDER BY number"
        with self._reporting():
            return [Event(*row) for row in self._connection.execute(query, (fact,))]

    def ask(self, tasks: Sequence[Task], events: Sequence[Event] = ()) -> list[Task]:
        """Writes down what is to be done, in the place of what was to be done with the same facts; with its numbers."""
        written = []
        with self._transaction() as connection:
            for task in tasks:
                self._erase(connection, [task.fact], whole=task.kind == FORGET)
                values = task.kind, task.fact, task.question, task.answer, json.dumps(task.also), task.date
                insert = "INSERT INTO tasks (kind, fact, question, answer, also, date) VALUES (?, ?, ?, ?, ?, ?)"
                number = connection.execute(insert, values).lastrowid
                written.append(dataclasses.replace(task, number=number, reason=None))
            self._tell(connection, events)
        return written

    def done(self, tasks: Iterable[Task], events: Sequence[Event], pairs: Sequence[tuple[str, str]] = ()) -> None:
        """Tasks were carried out; `pairs` of facts are hard to tell apart."""
        tasks = list(tasks)
        with self._transaction() as connection:
            connection.executemany("DELETE FROM tasks WHERE number = ?", [(task.number,) for task in tasks])
            connection.executemany("DELETE FROM conflicts WHERE ? IN (fact, other)", [(task.fact,) for task in tasks])
            self._tell(connection, events)
            both = [*pairs, *(pair[::-1] for pair in pairs)]
            connection.executemany("INSERT OR IGNORE INTO conflicts VALUES (?, ?)", both)

    def failed(self, task: Task, event: Event) -> None:
        """A task could not be carried out, for the event's reason."""
        with self._transaction() as connection:
            connection.execute("UPDATE tasks SET reason = ? WHERE number = ?", (event.reason, task.number))
            self._tell(connection, [event])

    def forgotten(self, facts: Sequence[str], tasks: Iterable[Task]) -> None:
        """Facts are gone, and nothing of them is left here."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM tasks WHERE number = ?", [(task.number,) for task in tasks])
            for table in ("history", "conflicts"):
                connection.executemany(f"DELETE FROM {table} WHERE fact = ?", [(fact,) for fact in facts])
            connection.executemany("DELETE FROM conflicts WHERE other = ?", [(fact,) for fact in facts])
            for table in ("history", "tasks"):  # why another fact was refused quotes this one, with its id
                update = f"UPDATE {table} SET reason = 'another fact, forgotten since' WHERE instr(reason, ?)"
                connection.executemany(update, [(fact,) for fact in facts])

    def _locked(self) -> int:
        """A handle of the file that keeps other servers out, for as long as it is open."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"{self._path}: another server has this memory; stop it, or copy the memory") from None
        return handle

    def _erase(self, connection: sqlite3.Connection, facts: Sequence[str], whole: bool) -> None:
        for table in ("tasks", "history") if whole else ("tasks",):
            connection.executemany(f"DELETE FROM {table} WHERE fact = ?", [(fact,) for fact in facts])

    def _tell(self, connection: sqlite3.Connection, events: Sequence[Event]) -> None:
        insert = "INSERT INTO history (fact, event, date, reason) VALUES (:fact, :event, :date, :reason)"
        connection.executemany(insert, map(vars, events))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reporting(), transaction(self._connection, "IMMEDIATE"):
            yield self._connection

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns SQLite's errors into one line."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be used ({error}); make room, or remove it if damaged") from error
