"""Memory tuning: the experts that facts have selected are trained, and nothing else (section 7.1)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact
from lamini_jax.memory import experts, routers, slots, storage
from lamini_jax.memory.experts import ExpertShape
from lamini_jax.memory.routers import FactSelection
from lamini_jax.memory.slots import Most
from lamini_jax.runtime import checkpointing, sharding
from lamini_jax.training import data, optimizers, row_optimizer
from lamini_jax.training.data import DeviceFacts, FactExperts, TrainingData
from lamini_jax.training.method import fact_losses


@flax.struct.dataclass
class MemoryState:
    """What memory tuning changes."""

    experts_NR: dict[str, jax.Array]
    slots: row_optimizer.Slots


@dataclasses.dataclass
class MemoryMethod:
    """A `TrainMethod` whose state is the array of experts with the optimizer's state of the selected ones."""

    config: Config
    model: FrozenModel
    facts: Sequence[Fact]
    data: TrainingData
    selection: FactSelection
    shape: ExpertShape
    expert_ids_S: np.ndarray
    tx: Any
    step: Callable
    losses: Callable

    @classmethod
    def create(
        cls,
        config: Config,
        model: FrozenModel,
        facts: Sequence[Fact],
        selection: FactSelection,
        later: Sequence[FactSelection] = (),
        padding: batches.Padding = batches.MANY,
    ) -> "MemoryMethod":
        """Facts ready for steps with the experts that they selected.

        `later` are the selections that `select` may be called with.
        """
        shape = experts.expert_shape(config.backbone, config.memory)
        examples = batches.encode(facts, model.tokenizer, padding)
        every_XK = np.concatenate([each.expert_ids_FK for each in (selection, *later)])
        expert_ids_S = slots.assign_slots(every_XK, config.memory.num_experts)
        slots_XK = slots.find_slots(expert_ids_S, every_XK)
        most = slots.most_of_any_batch(slots_XK, expert_ids_S.size, config.tuning.batch_size)
        if padding.few:
            most = slots.Most(*(1 << (number - 1).bit_length() for number in most))
        tx = optimizers.make(config.tuning.optimizer, data.num_steps(examples, config.tuning))
        step, losses = programs(shape, config.memory.target, tx, most)
        on_answers, budget = config.memory.positions == "answer", 1e9 * config.execution.cache_gb
        read = data.of_activations(model, examples, config.tuning.batch_size, on_answers, budget)
        method = cls(config, model, facts, read, selection, shape, expert_ids_S, tx, step, losses)
        method.select(selection)
        return method

    def select(self, selection: FactSelection) -> None:
        """Gives the facts these experts from now on."""
        ids_FK = selection.expert_ids_FK
        selected = FactExperts(ids_FK, selection.gates_FK, slots.find_slots(self.expert_ids_S, ids_FK))
        self.selection, self.data = selection, self.data.selecting(selected)

    def init(self) -> MemoryState:
        """The state before any step."""
        return MemoryState(self.untrained(), row_optimizer.init(self.tx, self.expert_ids_S, self.shape))

    def untrained(self) -> dict[str, jax.Array]:
        """experts_NR before any step."""
        memory = self.config.memory
        return experts.init(np.uint32(self.config.seed), self.shape, memory.num_experts, memory.dtype)

    def adapter(self, state: MemoryState) -> tuple[FrozenModel, AdapterFn]:
        """The model and adapters that answer questions with this state, until the next step donates it."""

        def fetch(expert_ids_BK):
            return _gather(state.experts_NR, expert_ids_BK)

        return self.model, storage.with_experts(self.model, self.selection.router, fetch, self.config)

    def save(self, state: MemoryState) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
        """What a checkpoint keeps: the selected experts and their optimizer's state, the selection and the router."""
        tables = {
            "experts": slots.read(state.experts_NR, state.slots.expert_ids_S),
            "optimizer": state.slots.state,
        }
        arrays, router = ({}, None) if self.selection.router is None else routers.save(self.selection.router)
        arrays |= {
            "expert_ids_S": self.expert_ids_S,
            "expert_ids_FK": self.selection.expert_ids_FK,
            "gates_FK": self.selection.gates_FK,
        }
        return tables, arrays, {"router": router, "backbone": self.model.fingerprint}

    def restore(self, saved: checkpointing.Saved) -> MemoryState:
        """The state that was saved, on the current mesh."""
        state, old_ids_S = self.init(), saved.arrays["expert_ids_S"]
        tables = {
            name: slots.permute_slots(leaves, old_ids_S, self.expert_ids_S, self.shape)
            for name, leaves in saved.tables.items()
        }
        optimizer = state.slots.replace(state=checkpointing.restore_like(state.slots.state, tables["optimizer"]))
        like = slots.read(state.experts_NR, optimizer.expert_ids_S)
        experts_SR = checkpointing.restore_like(like, tables["experts"])
        return MemoryState(slots.write(state.experts_NR, optimizer.expert_ids_S, experts_SR), optimizer)


