"""The facts of a memory, with all that answering them needs, in one SQLite file that is changed whole or not at all.

It has a row for every fact, for every wording under which the fact is found, and for every expert that a fact has.
What is deleted is overwritten (`secure_delete`); every fact and every expert has a digest, so that damage is noticed.
In a bucket the file is one object, which is read and written whole.
"""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lamini_jax.errors import Busy, Outdated, UserError
from lamini_jax.runtime import paths

NAME = "memory.sqlite"
_FORMAT = "1"
_PATIENCE = 60.0  # seconds to wait for another process that is writing
_DAMAGE = ("malformed", "not a database", "no such table", "no such column")  # in what SQLite says of a damaged file
_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE facts (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, question TEXT NOT NULL, also TEXT NOT NULL,
    answer TEXT NOT NULL, certified INTEGER NOT NULL, date TEXT NOT NULL, experts BLOB NOT NULL, digest BLOB NOT NULL);
CREATE TABLE wordings (fact TEXT NOT NULL, place INTEGER NOT NULL, key BLOB NOT NULL, PRIMARY KEY (fact, place));
CREATE TABLE experts (id INTEGER PRIMARY KEY, row BLOB NOT NULL, digest BLOB NOT NULL);
"""
_FIELDS = "id, question, also, answer, certified, date, experts"


@dataclasses.dataclass(frozen=True)
class StoredFact:
    """A fact in a memory: its wordings, its answer, and which experts it has."""

    id: str
    question: str
    answer: str
    also: tuple[str, ...] = ()  # other wordings
    certified: bool = False  # and recalled, in each of its wordings; a fact that is not does not answer
    date: str = ""  # of its last change, in UTC
    experts: tuple[int, ...] = ()

    @property
    def wordings(self) -> tuple[str, ...]:
        return self.question, *self.also


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything in a store, as it was at one moment."""

    facts: list[StoredFact]
    keys: list[np.ndarray]  # of each fact, one for each of its wordings
    rows: dict[int, bytes]  # of each expert that some fact has
    version: int = 0  # how many changes the store has seen


