"""Memory tuning: a pure step for the memory and one for LoRA, and the loop that both share (section 7.1).

F is the facts of a bucket, B those of a batch, U the distinct experts of a batch, S those of all facts.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lamini_jax import backbone, bank, lora, model, row_optimizer, sharding
from lamini_jax.config import CERTIFIED_LOSS, CERTIFIED_LOSS_BFLOAT16, Config, TuningConfig
from lamini_jax.data import batches
from lamini_jax.data.batches import Examples
from lamini_jax.errors import UserError

# Epochs between two checks of the facts that tuning spares: they share experts with those that it still trains.
CHECK_EVERY = 5


@flax.struct.dataclass
class Bucket:
    """Facts of one length on the devices: what the trained part reads, and what it should say."""

    inputs: jax.Array  # hidden_FTD, or tokens_FT for LoRA
    start_F: jax.Array
    length_F: jax.Array  # of the answer, the stop token included
    targets_FA: jax.Array
    expert_ids_FK: jax.Array | None = None
    slots_FK: jax.Array | None = None

    def take(self, rows_B) -> "Bucket":
        """The facts at `rows_B`; a row of -1 becomes a fact without answer and without experts."""
        valid_B = rows_B >= 0
        taken = sharding.take(self, rows_B, self.axes())
        if self.slots_FK is None:
            return taken
        slots_BK = jnp.where(valid_B[:, None], taken.slots_FK, row_optimizer.NONE)
        return taken.replace(slots_FK=slots_BK)

    def batch(self, rows_B: np.ndarray) -> tuple["Bucket", np.ndarray]:
        """A bucket on the devices that holds the facts at `rows_B`, and where: itself."""
        return self, rows_B

    def selecting(self, expert_ids_FK: np.ndarray, slots_FK: np.ndarray) -> "Bucket":
        """The same facts with these experts."""
        put = [sharding.put(_padded(table_FK), "facts", None) for table_FK in (expert_ids_FK, slots_FK)]
        return self.replace(expert_ids_FK=put[0], slots_FK=put[1])

    def axes(self) -> "Bucket":
        """The names of the axes of each array."""
        names = jax.tree.map(lambda x: ("facts",) + (None,) * (x.ndim - 1), self)
        return names.replace(inputs=sharding.fit(("facts", None, "width")[: self.inputs.ndim], self.inputs.shape))


class HostBucket(NamedTuple):
    """Facts of one length in the host's memory; each batch goes to the devices when it is stepped on."""

    arrays: Bucket

    def batch(self, rows_B: np.ndarray) -> tuple[Bucket, np.ndarray]:
        """A bucket on the devices that holds the facts at `rows_B`, and where."""
        batch = jax.tree.map(lambda x_F: x_F[rows_B], self.arrays)
        batch = jax.tree.map(lambda x_B, names: sharding.put(x_B, *names), batch, batch.axes())
        return batch, np.where(rows_B >= 0, np.arange(rows_B.size, dtype=np.int32), -1)

    def selecting(self, expert_ids_FK: np.ndarray, slots_FK: np.ndarray) -> "HostBucket":
        """The same facts with these experts."""
        return HostBucket(self.arrays.replace(expert_ids_FK=expert_ids_FK, slots_FK=slots_FK))


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

    rows_NR: dict[str, jax.Array]
    slots: row_optimizer.Slots


@flax.struct.dataclass
class LoraState:
    """What the baseline changes."""

    adapters: Any
    optimizer: optax.OptState


def certified_loss(dtype: str) -> float:
    """Below it in every token, greedy decoding returns the answer (the margin of bfloat16 is wider)."""
    return CERTIFIED_LOSS if dtype == "float32" else CERTIFIED_LOSS_BFLOAT16


def memory_method(decoder: backbone.Decoder, shape: bank.RowShape, target: str, tx, touched: int) -> Method:
    """Trains the selected rows alone. They are gathered before differentiation, so that no gradient has size N.

    `touched` is `row_optimizer.most_touched` of the facts and the batch size.
    """

    def gather(state: MemoryState, bucket: Bucket, rows_B):
        batch = bucket.take(rows_B)
        return batch, bank.gather(state.rows_NR, batch.expert_ids_FK)

    def forward(params, rows_BKR, batch: Bucket):
        gates_BK = jnp.full(batch.expert_ids_FK.shape, batch.expert_ids_FK.shape[1] ** -0.5)
        adapter = bank.adapter(rows_BKR, gates_BK, target)
        return _reduce(*_token_losses(decoder, params, batch.inputs, batch, adapter), batch)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state: MemoryState, bucket: Bucket, rows_B):
        batch, rows_BKR = gather(state, bucket, rows_B)

        def objective(rows_BKR):
            losses, mean_B = forward(params, rows_BKR, batch)
            return jnp.sum(mean_B), losses

        gradients_BKR, losses = jax.grad(objective, has_aux=True)(rows_BKR)
        with jax.named_scope("row_optimizer"):
            updated = row_optimizer.update(
                tx, state.rows_NR, state.slots, batch.slots_FK, gradients_BKR, shape, touched
            )
        return MemoryState(*updated), losses

    @jax.jit
    def losses(params, state: MemoryState, bucket: Bucket, rows_B):
        batch, rows_BKR = gather(state, bucket, rows_B)
        return forward(params, rows_BKR, batch)[0]

    return Method(step, losses)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def lora_state(decoder: backbone.Decoder, rank: int, tx, seed) -> LoraState:
    """The baseline before any step."""
    adapters = lora.init(decoder, rank, jax.random.fold_in(jax.random.key(seed), 3))

    def divided(x):
        return sharding.constrain(x, *(None,) * (x.ndim - 1), "width") if x.ndim else x

    return jax.tree.map(divided, LoraState(adapters, tx.init(adapters)))


