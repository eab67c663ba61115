"""The facts of a run, prepared for training: on the devices, or on the host if the devices have no room.

F is the facts of a bucket (all of one length), B those of a batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel, QuestionAndAnswer
from lamini_jax.config import Config, TuningConfig
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

    inputs: Any  # what the trained part reads: hidden_FTD, QuestionAndAnswer, or tokens_FT where all is trained
    start_F: jax.Array
    length_F: jax.Array  # of the answer, the stop token included
    targets_FA: jax.Array
    selected: FactExperts | None = None
    most_tokens: int = flax.struct.field(pytree_node=False, default=0)  # of answers in one shard's part of a batch

    def take(self, index_B) -> "DeviceFacts":
        """The facts at `index_B`; an index of -1 becomes a fact without answer and without experts."""
        taken = sharded_tables.gather_rows(self, index_B, self.axes())
        if self.selected is None:
            return taken

        def only_facts(numbers_BK):
            return jnp.where(index_B[:, None] >= 0, numbers_BK, EMPTY_SLOT)

        ids_BK, gates_BK, slots_BK = taken.selected
        return taken.replace(selected=FactExperts(only_facts(ids_BK), gates_BK, only_facts(slots_BK)))

    def batch(self, index_B: np.ndarray) -> tuple["DeviceFacts", np.ndarray]:
        """Facts on the devices that include those at `index_B`, and their indices there: here all facts as they are."""
        return self, index_B

    def selecting(self, selected: FactExperts) -> "DeviceFacts":
        """The same facts with these experts."""
        return self.replace(selected=FactExperts(*(_put(table_FK) for table_FK in selected)))

    def axes(self) -> "DeviceFacts":
        """The names of the axes of each array."""
        names = jax.tree.map(lambda x: ("facts",) + (None,) * (x.ndim - 1), self)
        return names.replace(inputs=input_axes(self.inputs))


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
        buckets = []
        for bucket, facts in zip(self.buckets, self.examples, strict=True):
            own = (_padded(facts, np.asarray(table_FK)[facts.index_F]) for table_FK in selected)
            buckets.append(bucket.selecting(FactExperts(*own)))
        return self._replace(buckets=buckets)


def num_steps(examples: Sequence[TokenizedFacts], config: TuningConfig) -> int:
    """The number of steps in the whole budget of epochs, if each epoch trains all facts."""
    sizes = [len(facts.index_F) for facts in examples]
    return config.epochs * sum(-(-size // min(config.batch_size, size)) for size in sizes)


def of_tokens(examples: Sequence[TokenizedFacts], batch_size: int) -> TrainingData:
    """The facts as tokens, for methods that train the prefix too."""
    return TrainingData(list(examples), [_on_devices(facts, _put(facts.tokens_FT), batch_size) for facts in examples])


def of_activations(
    model: FrozenModel,
    examples: Sequence[TokenizedFacts],
    batch_size: int,
    on_answers: bool = False,
    budget: float = math.inf,
) -> TrainingData:
    """The facts with what the frozen layers compute of them, once.

    That is the prefix's output or, for a memory `on_answers` alone, a QuestionAndAnswer. It stays on the devices as
    long as it takes at most `budget` bytes of each; the other buckets stay on the host. Raises UserError if that would
    be needed with several hosts, none of which has all facts.
    """
    buckets = []
    for facts in examples:
        read = functools.partial(_read_fact, model, facts) if on_answers else functools.partial(_read_prefix, model)
        shapes = jax.eval_shape(read, *_tables(facts))
        budget -= _bytes_per_device(shapes)
        if budget >= 0:
            buckets.append(_on_devices(facts, _read(read, facts, shapes), batch_size))
            continue
        if jax.process_count() > 1:
            raise UserError("--config.execution.cache_gb: too little for the facts' activations on these devices")
        arrays = facts.start_F, facts.answer_length_F, facts.targets_FA
        most_tokens = _most_tokens(facts, batch_size)
        buckets.append(HostFacts(DeviceFacts(_read_to_host(read, facts, shapes), *arrays, most_tokens=most_tokens)))
    return TrainingData(list(examples), buckets)


def input_shapes(config: Config, num_facts: int, tokens: int, answer_tokens: int) -> Any:
    """The shapes of `of_activations`, for facts of `tokens` tokens, `answer_tokens` of them in the answer."""
    c = config.backbone
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    if config.memory.positions == "all":
        return shape((num_facts, tokens, c.embed_dim))
    context = num_facts, config.memory.num_layers, tokens - answer_tokens, c.num_kv_heads, c.head_dim
    kept = jax.ShapeDtypeStruct(context, c.dtype)
    return QuestionAndAnswer(shape((num_facts, answer_tokens, c.embed_dim)), kept, kept)


def input_axes(inputs: Any) -> Any:
    """The names of the axes of what the trained part reads: the columns of the prefix's output are divided too."""

    def names(x):
        last = "width" if x.ndim == 3 else None
        return sharding.divisible_axes(("facts", *(None,) * (x.ndim - 2), last)[: x.ndim], x.shape)

    return jax.tree.map(names, inputs)