class FactStore:
    """The file of one memory. Raises UserError for one that is missing, damaged, full, or changed by somebody else."""

    def __init__(self, directory: Path, about: Mapping[str, str] | None = None):
        """Opens the store in a directory; with `about`, what it depends on, it is created if there is none.

        Who creates one makes sure to be alone in the directory.
        """
        self._path = self._local = directory / NAME
        self._temporary = tempfile.TemporaryDirectory() if paths.is_remote(directory) else None
        with self._reporting():
            exists = self._path.is_file()
            if not exists and about is None:
                raise UserError(f"{directory}: has no memory of facts; python -m lamini_jax.tune makes one")
            if self._temporary:
                self._local = Path(self._temporary.name) / NAME
                if exists:
                    self._local.write_bytes(self._path.read_bytes())
            if not exists:
                self._create({**about, "format": _FORMAT, "version": "0"})
            self._connection = sqlite3.connect(self._local, _PATIENCE, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA secure_delete = ON")
        with self._reading():
            self.about = dict(self._connection.execute("SELECT name, value FROM about"))
            found = self.about["format"]
        if found != _FORMAT:
            raise UserError(f"{self._path}: is of another version of this package; tune again")

    def remember(self, name: str, value: str) -> None:
        """Keeps a setting that may change."""
        if self.about.get(name) == value:
            return
        with self._reporting(), transaction(self._connection, "IMMEDIATE"):
            self._connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))
        self.about[name] = value
        self._upload()

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()
        if self._temporary:
            self._temporary.cleanup()

    def facts(self, search: str = "") -> list[StoredFact]:
        """The facts in the order in which they were added; with `search`, those with this text in any field."""
        texts = " || char(10) || ".join(("id", "question", "also", "answer"))
        query = f"SELECT {_FIELDS} FROM facts WHERE ? = '' OR instr(lower({texts}), lower(?)) ORDER BY number"
        with self._reading():
            return [_fact(row) for row in self._connection.execute(query, (search, search))]

    def read(self, key_bytes: int, row_bytes: int) -> Contents:
        """Everything, checked against the digests and the sizes of keys and rows."""
        with self._reading(), transaction(self._connection, "DEFERRED"):
            execute = self._connection.execute
            self.about = dict(execute("SELECT name, value FROM about"))
            keys: dict[str, list[bytes]] = {}
            for fact_id, key in execute("SELECT fact, key FROM wordings ORDER BY fact, place"):
                keys.setdefault(fact_id, []).append(key)
            table = execute("SELECT id, row, digest FROM experts")
            rows = {i: row for i, row, digest in table if len(row) == row_bytes and _digest(row) == digest}
            contents = Contents([], [], rows, int(self.about["version"]))
            for *row, digest in execute(f"SELECT {_FIELDS}, digest FROM facts ORDER BY number"):
                fact = _fact(row)
                own = keys.pop(fact.id, [])
                whole = _fact_digest(fact, own) == digest and {key_bytes} == {len(key) for key in own}
                if not (whole and rows.keys() >= set(fact.experts)):
                    raise ValueError(f"the fact {fact.question!r}")
                contents.facts.append(fact)
                contents.keys.append(np.frombuffer(b"".join(own), np.float16).reshape(len(own), -1))
            return contents

    def check_version(self, version: int) -> None:
        """Raises Outdated unless the store has seen so many changes, and no others since."""
        with self._reading(), self._newest() as connection:
            (found,) = connection.execute("SELECT value FROM about WHERE name = 'version'").fetchone()
        if found != str(version):
            raise Outdated(f"{self._path}: was changed by another process meanwhile; load it again")

    def copy(self, directory: Path) -> None:
        """Writes a copy of the file into a directory."""
        target = directory / NAME
        with self._reporting(), tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary) / NAME if paths.is_remote(directory) else target
            with contextlib.closing(sqlite3.connect(local)) as other:
                self._connection.backup(other)
            if local != target:
                target.write_bytes(local.read_bytes())

    def write(
        self,
        put: Sequence[tuple[StoredFact, np.ndarray]] = (),
        rows: Mapping[int, bytes] | None = None,
        forget: Sequence[str] = (),
        free: Sequence[int] = (),
    ) -> None:
        """Forgets facts by id, then puts others with the keys of their wordings in the place of those with the same id.

        `rows` are those of experts that are new or changed; those of `free` are no fact's any more. All of it is on the
        disk when this returns, or nothing has changed.
        """
        if self._temporary:
            self.check_version(int(self.about["version"]))
        with self._reporting(), transaction(self._connection, "IMMEDIATE"):
            many = self._connection.executemany
            version = self.about["version"], str(int(self.about["version"]) + 1)
            taken = "UPDATE about SET value = ? WHERE name = 'version' AND value = ?"
            if self._connection.execute(taken, version[::-1]).rowcount != 1:
                raise Outdated(f"{self._path}: was changed by another process meanwhile; load it again")
            gone = [(fact_id,) for fact_id in (*forget, *(fact.id for fact, _ in put))]
            many("DELETE FROM wordings WHERE fact = ?", gone)
            many("DELETE FROM facts WHERE id = ?", gone[: len(forget)])
            many("DELETE FROM experts WHERE id = ?", ((int(expert),) for expert in free))
            rows = (rows or {}).items()
            many("INSERT OR REPLACE INTO experts VALUES (?, ?, ?)", ((int(i), row, _digest(row)) for i, row in rows))
            for fact, key_WC in put:
                self._put(fact, [key_C.tobytes() for key_C in key_WC.astype(np.float16)])
        self.about["version"] = version[1]
        self._upload()

    def _put(self, fact: StoredFact, keys: list[bytes]) -> None:
        values = fact.id, fact.question, json.dumps(fact.also, ensure_ascii=False), fact.answer, int(fact.certified)
        values += fact.date, np.array(fact.experts, "<i4").tobytes(), _fact_digest(fact, keys)
        update = ", ".join(f"{name} = excluded.{name}" for name in (*_FIELDS.split(", ")[1:], "digest"))
        insert = f"INSERT INTO facts ({_FIELDS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        self._connection.execute(f"{insert} ON CONFLICT (id) DO UPDATE SET {update}", values)
        kept = ((fact.id, place, key) for place, key in enumerate(keys))
        self._connection.executemany("INSERT INTO wordings VALUES (?, ?, ?)", kept)

    def _create(self, about: Mapping[str, str]) -> None:
        """Makes the file, which gets its name when it is whole: an empty one is damaged."""
        unfinished = self._local.with_name(f".{NAME}.unfinished")
        unfinished.unlink(missing_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(unfinished, isolation_level=None)) as made:
                made.execute("PRAGMA journal_mode = MEMORY")
                made.execute("BEGIN")
                for statement in _SCHEMA.split(";\n"):
                    made.execute(statement)
                made.executemany("INSERT INTO about VALUES (?, ?)", about.items())
                made.execute("COMMIT")
            os.replace(unfinished, self._local)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        self._upload()

    @contextlib.contextmanager
    def _newest(self) -> Iterator[sqlite3.Connection]:
        """The file as it is now, which in a bucket somebody else may have replaced."""
        if not self._temporary:
            yield self._connection
            return
        with paths.local_file(self._path) as path, contextlib.closing(sqlite3.connect(path)) as connection:
            yield connection

    def _upload(self) -> None:
        if self._temporary:
            with self._reporting():
                self._path.write_bytes(self._local.read_bytes())

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns SQLite's errors into one line."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            remote, said = paths.failure(error), getattr(error, "strerror", None) or str(error)
            if "full" in said or getattr(error, "errno", None) == errno.ENOSPC:
                reason = "the disk is full; nothing has changed; make room and run again"
            elif "locked" in said:
                raise Busy(f"{self._path}: another process is writing; wait and run again") from error
            elif any(sign in said for sign in _DAMAGE):
                reason = _damaged(said)
            else:
                reason = f"cannot be used ({remote or said}); nothing has changed"
            raise UserError(f"{self._path}: {reason}") from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """The same for reading, where what does not fit is damaged."""
        try:
            with self._reporting():
                yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self._path}: {_damaged(str(error))}") from error


def _damaged(what: str) -> str:
    remedy = "put back a copy of the file, or remove it and tune all facts again"
    return f"is damaged ({what}); {remedy}"


def now() -> str:
    """The date that a change gets."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _fact(row: Sequence) -> StoredFact:
    fact_id, question, also, answer, certified, date, experts = row[:7]
    experts = tuple(np.frombuffer(experts, "<i4").tolist())
    return StoredFact(
        fact_id, question, answer, tuple(json.loads(also) if also != "[]" else ()), bool(certified), date, experts
    )


def _fact_digest(fact: StoredFact, keys: list[bytes]) -> bytes:
    return _digest(json.dumps(tuple(vars(fact).values())).encode() + b"".join(keys))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    """What is written inside this context is stored whole, or not at all. `kind` is IMMEDIATE for writing."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # it may have been rolled back already
            connection.execute("ROLLBACK")
        raise