def lora_method(decoder: backbone.Decoder, tx) -> Method:
    """Trains one LoRA on every linear layer; nothing can be cached, since the prefix has adapters too."""

    def forward(params, adapters, batch: Bucket):
        hidden_BTD, _ = backbone.prefix(decoder, params, batch.inputs, adapter=adapters["prefix"])
        return _reduce(*_token_losses(decoder, params, hidden_BTD, batch, adapters["suffix"]), batch)

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


def _token_losses(decoder, params, hidden_BTD, batch: Bucket, suffix_adapter):
    return model.token_losses(decoder, params, hidden_BTD, batch.start_F, batch.targets_FA, suffix_adapter)


def _reduce(losses_BA, likeliest_BA, batch: Bucket) -> tuple[Losses, jax.Array]:
    """The losses of each fact, on every device, and the mean over its answer's tokens, which training lowers."""
    mask_BA = jnp.arange(losses_BA.shape[1])[None] < batch.length_F[:, None]
    losses_BA = jnp.where(mask_BA, losses_BA, 0.0)
    total_B = losses_BA.sum(axis=1)
    losses = Losses(total_B, losses_BA.max(axis=1), (likeliest_BA | ~mask_BA).all(axis=1))
    return jax.tree.map(sharding.constrain, losses), total_B / jnp.maximum(batch.length_F, 1)


def memory_buckets(
    base: model.Base,
    examples: Sequence[Examples],
    expert_ids_FK: np.ndarray,
    slots_FK: np.ndarray,
    budget: float = math.inf,
) -> list[Bucket | HostBucket]:
    """The facts with their prefix activations, computed once, and their experts with their slots.

    Activations stay on the devices as long as they take at most `budget` bytes of each; further buckets stay on the
    host. Raises UserError if there are several hosts, none of which has all of them.
    """
    buckets, shards = [], sharding.size("facts") * sharding.size("width")
    for facts in examples:
        budget -= 4 * facts.tokens_FT.size * base.decoder.config.width / shards
        if budget >= 0:
            buckets.append(_bucket(facts, _read(base, facts.tokens_FT)))
            continue
        if jax.process_count() > 1:
            raise UserError("--config.tuning.cache_gb: too little for the facts' activations on these devices")
        arrays = facts.start_F, facts.answer_length_F, facts.targets_FA
        buckets.append(HostBucket(Bucket(_read_to_host(base, facts.tokens_FT), *arrays)))
    return reselected(buckets, examples, expert_ids_FK, slots_FK)


def reselected(
    buckets: Sequence[Bucket | HostBucket],
    examples: Sequence[Examples],
    expert_ids_FK: np.ndarray,
    slots_FK: np.ndarray,
) -> list[Bucket | HostBucket]:
    """The same facts with these experts and slots."""
    return [
        bucket.selecting(expert_ids_FK[facts.index_F], slots_FK[facts.index_F])
        for bucket, facts in zip(buckets, examples, strict=True)
    ]


def lora_buckets(examples: Sequence[Examples]) -> list[Bucket]:
    """The facts as tokens."""
    return [_bucket(facts, sharding.put(_padded(facts.tokens_FT), "facts", None)) for facts in examples]


def _bucket(facts: Examples, inputs) -> Bucket:
    arrays = facts.start_F, facts.answer_length_F, facts.targets_FA
    return Bucket(inputs, *(sharding.put(_padded(x), "facts", *(None,) * (x.ndim - 1)) for x in arrays))


def _padded(table_F: np.ndarray) -> np.ndarray:
    """Facts that nobody asks for fill up the last shards."""
    padding = sharding.padded(len(table_F), "facts") - len(table_F)
    return np.pad(table_F, [(0, padding), *[(0, 0)] * (table_F.ndim - 1)])


def _read(base: model.Base, tokens_FT: np.ndarray):
    """hidden_FTD, some facts of every shard at a time."""
    tokens_FT = _padded(tokens_FT)
    shape = (*tokens_FT.shape, base.decoder.config.width)
    names = sharding.fit(("facts", None, "width"), shape)
    hidden_FTD = sharding.zeros(shape, np.float32, names)
    for start, index_B in sharding.turns(len(tokens_FT), "facts"):
        hidden_BTD = model.read(base.decoder, base.params, tokens_FT[index_B])
        hidden_FTD = sharding.write(hidden_FTD, hidden_BTD, np.int32(start), names)
    return hidden_FTD


