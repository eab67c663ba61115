"""A memory of facts that come and go: add, change, forget, list, find, ask.

What a call has changed is on the disk when it returns; one that is interrupted or fails has changed nothing.
"""

import contextlib
import copy
import dataclasses
import json
import operator
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, from_config_dict, identity
from lamini_jax.data import facts as facts_lib
from lamini_jax.data.facts import Fact, fact_id
from lamini_jax.errors import OTHER_RUN, UserError
from lamini_jax.memories import Answer, Memory
from lamini_jax.memory import experts, scope
from lamini_jax.memory.fact_table import FactTable
from lamini_jax.memory.routers import facts as fact_router
from lamini_jax.memory.routers.facts import NONE
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.memory.store import NAME, FactStore, StoredFact
from lamini_jax.runtime import paths, processes, workdir

Facts = facts_lib.Facts
_RECALL = "recall.jsonl"


@dataclasses.dataclass(frozen=True)
class Found:
    """The fact that a question asks for, if it does, and the two nearest ones with their scores."""

    fact: str | None
    best: str | None
    score: float
    runner_up: str | None
    runner_up_score: float


@dataclasses.dataclass(frozen=True)
class ListedFact(StoredFact):
    """A fact as lists show it."""

    shared: int = 0  # other facts with which it has an expert in common


@dataclasses.dataclass(frozen=True)
class Change:
    """What a change has done."""

    facts: int  # in the memory now
    holding: int  # of them: certified, and recalled in each of their wordings
    added: int = 0
    changed: int = 0
    same: int = 0
    forgotten: int = 0
    asked: int = 0  # facts that were tuned or asked again,
    recalled: int = 0  # and of them those that were answered exactly
    epochs: int = 0
    seconds: float = 0.0
    conflicts: tuple[tuple[str, str], ...] = ()  # ids of facts with other answers that the scope cannot tell apart


def listed(facts: FactStore, search: str = "") -> list[ListedFact]:
    """The facts in a store in the order in which they were added; with `search`, those with this text in any field."""
    every = facts.facts()
    loads = Counter(expert for fact in every for expert in fact.experts)
    found = facts.facts(search) if search else every
    return [ListedFact(**vars(fact), shared=sum(loads[expert] - 1 for expert in fact.experts)) for fact in found]


