"""Memory tuning of the facts that are added to a memory: in an array of their experts alone.

What it takes depends on these facts, not on how many others the memory has or how many experts there are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact
from lamini_jax.memory import experts, slots, storage
from lamini_jax.memory.routers import FactSelection, Selection
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.runtime import sharded_tables, sharding
from lamini_jax.training.memory_method import MemoryMethod
from lamini_jax.training.run import Run


class Addition(NamedTuple):
    """A fact to tune: its wordings, all of which have to be answered so, and the experts that it has been given."""

    id: str
    wordings: Sequence[str]
    answer: str
    experts: Sequence[int]


class Added(NamedTuple):
    """The result: which facts hold with their experts handed over, and the rows of all these experts."""

    holds_F: np.ndarray
    rows: dict[int, bytes]
    epochs: int
    seconds: float


def tune(
    config: Config, model: FrozenModel, additions: Sequence[Addition], rows: Mapping[int, bytes], directory: Path
) -> Added:
    """Tunes facts until each of them is certified and recalled, or the budget of epochs ends.

    `rows` are those of experts that have been trained before. What takes longer than some seconds is saved in the
    directory as it goes, and continued from there.
    """
    ids_N = np.unique(np.concatenate([addition.experts for addition in additions])).astype(np.int32)
    owner_F = np.repeat(np.arange(len(additions)), [len(addition.wordings) for addition in additions])
    facts = [Fact(addition.id, wording, addition.answer) for addition in additions for wording in addition.wordings]
    most = max(len(addition.experts) for addition in additions)
    few = len(facts) <= config.tuning.batch_size
    size = 1 << (ids_N.size - 1).bit_length() if few else ids_N.size
    memory = dataclasses.replace(config.memory, num_experts=size, top_k=most)
    selection = _selection([additions[owner].experts for owner in owner_F], ids_N, most)
    padding = batches.FEW if few else batches.MANY
    method = _Additions.create(dataclasses.replace(config, memory=memory), model, facts, selection, padding=padding)
    method.expert_ids_N, method.rows = ids_N, rows
    run = Run(method, directory, f"tuning {len(additions)} facts", until_all_hold=True, patient=True)
    tuned = run.result()
    failed_F = np.zeros(len(additions), bool)
    np.logical_or.at(failed_F, owner_F, ~tuned.certified_F)
    return Added(~failed_F, method.trained_rows(run.state), tuned.progress.epoch, sum(tuned.progress.seconds))


@dataclasses.dataclass
class _Additions(MemoryMethod):
    """Memory tuning whose array has the experts `expert_ids_N` alone, and whose facts are handed their experts."""

    expert_ids_N: np.ndarray = None
    rows: Mapping[int, bytes] = dataclasses.field(default_factory=dict)

    def untrained(self) -> dict[str, jax.Array]:
        """The rows of the experts as they are in the memory, or as they are before any fact has them."""
        memory = self.config.memory
        missing = self.config.memory.num_experts - self.expert_ids_N.size
        padded_N = sharding.pad_rows(np.pad(self.expert_ids_N, (0, missing)), "experts")
        fresh = experts.fresh(np.uint32(self.config.seed), sharding.put(padded_N, "experts"), self.shape, memory.dtype)
        known_X = np.flatnonzero([int(expert) in self.rows for expert in self.expert_ids_N]).astype(np.int32)
        if not known_X.size:
            return fresh
        ids_S = slots.assign_slots(known_X, memory.num_experts)
        table = [self.rows[int(self.expert_ids_N[i])] if i != EMPTY_SLOT else b"" for i in ids_S]
        parts = storage.rows_from_bytes(table, self.shape, memory.dtype)
        parts = {name: sharding.put(part, *experts.AXES) for name, part in parts.items()}
        return slots.write(fresh, sharding.put(ids_S, *slots.AXES), parts)

    def trained_rows(self, state) -> dict[int, bytes]:
        """The rows of the experts with this state."""
        parts = jax.tree.map(sharded_tables.whole, state.experts_NR)
        table = storage.rows_to_bytes(jax.tree.map(lambda part: part[: self.expert_ids_N.size], parts))
        return dict(zip(self.expert_ids_N.tolist(), table, strict=True))

    def adapter(self, state) -> tuple[FrozenModel, AdapterFn]:
        """The model and adapters with which each of these facts, and no other question, gets its experts."""
        questions, selected = [fact.question for fact in self.facts], Selection(*self.selection[1:])

        def fetch(expert_ids_BK):
            return _gather(state.experts_NR, expert_ids_BK)

        build = storage.builder(fetch, self.config)
        return self.model, answering.handed(self.model, questions, selected, build)


def _selection(experts_F: Sequence[Sequence[int]], ids_N: np.ndarray, most: int) -> FactSelection:
    """The places in the array of each fact's experts, with equal gates; EMPTY_SLOT where a fact has fewer than most."""
    ids_FK = np.full((len(experts_F), most), EMPTY_SLOT, np.int32)
    gates_FK = np.zeros((len(experts_F), most), np.float32)
    for number, given in enumerate(experts_F):
        ids_FK[number, : len(given)] = np.searchsorted(ids_N, given)
        gates_FK[number, : len(given)] = len(given) ** -0.5
    return FactSelection(None, ids_FK, gates_FK)


_gather = jax.jit(experts.gather)
