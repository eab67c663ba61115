"""Memory tuning: a pure step for the memory and one for LoRA, and the loop that both share (section 7.1).

F is the facts of a bucket, B those of a batch, U the distinct experts of a batch, S those of all facts.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lamini_jax import backbone, bank, model, row_optimizer
from lamini_jax.config import CERTIFIED_LOSS, CERTIFIED_LOSS_BFLOAT16, Config, TuningConfig
from lamini_jax.data import batches
from lamini_jax.data.batches import Examples

# Epochs between two checks of the facts that tuning spares: they share experts with those that it still trains.
CHECK_EVERY = 5


@flax.struct.dataclass
class Bucket:
    """Facts of one length on the device. `inputs` is what the trained part reads: hidden_FTD, or tokens_FT for LoRA."""

    inputs: jax.Array
    targets_FT: jax.Array
    mask_FT: jax.Array
    slots_FK: jax.Array | None = None
    gates_FK: jax.Array | None = None

    def take(self, rows_B) -> "Bucket":
        """The facts at `rows_B`; a row of -1 becomes a fact without answer and without experts."""
        taken = jax.tree.map(lambda x: x[jnp.maximum(rows_B, 0)], self)
        valid_B1 = (rows_B >= 0)[:, None]
        slots_BK = None if self.slots_FK is None else jnp.where(valid_B1, taken.slots_FK, jnp.iinfo(jnp.int32).max)
        return taken.replace(mask_FT=taken.mask_FT & valid_B1, slots_FK=slots_BK)


class Losses(NamedTuple):
    """Of each fact, in nats: the sum over its answer's tokens, the worst of them, and whether all are likeliest."""

    total_B: jax.Array
    worst_B: jax.Array
    likeliest_B: jax.Array


class Method(NamedTuple):
    """A way to train: `step(params, state, bucket, rows_B) -> state, Losses`; `losses(...) -> Losses` takes no step."""

    step: Callable
    losses: Callable


@flax.struct.dataclass
class MemoryState:
    """What memory tuning changes."""

    rows_NR: jax.Array
    slots: row_optimizer.Slots


@flax.struct.dataclass
class LoraState:
    """What the baseline changes."""

    adapters: Any
    optimizer: optax.OptState


def certified_loss(dtype: str) -> float:
    """Below it in every token, greedy decoding returns the answer (the margin of bfloat16 is wider)."""
    return CERTIFIED_LOSS if dtype == "float32" else CERTIFIED_LOSS_BFLOAT16


def memory_method(decoder: backbone.Decoder, shape: bank.RowShape, target: str, tx) -> Method:
    """Trains the selected rows alone. They are gathered before differentiation, so that no gradient has size N."""

    def forward(params, rows_UR, inverse_BK, batch: Bucket):
        adapter = bank.adapter(rows_UR[inverse_BK], batch.gates_FK, shape, target)
        return _reduce(*model.token_losses(decoder, params, batch.inputs, batch.targets_FT, adapter), batch)

    def gather(state: MemoryState, batch: Bucket):
        num_slots, num_experts = state.slots.expert_ids_S.shape[0], state.rows_NR.shape[0]
        slots_BK = jnp.minimum(batch.slots_FK, num_slots)
        slots_U, inverse = jnp.unique(slots_BK, return_inverse=True, size=slots_BK.size, fill_value=num_slots)
        ids_U = state.slots.expert_ids_S.at[slots_U].get(mode="fill", fill_value=num_experts)
        return slots_U, ids_U, inverse.reshape(slots_BK.shape), bank.gather(state.rows_NR, ids_U)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state: MemoryState, bucket: Bucket, rows_B):
        batch = bucket.take(rows_B)
        slots_U, ids_U, inverse_BK, rows_UR = gather(state, batch)

        def objective(rows_UR):
            losses, mean_B = forward(params, rows_UR, inverse_BK, batch)
            return jnp.sum(mean_B), losses

        gradients_UR, losses = jax.grad(objective, has_aux=True)(rows_UR)
        with jax.named_scope("row_optimizer"):
            rows_UR, slots = row_optimizer.update(tx, state.slots, slots_U, rows_UR, gradients_UR, shape)
            rows_NR = bank.scatter(state.rows_NR, ids_U, rows_UR)
        return MemoryState(rows_NR, slots), losses

    @jax.jit
    def losses(params, state: MemoryState, bucket: Bucket, rows_B):
        batch = bucket.take(rows_B)
        _, _, inverse_BK, rows_UR = gather(state, batch)
        return forward(params, rows_UR, inverse_BK, batch)[0]

    return Method(step, losses)