@functools.lru_cache(maxsize=16)
def programs(shape: ExpertShape, target: str, tx, most: Most) -> tuple[Callable, Callable]:
    """`step` and `losses` of a `TrainMethod`.

    Experts are gathered before differentiation, so that no gradient has size N. `most` is `slots.most_of_any_batch` of
    the facts and the batch size.
    """

    def gather(state: MemoryState, facts: DeviceFacts, index_B):
        with jax.named_scope("gather"):
            batch = facts.take(index_B)
            return batch, experts.gather(state.experts_NR, batch.selected.expert_ids_FK, most.asked)

    def forward(model, rows_BKR, batch: DeviceFacts):
        adapter = experts.adapter(rows_BKR, batch.selected.gates_FK, target)
        return fact_losses(model, batch.inputs, batch, adapter)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(model: FrozenModel, state: MemoryState, facts: DeviceFacts, index_B):
        batch, rows_BKR = gather(state, facts, index_B)

        def objective(rows_BKR):
            losses, mean_B = forward(model, rows_BKR, batch)
            return jnp.sum(mean_B), losses

        gradients_BKR, losses = jax.grad(objective, has_aux=True)(rows_BKR)
        with jax.named_scope("optimizer"):
            slots_BK = batch.selected.slots_FK
            updated = row_optimizer.update(tx, state.experts_NR, state.slots, slots_BK, gradients_BKR, shape, most)
        return MemoryState(*updated), losses

    @jax.jit
    def losses(model: FrozenModel, state: MemoryState, facts: DeviceFacts, index_B):
        batch, rows_BKR = gather(state, facts, index_B)
        return forward(model, rows_BKR, batch)[0]

    return step, losses


def describe(config: Config, tokens: int, answer_tokens: int) -> tuple[Callable, MemoryState, DeviceFacts]:
    """The step, and its state and facts as shapes on the current mesh, to compile it without any arrays.

    Each fact has `tokens` tokens, `answer_tokens` of them in the answer; no two facts share an expert, if there are
    enough. What a batch needs of one shard is what it needs of experts that are drawn at random.
    """
    memory, shape = config.memory, experts.expert_shape(config.backbone, config.memory)
    num_facts = sharding.round_up(config.data.count, "facts")
    num_experts = sharding.round_up(memory.num_experts, "experts")
    num_slots = min(num_facts * memory.top_k, num_experts)
    batch = sharding.round_up(config.tuning.batch_size, "batch")
    drawn_FK = np.random.default_rng(0).integers(num_experts, size=(num_facts, memory.top_k))
    most = slots.most_of_any_batch(drawn_FK, num_experts, batch)
    tx = optimizers.make(config.tuning.optimizer, config.tuning.epochs * -(-num_facts // batch))

    def described(leaf, axes):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.sharding_of(axes, leaf.shape))

    def array(shape, dtype, *axes):
        return described(jax.ShapeDtypeStruct(shape, dtype), axes)

    experts_NR = {name: array(part, memory.dtype, *experts.AXES) for name, part in shape.parts(num_experts).items()}
    ids_S = array((num_slots,), np.int32, *slots.AXES)
    fresh = jax.eval_shape(lambda ids_S: row_optimizer.init(tx, ids_S, shape), ids_S)
    axes = slots.table_axes(fresh.state, shape)
    optimizer = row_optimizer.Slots(ids_S, jax.tree.map(described, fresh.state, axes))
    per_fact = array((num_facts,), np.int32, "facts")
    ids_FK, gates_FK = (array((num_facts, memory.top_k), dtype, "facts", None) for dtype in (np.int32, np.float32))
    inputs = data.input_shapes(config, num_facts, tokens, answer_tokens)
    inputs = jax.tree.map(described, inputs, data.input_axes(inputs))
    targets_FA = array((num_facts, answer_tokens), np.int32, "facts", None)
    chosen = FactExperts(ids_FK, gates_FK, ids_FK)
    most_tokens = batch // sharding.num_shards("batch") * answer_tokens
    facts = DeviceFacts(inputs, per_fact, per_fact, targets_FA, chosen, most_tokens)
    step, _ = programs(shape, memory.target, tx, most)
    return step, MemoryState(experts_NR, optimizer), facts


_gather = jax.jit(experts.gather)