def _read_prefix(model: FrozenModel, tokens_BT, start_B):
    return frozen_model.read_prefix(model, tokens_BT)


def _read_fact(model: FrozenModel, facts: TokenizedFacts, tokens_BT, start_B):
    question = -(-int(facts.start_F.max()) // facts.padding.tokens) * facts.padding.tokens
    return frozen_model.read_fact(model, tokens_BT, start_B, facts.answer_width, question)


def _bytes_per_device(shapes: Any) -> float:
    def size(x, names):
        return x.size * x.dtype.itemsize / np.prod([sharding.num_shards(name) for name in names if name])

    return sum(jax.tree.leaves(jax.tree.map(size, shapes, input_axes(shapes))))


def _most_tokens(facts: TokenizedFacts, batch_size: int) -> int:
    rows = sharding.round_up(min(batch_size, facts.rows), "batch") // sharding.num_shards("batch")
    return facts.most_tokens(rows)


def _on_devices(facts: TokenizedFacts, inputs, batch_size: int) -> DeviceFacts:
    tables = facts.start_F, facts.answer_length_F, facts.targets_FA
    arrays = [_put(_padded(facts, table_F)) for table_F in tables]
    return DeviceFacts(inputs, *arrays, most_tokens=_most_tokens(facts, batch_size))


def _put(table_F: np.ndarray):
    """Puts a table on the devices; empty facts fill up the last shards."""
    return sharding.put(sharding.pad_rows(table_F, "facts"), "facts", *(None,) * (table_F.ndim - 1))


def _padded(facts: TokenizedFacts, table_F: np.ndarray) -> np.ndarray:
    """The table with rows of zeros for the facts that fill up a bucket."""
    return np.pad(table_F, [(0, facts.rows - len(table_F)), *[(0, 0)] * (table_F.ndim - 1)])


def _tables(facts: TokenizedFacts) -> tuple[np.ndarray, np.ndarray]:
    """What is read of the facts; empty ones fill up the last shards."""
    return tuple(sharding.pad_rows(_padded(facts, table_F), "facts") for table_F in (facts.tokens_FT, facts.start_F))


def _read(read: Callable, facts: TokenizedFacts, shapes: Any):
    """What the frozen layers compute of the facts, for a chunk of every shard's facts at a time."""
    rows = sharding.round_up(facts.rows, "facts")
    names = input_axes(shapes)
    tokens_FT, start_F = _tables(facts)
    table = jax.tree.map(lambda x, names: sharding.zeros((rows, *x.shape[1:]), x.dtype, names), shapes, names)
    for start, index_B in sharded_tables.row_chunks(rows, "facts"):
        part = read(tokens_FT[index_B], start_F[index_B])
        table = sharded_tables.write_rows(table, part, np.int32(start), names)
    return table


def _read_to_host(read: Callable, facts: TokenizedFacts, shapes: Any):
    """The same, in the host's memory."""
    rows = sharding.round_up(facts.rows, "facts")
    tokens_FT, start_F = _tables(facts)
    table = jax.tree.map(lambda x: np.empty((rows, *x.shape[1:]), x.dtype), shapes)
    for _, index_B in sharded_tables.row_chunks(rows, "facts"):
        parts = read(tokens_FT[index_B], start_F[index_B])
        for whole, part in zip(*map(jax.tree.leaves, (table, parts)), strict=True):
            whole[index_B] = part
    return jax.tree.map(lambda x: x[: len(facts.index_F)], table)