def lora_method(decoder: backbone.Decoder, tx) -> Method:
    """Trains one LoRA on every linear layer; nothing can be cached, since the prefix has adapters too."""

    def forward(params, adapters, batch: Bucket):
        hidden_BTD, _ = backbone.prefix(decoder, params, batch.inputs, adapter=adapters["prefix"])
        return _reduce(*model.token_losses(decoder, params, hidden_BTD, batch.targets_FT, adapters["suffix"]), batch)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state: LoraState, bucket: Bucket, rows_B):
        batch = bucket.take(rows_B)

        def objective(adapters):
            losses, mean_B = forward(params, adapters, batch)
            return jnp.sum(mean_B) / mean_B.size, losses

        gradients, losses = jax.grad(objective, has_aux=True)(state.adapters)
        updates, optimizer = tx.update(gradients, state.optimizer, state.adapters)
        return LoraState(optax.apply_updates(state.adapters, updates), optimizer), losses

    @jax.jit
    def losses(params, state: LoraState, bucket: Bucket, rows_B):
        return forward(params, state.adapters, bucket.take(rows_B))[0]

    return Method(step, losses)


def _reduce(losses_BT, likeliest_BT, batch: Bucket) -> tuple[Losses, jax.Array]:
    """The losses of each fact, and the mean over its answer's tokens, which is what training lowers."""
    losses_BT = jnp.where(batch.mask_FT, losses_BT, 0.0)
    total_B = losses_BT.sum(axis=1)
    losses = Losses(total_B, losses_BT.max(axis=1), (likeliest_BT | ~batch.mask_FT).all(axis=1))
    return losses, total_B / jnp.maximum(batch.mask_FT.sum(axis=1), 1)


def memory_buckets(base: model.Base, examples: Sequence[Examples], slots_FK: np.ndarray) -> list[Bucket]:
    """The facts with their prefix activations, computed once, and their experts' slots."""
    gate = slots_FK.shape[1] ** -0.5
    buckets = []
    for facts in examples:
        hidden = [
            model.read(base.decoder, base.params, facts.tokens_FT[rows_B])
            for rows_B in batches.in_order(len(facts.index_F), min(64, len(facts.index_F)))
        ]
        hidden_FTD = jnp.concatenate(hidden)[: len(facts.index_F)]
        slots = jnp.asarray(slots_FK[facts.index_F])
        bucket = Bucket(hidden_FTD, facts.targets_FT, facts.loss_mask_FT, slots, jnp.full(slots.shape, gate))
        buckets.append(jax.device_put(bucket))
    return buckets


def lora_buckets(examples: Sequence[Examples]) -> list[Bucket]:
    """The facts as tokens."""
    return [jax.device_put(Bucket(facts.tokens_FT, facts.targets_FT, facts.loss_mask_FT)) for facts in examples]


@dataclasses.dataclass
class Log:
    """Where tuning stands: what a continued run must know beside the trained state. Losses are per fact, last known."""

    total_F: np.ndarray
    worst_F: np.ndarray
    likeliest_F: np.ndarray
    loss: list[float] = dataclasses.field(default_factory=list)  # per epoch, nats per answer token
    certified: list[int] = dataclasses.field(default_factory=list)  # per epoch, facts
    seconds: list[float] = dataclasses.field(default_factory=list)  # per epoch
    full_recall: int | None = None  # the first epoch after which every fact was recalled

    @property
    def epoch(self) -> int:
        return len(self.loss)