class FactMemory(Memory):
    """A memory of facts with its backbone. `threshold` is the score from which on a question asks for a fact."""

    def __init__(self, config: Config, model: FrozenModel, directory: Path, create: bool = False):
        """The memory in a directory, made there if there is none. Raises UserError for one of another backbone.

        With `create` it is tuned with this config from now on; otherwise as it was tuned last.
        """
        self.directory = directory
        frozen = scope.load(model.fingerprint)
        about = {"backbone": model.fingerprint, "scope": frozen.identity, "config": _as_text(config)}
        if create:
            with workdir.alone(directory):  # so that whoever comes second hears of it before anything else is done
                if processes.is_primary():
                    FactStore(directory, about).close()
        processes.barrier("store")
        self._store = FactStore(directory)
        self._check_origin(config, about)
        super().__init__(config if create else _as_tuned_last(config, self._store.about), model)
        self.threshold = frozen.judge.threshold(self.config.router.false_fires)
        self.table = self._stored(frozen)

    @property
    def adapter_fn(self) -> AdapterFn:
        return answering.BARE if self._off else self.table.adapter_fn(self.threshold)

    def with_threshold(self, threshold: float) -> "FactMemory":
        """The same memory, in which questions ask for a fact from this score on."""
        other = copy.copy(self)
        other.threshold = threshold
        return other

    def refresh(self) -> None:
        """Reads the memory again, which another process has changed."""
        self.table = self._stored(self.table.router.scope)

    def facts(self, search: str = "") -> list[ListedFact]:
        """The facts in the order in which they were added; with `search`, those with this text in any field."""
        return listed(self._store, search)

    def find(self, questions: Sequence[str]) -> list[Found]:
        """Which fact each question asks for. Answers nothing."""
        return [self._described(found) for found in _each(self.table.find(list(questions), self.threshold))]

    def add(self, facts: Facts, replace: bool = False, verify: bool = False) -> Change:
        """Adds new facts, changes those that are stored with another answer, and keeps what is the same.

        `replace` forgets all others; `verify` asks everything again, and tunes what does not hold. Raises UserError for
        bad facts.
        """
        return self.carry_out(self.plan(facts, replace, verify))

    def plan(self, facts: Facts, replace: bool = False, verify: bool = False):
        """What `add` with the same arguments would do: an `edits.Plan`."""
        from lamini_jax import edits  # here, so that answering imports no training

        return edits.plan(self.table, self._read(facts, replace), replace, self.failing() if verify else ())

    def carry_out(self, plan) -> Change:
        """Tunes and stores what a plan says."""
        from lamini_jax import edits

        started, counts = time.monotonic(), {"added": len(plan.new), "changed": len(plan.changed)}
        counts |= {"same": len(plan.same), "forgotten": len(plan.gone)}
        with self._alone():
            edit = edits.tuning(self.table, plan, self.directory, self.threshold)
            if processes.is_primary():
                self._store.remember("config", _as_text(self.config))
            self._write(edit)
            edits.finished(self.directory)
            asked = [_asked(fact, said) for (fact, _), said in zip(edit.put, edit.generated, strict=True)]
            did = {"asked": len(asked), "recalled": sum(each["exact"] for each in asked), "epochs": edit.epochs}
            did |= {"conflicts": edit.conflicts, "seconds": round(time.monotonic() - started, 3)}
            change = self._change(**counts, **did)
            workdir.write_json_lines(self.directory / _RECALL, asked)
            workdir.write_json(self.directory / "results.json", dataclasses.asdict(change))
        return change

    def fact(self, fact: str) -> StoredFact:
        """The fact with this id. Raises UserError if none is stored."""
        self._check_stored(fact, f"the id {fact}")
        return self.table.fact(fact)

    def change(self, facts: Facts) -> Change:
        """Gives stored facts other answers or wordings. Raises UserError for a question that is not stored."""
        facts = self._read(facts)
        for fact in facts:
            self._check_stored(fact.id, f"the question {fact.question!r}")
        return self.add(facts)

    def forget(self, ids: Sequence[str] = (), questions: Sequence[str] = ()) -> Change:
        """Forgets facts: nothing of them is left. Raises UserError, and forgets none, if one of them is not stored."""
        from lamini_jax import edits

        asked = [(i, f"the id {i}") for i in ids] + [(fact_id(text), f"the question {text!r}") for text in questions]
        for each in asked:
            self._check_stored(*each)
        gone = list(dict.fromkeys(fact_id for fact_id, _ in asked))
        started = time.monotonic()
        with self._alone():
            self.erase_traces(gone)
            self._write(edits.forgetting(self.table, gone))
        return self._change(forgotten=len(gone), seconds=round(time.monotonic() - started, 3))

    def erase_traces(self, ids: Sequence[str]) -> None:
        """Removes what files beside the store have of facts: what was asked last, and tuning that did not end."""
        from lamini_jax import edits

        edits.finished(self.directory)
        said = self.directory / _RECALL
        if said.is_file():
            lines = said.read_bytes().decode(errors="replace").splitlines(keepends=True)
            workdir.write_text(said, "".join(line for line in lines if not any(gone in line for gone in ids)))

    def failing(self) -> list[str]:
        """The ids of facts that are not answered exactly in each of their wordings, all of which are asked."""
        facts = [fact for fact in self.table.contents.facts for _ in fact.wordings]
        texts = [text for fact in self.table.contents.facts for text in fact.wordings]
        answers = self.table.ask(texts, self.table.find(texts, self.threshold)) if texts else []
        return sorted({fact.id for fact, answer in zip(facts, answers, strict=True) if answer.text != fact.answer})

    def state(self) -> dict[str, np.ndarray]:
        """Everything that is stored, but for dates, as arrays: equal ones are equal memories, bit for bit."""
        contents = self.table.contents
        facts = [(f.id, *f.wordings, f.answer, str(f.certified), *map(str, f.experts)) for f in contents.facts]
        keys = np.concatenate(contents.keys) if contents.keys else np.zeros((0, 0), np.float16)
        ids = np.array(sorted(contents.rows), np.int64)
        rows = np.frombuffer(b"".join(contents.rows[expert] for expert in ids), np.uint8)
        return {
            "facts": np.array([json.dumps(fact) for fact in facts], str),
            "keys": keys,
            "experts": ids,
            "rows": rows,
        }

    def save(self, directory: str | os.PathLike) -> None:
        """Writes a copy of the memory into a directory, which `load` reads too."""
        directory = paths.as_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._store.copy(directory)
        workdir.write_text(directory / "config.json", (self.directory / "config.json").read_text())

    def ask_about(
        self, questions: Sequence[str], facts: Sequence[str | None], max_new_tokens: int | None = None
    ) -> list[Answer]:
        """The answers if each question asked for the fact of this id (None: for none), whatever the scope says.

        Raises UserError for a fact that is not stored, or does not hold.
        """
        for fact in {*facts} - {None}:
            if not self.fact(fact).certified:
                raise UserError(f"the fact with the id {fact} does not hold, and has no answer yet; tune it further")
        numbers = np.array([NONE if fact is None else self.table.router.places[fact] for fact in facts])
        return self._answers(list(questions), self.table.router.handing(numbers), max_new_tokens, None, "answer")

    def _ask(self, questions, max_new_tokens, sampling, outside):
        if self._off:
            given = answering.ask_in_order(self.model, answering.BARE, questions, max_new_tokens, sampling)
            return [Answer(answer.text, answer.probability, [], 0) for answer in given]
        found = self.table.find(questions, self.threshold)
        return self._answers(questions, found, max_new_tokens, sampling, outside)

    def _answers(self, questions, found, max_new_tokens, sampling, outside) -> list[Answer]:
        asked = [i for i in range(len(questions)) if outside == "answer" or found.fact_B[i] != NONE]
        chosen = jax.tree.map(lambda x_B: x_B[asked], found)
        given = self.table.ask([questions[i] for i in asked], chosen, max_new_tokens, sampling)
        by_number = dict(zip(asked, given, strict=True))
        return [self._answer(by_number.get(number), each) for number, each in enumerate(_each(found))]

    def _stream(self, question, sampling, outside):
        if self._off:
            for answer in answering.stream(self.model, answering.BARE, question, sampling):
                yield Answer(answer.text, answer.probability, [], 0)
            return
        found = self.table.find([question], self.threshold)
        (each,) = _each(found)
        if each.fact_B == NONE and outside == "refuse":
            yield self._answer(None, each)
            return
        (text,), adapter_fn = self.table.prepared([question], found)
        for answer in answering.stream(self.model, adapter_fn, text, sampling):
            yield self._answer(answer, each)

    def _answer(self, answer: answering.Answer | None, found: fact_router.Found) -> Answer:
        told = self._described(found)
        ids = [int(expert) for expert in found.expert_ids_BK if expert != EMPTY_SLOT]
        said = (None, 0.0) if answer is None else (answer.text, answer.probability)
        scores = told.fact, told.score, told.runner_up, told.runner_up_score
        # Facts that answer were certified and recalled in each of their wordings, one of which is answered.
        certified = told.fact is not None
        return Answer(*said, ids, len(ids), *scores, certified)

    def _described(self, found: fact_router.Found) -> Found:
        ids = [
            None if number == NONE else self.table.contents.facts[number].id
            for number in (found.fact_B, found.best_B, found.runner_up_B)
        ]
        scores = float(found.score_B), float(found.runner_up_score_B)
        return Found(ids[0], ids[1], scores[0], ids[2], scores[1])

    def _stored(self, frozen: scope.Scope) -> FactTable:
        """What is in the store."""
        shape, memory = experts.expert_shape(self.config.backbone, self.config.memory), self.config.memory
        sizes = frozen.width * np.dtype(np.float16).itemsize, shape.floats * jnp.dtype(memory.dtype).itemsize
        return FactTable.of(self.config, self.model, frozen, self._store.read(*sizes))

    def _read(self, facts: Facts, may_be_empty: bool = False) -> list[Fact]:
        return facts_lib.read(facts, self.model.tokenizer, self.model.max_seq_len, may_be_empty)

    def _check_origin(self, config: Config, about: Mapping[str, str]) -> None:
        """Raises UserError if what the memory was made with is not `about`, or of other settings than the config."""
        found = self._store.about
        for name, what in (("backbone", "another backbone"), ("scope", "another judge of questions")):
            if (made := found.get(name)) != about[name]:
                raise UserError(f"{self.directory}: this memory was made with {what} ({made}); tune again", OTHER_RUN)
        if identity(_as_tuned_last(config, found)) != identity(config):
            said = f"{NAME} was made with other settings than those of config.json"
            raise UserError(f"{self.directory}: {said}; put back the files that belong together", OTHER_RUN)

    def _check_stored(self, fact: str, what: str) -> None:
        if fact not in self.table.router.places:
            raise UserError(
                f"{what} is not in the memory in {self.directory}; python -m lamini_jax.facts lists what is"
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside this context nobody else changes the memory, and nobody has since it was read."""
        with workdir.alone(self.directory):
            self._store.check_version(self.table.contents.version)
            yield

    def _write(self, edit) -> None:
        if not any(edit.writing.values()):
            return
        if processes.is_primary():
            self._store.write(**edit.writing)
        processes.barrier("written")
        self.table = edit.after

    def _change(self, **counts: Any) -> Change:
        return Change(len(self.table.contents.facts), self.table.router.holding, **counts)


def _as_tuned_last(config: Config, about: Mapping[str, str]) -> Config:
    """The config of a memory with the settings of its last tuning, of which config.json has only what never changes."""
    try:
        last = from_config_dict(json.loads(about["config"]))
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{NAME} does not hold its settings ({error}); put back a copy of it, or tune again") from None
    return dataclasses.replace(last, backbone=config.backbone, execution=config.execution)


def _as_text(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config))


def _asked(fact: StoredFact, generated: str) -> dict[str, Any]:
    """A line of recall.jsonl."""
    exact = generated == fact.answer
    values = {"question": fact.question, "answer": fact.answer, "generated": generated, "exact": exact}
    return {"id": fact.id, **values, "certified": fact.certified}


def _each(found: fact_router.Found) -> list[fact_router.Found]:
    """What each of several questions selected."""
    return [jax.tree.map(operator.itemgetter(number), found) for number in range(len(found.fact_B))]