def _read_to_host(base: model.Base, tokens_FT: np.ndarray) -> np.ndarray:
    """The same, in the host's memory."""
    tokens_FT, count = _padded(tokens_FT), len(tokens_FT)
    hidden_FTD = np.empty((*tokens_FT.shape, base.decoder.config.width), np.float32)
    for _, index_B in sharding.turns(len(tokens_FT), "facts"):
        hidden_FTD[index_B] = model.read(base.decoder, base.params, tokens_FT[index_B])
    return hidden_FTD[:count]


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
    lost: int = 0  # times that a check found a fact no longer certified: others have trained its experts
    steps: int = 0
    batches: int = 0  # of the epoch under way, and which facts it trains
    active_F: np.ndarray | None = None

    @property
    def epoch(self) -> int:
        return len(self.loss)


def new_log(num_facts: int) -> Log:
    """The log of a run that has not begun."""
    unknown_F = np.full(num_facts, np.inf, np.float32)
    return Log(unknown_F, unknown_F.copy(), np.zeros(num_facts, bool), active_F=np.ones(num_facts, bool))


class Facts(NamedTuple):
    """The facts of a run: on the host, on the device, and the tokens of all answers."""

    examples: list[Examples]
    buckets: list[Bucket | HostBucket]

    @property
    def tokens(self) -> int:
        return int(sum(facts.answer_length_F.sum() for facts in self.examples))


def check(method: Method, params, state, facts: Facts, log: Log, batch_size: int) -> None:
    """Measures every fact's losses as they are now and writes them into the log."""
    pending = []
    for number, bucket in enumerate(facts.buckets):
        count = len(facts.examples[number].index_F)
        for rows_B in batches.in_order(count, min(batch_size, count)):
            rows_B = _whole(rows_B)
            pending.append((number, rows_B, method.losses(params, state, *bucket.batch(rows_B))))
    _record(log, facts, pending)


def train_epoch(
    method: Method,
    params,
    state,
    facts: Facts,
    log: Log,
    config: TuningConfig,
    seed: int,
    interrupted=lambda log: False,
):
    """The epoch under way, from where it stands, over the active facts.

    The log gets each fact's losses from before its step. After a step at which it is `interrupted`, `log.batches` says
    how far it came; 0 is the end.
    """
    pending = []
    order = batches.epoch_batches(facts.examples, config.batch_size, seed, log.epoch, log.active_F)
    for number, rows_B in itertools.islice(order, log.batches, None):
        rows_B = _whole(rows_B)
        state, losses = method.step(params, state, *facts.buckets[number].batch(rows_B))
        pending.append((number, rows_B, losses))
        log.steps += 1
        log.batches += 1
        if interrupted(log):
            break
    else:
        log.batches = 0
    _record(log, facts, pending)
    return state


def _whole(rows_B: np.ndarray) -> np.ndarray:
    """Rows of -1 fill up what the shards of a batch cannot divide."""
    return np.pad(rows_B, (0, sharding.padded(rows_B.size, "batch") - rows_B.size), constant_values=-1)


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
    interrupted: Callable[[Log], bool] = lambda log: False,
):
    """Trains from where `log` stands until the budget of epochs is spent; returns the state.

    `recalled` tells from a state which facts are recalled, by decoding. With `until_all_hold`, certified facts are
    spared, all are checked every few epochs, and tuning ends as soon as every fact is certified and recalled. When it
    is `interrupted`, asked after every step, it ends at once, within an epoch (`log.batches` is not 0).
    """
    threshold = certified_loss(config.backbone.dtype)
    batch_size = config.tuning.batch_size
    while log.epoch < config.tuning.epochs:
        started = time.perf_counter()
        if until_all_hold and log.batches == 0:
            if log.epoch % CHECK_EVERY == 0 or (log.worst_F < threshold).all():
                held_F = log.worst_F < threshold
                check(method, params, state, facts, log, batch_size)
                log.lost += int((held_F & (log.worst_F >= threshold)).sum())
            if (log.worst_F < threshold).all():
                recalled_F = recalled(state)
                if recalled_F.all():
                    break
                log.worst_F[~recalled_F] = np.inf
            log.active_F = log.worst_F >= threshold
        state = train_epoch(method, params, state, facts, log, config.tuning, config.seed, interrupted)
        if log.batches:
            return state
        log.seconds.append(time.perf_counter() - started)
        log.certified.append(int((log.worst_F < threshold).sum()))
        log.loss.append(float(log.total_F.sum(dtype=np.float64) / facts.tokens))
        if not until_all_hold and log.full_recall is None and log.likeliest_F.all() and recalled(state).all():
            log.full_recall = log.epoch
        after_epoch(state, log)
    check(method, params, state, facts, log, batch_size)
    return state