def new_log(num_facts: int) -> Log:
    """The log of a run that has not begun."""
    unknown_F = np.full(num_facts, np.inf, np.float32)
    return Log(unknown_F, unknown_F.copy(), np.zeros(num_facts, bool))


class Facts(NamedTuple):
    """The facts of a run: on the host, on the device, and the tokens of all answers."""

    examples: list[Examples]
    buckets: list[Bucket]

    @property
    def tokens(self) -> int:
        return int(sum(facts.loss_mask_FT.sum() for facts in self.examples))


def check(method: Method, params, state, facts: Facts, log: Log, batch_size: int) -> None:
    """Measures every fact's losses as they are now and writes them into the log."""
    pending = []
    for number, bucket in enumerate(facts.buckets):
        count = len(facts.examples[number].index_F)
        for rows_B in batches.in_order(count, min(batch_size, count)):
            pending.append((number, rows_B, method.losses(params, state, bucket, rows_B)))
    _record(log, facts, pending)


def train_epoch(method: Method, params, state, facts: Facts, log: Log, config: TuningConfig, seed: int, active=None):
    """One epoch over the active facts (all unless given); the log gets each fact's losses from before its step."""
    pending = []
    for number, rows_B in batches.epoch_batches(facts.examples, config.batch_size, seed, log.epoch, active):
        state, losses = method.step(params, state, facts.buckets[number], rows_B)
        pending.append((number, rows_B, losses))
    _record(log, facts, pending)
    return state


def _record(log: Log, facts: Facts, pending) -> None:
    for number, rows_B, losses in pending:
        valid = rows_B >= 0
        index = facts.examples[number].index_F[rows_B[valid]]
        log.total_F[index] = np.asarray(losses.total_B)[valid]
        log.worst_F[index] = np.asarray(losses.worst_B)[valid]
        log.likeliest_F[index] = np.asarray(losses.likeliest_B)[valid]


def tune(
    method: Method,
    params,
    state,
    facts: Facts,
    log: Log,
    config: Config,
    *,
    recalled: Callable[[Any], np.ndarray],
    until_all_hold: bool,
    after_epoch: Callable[[Any, Log], None] = lambda state, log: None,
):
    """Trains from where `log` stands until the budget of epochs is spent; returns the state.

    `recalled` tells from a state which facts are recalled, by decoding. With `until_all_hold`, certified facts are
    spared, all are checked every few epochs, and tuning ends as soon as every fact is certified and recalled.
    """
    threshold = certified_loss(config.backbone.dtype)
    batch_size = config.tuning.batch_size
    while log.epoch < config.tuning.epochs:
        started = time.perf_counter()
        active_F = None
        if until_all_hold:
            if log.epoch % CHECK_EVERY == 0 or (log.worst_F < threshold).all():
                check(method, params, state, facts, log, batch_size)
            if (log.worst_F < threshold).all():
                recalled_F = recalled(state)
                if recalled_F.all():
                    break
                log.worst_F[~recalled_F] = np.inf
            active_F = log.worst_F >= threshold
        state = train_epoch(method, params, state, facts, log, config.tuning, config.seed, active_F)
        log.seconds.append(time.perf_counter() - started)
        log.certified.append(int((log.worst_F < threshold).sum()))
        log.loss.append(float(log.total_F.sum(dtype=np.float64) / facts.tokens))
        if not until_all_hold and log.full_recall is None and log.likeliest_F.all() and recalled(state).all():
            log.full_recall = log.epoch
        after_epoch(state, log)
    check(method, params, state, facts, log, batch_size)
    return state
