"""The facts of a run, prepared for training: on the devices, or on the host if the devices have no room.

F is the facts of a bucket (all of one length), B those of a batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import TuningConfig
from lamini_jax.data.batches import TokenizedFacts
from lamini_jax.errors import UserError
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.runtime import sharded_tables, sharding


class FactExperts(NamedTuple):
    """The experts of each fact, their weights, and their slots."""

    expert_ids_FK: jax.Array
    gates_FK: jax.Array
    slots_FK: jax.Array


@flax.struct.dataclass
class DeviceFacts:
    """Facts of one length on the devices: the input of the trained part, and the tokens that it should predict."""

    inputs: jax.Array  # hidden_FTD of the prefix, or tokens_FT where the prefix is trained too
    start_F: jax.Array
    length_F: jax.Array  # of the answer, the stop token included
    targets_FA: jax.Array
    selected: FactExperts | None = None

    def take(self, index_B) -> "DeviceFacts":
        """The facts at `index_B`; an index of -1 becomes a fact without answer and without experts."""
        taken = sharded_tables.gather_rows(self, index_B, self.axes())
        if self.selected is None:
            return taken
        slots_BK = jnp.where(index_B[:, None] >= 0, taken.selected.slots_FK, EMPTY_SLOT)
        return taken.replace(selected=taken.selected._replace(slots_FK=slots_BK))

    def batch(self, index_B: np.ndarray) -> tuple["DeviceFacts", np.ndarray]:
        """Facts on the devices that include those at `index_B`, and their indices there: here all facts as they are."""
        return self, index_B

    def selecting(self, selected: FactExperts) -> "DeviceFacts":
        """The same facts with these experts."""
        return self.replace(selected=FactExperts(*(_put(table_FK) for table_FK in selected)))

    def axes(self) -> "DeviceFacts":
        """The names of the axes of each array."""
        names = jax.tree.map(lambda x: ("facts",) + (None,) * (x.ndim - 1), self)
        inputs = sharding.divisible_axes(("facts", None, "width")[: self.inputs.ndim], self.inputs.shape)
        return names.replace(inputs=inputs)


class HostFacts(NamedTuple):
    """Facts of one length in the host's memory; each batch goes to the devices when a step needs it."""

    arrays: DeviceFacts

    def batch(self, index_B: np.ndarray) -> tuple[DeviceFacts, np.ndarray]:
        """Facts on the devices that include those at `index_B`, and their indices there: here only those, in order."""
        batch = jax.tree.map(lambda x_F: x_F[index_B], self.arrays)
        batch = jax.tree.map(lambda x_B, names: sharding.put(x_B, *names), batch, batch.axes())
        return batch, np.where(index_B >= 0, np.arange(index_B.size, dtype=np.int32), -1)

    def selecting(self, selected: FactExperts) -> "HostFacts":
        """The same facts with these experts."""
        return HostFacts(self.arrays.replace(selected=selected))


class TrainingData(NamedTuple):
    """The facts of a run, bucket by bucket: tokenized on the host, and ready for steps."""

    examples: list[TokenizedFacts]
    buckets: list[DeviceFacts | HostFacts]

    @property
    def answer_tokens(self) -> int:
        """The number of answer tokens of all facts together."""
        return int(sum(facts.answer_length_F.sum() for facts in self.examples))

    def selecting(self, selected: FactExperts) -> "TrainingData":
        """The same facts with these experts, which are given in the order of the run's facts."""
        buckets = [
            bucket.selecting(FactExperts(*(np.asarray(table_FK)[facts.index_F] for table_FK in selected)))
            for bucket, facts in zip(self.buckets, self.examples, strict=True)
        ]
        return self._replace(buckets=buckets)


def num_steps(examples: Sequence[TokenizedFacts], config: TuningConfig) -> int:
    """The number of steps in the whole budget of epochs, if each epoch trains all facts."""
    sizes = [len(facts.index_F) for facts in examples]
    return config.epochs * sum(-(-size // min(config.batch_size, size)) for size in sizes)


def of_tokens(examples: Sequence[TokenizedFacts]) -> TrainingData:
    """The facts as tokens, for methods that train the prefix too."""
    return TrainingData(list(examples), [_on_devices(facts, _put(facts.tokens_FT)) for facts in examples])


def of_activations(model: FrozenModel, examples: Sequence[TokenizedFacts], budget: float = math.inf) -> TrainingData:
    """The facts with their prefix activations, computed once.

    Activations stay on the devices as long as they take at most `budget` bytes of each; the other buckets stay on the
    host. Raises UserError if that would be needed with several hosts, none of which has all activations.
    """
    buckets, shards = [], sharding.num_shards("facts") * sharding.num_shards("width")
    for facts in examples:
        budget -= 4 * facts.tokens_FT.size * model.decoder.config.embed_dim / shards
        if budget >= 0:
            buckets.append(_on_devices(facts, _read(model, facts.tokens_FT)))
            continue
        if jax.process_count() > 1:
            raise UserError("--config.execution.cache_gb: too little for the facts' activations on these devices")
        arrays = facts.start_F, facts.answer_length_F, facts.targets_FA
        buckets.append(HostFacts(DeviceFacts(_read_to_host(model, facts.tokens_FT), *arrays)))
    return TrainingData(list(examples), buckets)


def _on_devices(facts: TokenizedFacts, inputs) -> DeviceFacts:
    return DeviceFacts(inputs, *map(_put, (facts.start_F, facts.answer_length_F, facts.targets_FA)))


def _put(table_F: np.ndarray):
    """Puts a table on the devices; empty facts fill up the last shards."""
    return sharding.put(sharding.pad_rows(table_F, "facts"), "facts", *(None,) * (table_F.ndim - 1))


def _read(model: FrozenModel, tokens_FT: np.ndarray):
    """hidden_FTD, computed for a chunk of every shard's facts at a time."""
    tokens_FT = sharding.pad_rows(tokens_FT, "facts")
    shape = (*tokens_FT.shape, model.decoder.config.embed_dim)
    names = sharding.divisible_axes(("facts", None, "width"), shape)
    hidden_FTD = sharding.zeros(shape, np.float32, names)
    for start, index_B in sharded_tables.row_chunks(len(tokens_FT), "facts"):
        hidden_BTD = frozen_model.read_prefix(model, tokens_FT[index_B])
        hidden_FTD = sharded_tables.write_rows(hidden_FTD, hidden_BTD, np.int32(start), names)
    return hidden_FTD


def _read_to_host(model: FrozenModel, tokens_FT: np.ndarray) -> np.ndarray:
    """The same, in the host's memory."""
    tokens_FT, count = sharding.pad_rows(tokens_FT, "facts"), len(tokens_FT)
    hidden_FTD = np.empty((*tokens_FT.shape, model.decoder.config.embed_dim), np.float32)
    for _, index_B in sharded_tables.row_chunks(len(tokens_FT), "facts"):
        hidden_FTD[index_B] = frozen_model.read_prefix(model, tokens_FT[index_B])
    return hidden_FTD[:count]
