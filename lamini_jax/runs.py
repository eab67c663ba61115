"""A whole run: facts in, tuned experts (or a tuned LoRA) out, saved as it goes and continued where it was killed."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from lamini_jax import bank, checkpoint, lora, model, recall, router, row_optimizer, tuning
from lamini_jax.config import Config
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact
from lamini_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a run leaves behind."""

    log: tuning.Log
    speak: recall.Speaker
    certified_F: np.ndarray  # which facts are, by the losses measured last


@dataclasses.dataclass(frozen=True)
class Memory:
    """Tuned memory as a checkpoint holds it: enough to answer with."""

    routing: router.Router
    expert_ids_S: jax.Array
    rows_SR: jax.Array


def fingerprint(facts: Sequence[Fact]) -> str:
    """A short name for a list of facts; other facts, or the same in another order, have another."""
    text = json.dumps([(fact.question, fact.answer) for fact in facts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tune_memory(
    config: Config,
    base: model.Base,
    make_router: Callable[[], router.Router],
    facts: Sequence[Fact],
    directory: Path,
    title: str,
    until_all_hold: bool = False,
) -> Tuned:
    """Memory tuning of some facts (section 7.1), with checkpoints in `directory`."""
    shape = bank.row_shape(base.decoder.config, config.memory)
    tx = row_optimizer.make(config.tuning.optimizer, config.tuning.learning_rate)
    checkpoints = checkpoint.Checkpoints(directory)
    saved = checkpoints.latest()
    routing = make_router() if saved is None else _routing(config, saved)
    if saved is None:
        questions = [fact.question for fact in facts]
        expert_ids_FK = model.select_all(base, routing, questions, config.memory.selected)
        log = tuning.new_log(len(facts))
    else:
        expert_ids_FK, log = np.asarray(saved[0]["expert_ids_FK"]), saved[1]
    expert_ids_S, slots_FK = row_optimizer.slots_of(expert_ids_FK)
    rows_NR = bank.init(_bank_key(config), shape, config.memory.num_experts)
    slots = row_optimizer.init(tx, expert_ids_S, shape)
    if saved is not None:
        slots = slots.replace(state=checkpoint.like(slots.state, saved[0]["optimizer"]))
        rows_NR = _scatter(rows_NR, slots.expert_ids_S, jnp.asarray(saved[0]["rows_SR"]))
    state = tuning.MemoryState(rows_NR, slots)
    del rows_NR, slots  # the step takes their memory over

    def keep(state):
        return {
            "rows_SR": bank.gather(state.rows_NR, state.slots.expert_ids_S),
            "optimizer": checkpoint.leaves(state.slots.state),
            "expert_ids_S": expert_ids_S,
            "expert_ids_FK": expert_ids_FK,
            "mean_D": routing.mean_D,
            "transform_DC": routing.transform_DC,
        }

    def speaker(state):
        rows_NR = state.rows_NR
        return recall.with_memory(base, routing, lambda ids_BK: _gather(rows_NR, ids_BK), config.memory)

    examples = batches.encode(facts, base.tokenizer)
    prepared = tuning.Facts(examples, tuning.memory_buckets(base, examples, slots_FK))
    method = tuning.memory_method(base.decoder, shape, config.memory.target, tx)
    extra = {"keys": checkpoint.checksum(routing.keys)}
    loop = _Loop(config, base, facts, checkpoints, title, keep, extra, speaker, until_all_hold)
    state = _run(loop, method, state, prepared, log)
    return Tuned(log, speaker(state), log.worst_F < tuning.certified_loss(config.backbone.dtype))


def tune_lora(config: Config, base: model.Base, facts: Sequence[Fact], directory: Path, title: str) -> Tuned:
    """The baseline: one LoRA on every linear layer."""
    examples = batches.encode(facts, base.tokenizer)
    steps = sum(1 for _ in batches.epoch_batches(examples, config.tuning.batch_size, config.seed, 0))
    # Down to zero: at a fixed rate that is high enough to memorize, training blows up again once losses are near zero.
    schedule = optax.linear_schedule(config.lora.learning_rate, 0.0, config.tuning.epochs * steps)
    tx = row_optimizer.make(config.lora.optimizer, schedule)
    adapters = lora.init(base.decoder, config.lora.rank, jax.random.fold_in(jax.random.key(config.seed), 3))
    state = tuning.LoraState(adapters, tx.init(adapters))
    checkpoints = checkpoint.Checkpoints(directory)
    saved = checkpoints.latest()
    log = tuning.new_log(len(facts))
    if saved is not None:
        state, log = checkpoint.like(state, saved[0]["leaves"]), saved[1]
    prepared = tuning.Facts(examples, tuning.lora_buckets(examples))
    method = tuning.lora_method(base.decoder, tx)

    def keep(state):
        return {"leaves": checkpoint.leaves(state)}

    def speaker(state):
        return recall.with_lora(base, state.adapters)

    state = _run(_Loop(config, base, facts, checkpoints, title, keep, {}, speaker), method, state, prepared, log)
    return Tuned(log, speaker(state), log.worst_F < tuning.certified_loss(config.backbone.dtype))


def recalled(base: model.Base, speak: recall.Speaker, facts: Sequence[Fact]) -> tuple[np.ndarray, list[str]]:
    """Which facts greedy decoding returns exactly, and what it returns. Only the questions are handed over."""
    generated = recall.answers(base, speak, [fact.question for fact in facts])
    return np.array([text == fact.answer for text, fact in zip(generated, facts, strict=True)]), generated


def load_memory(config: Config, directory: Path) -> Memory:
    """The tuned memory of a finished run."""
    saved = checkpoint.Checkpoints(directory).latest() if directory.is_dir() else None
    if saved is None:
        raise UserError(f"{directory}: has no finished checkpoint; finish python -m lamini_jax.tune first")
    return Memory(_routing(config, saved), jnp.asarray(saved[0]["expert_ids_S"]), jnp.asarray(saved[0]["rows_SR"]))


def answer_with(base: model.Base, memory: Memory, config: Config) -> recall.Speaker:
    """A speaker that holds the trained rows only."""

    def fetch(ids_BK):
        return _gather_trained(memory.expert_ids_S, memory.rows_SR, ids_BK)

    return recall.with_memory(base, memory.routing, fetch, config.memory)


_gather = jax.jit(bank.gather)
_gather_trained = jax.jit(bank.gather_trained)
_scatter = jax.jit(bank.scatter, donate_argnums=0)


def _bank_key(config: Config) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), 2)


def _routing(config: Config, saved) -> router.Router:
    tree, _, extra = saved
    keys = router.keys(config)
    checkpoint.verify(keys, extra["keys"])
    transform_DC = jnp.asarray(tree["transform_DC"])
    return router.Router(jnp.asarray(tree["mean_D"]), transform_DC, keys, config.router.lookup)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What `_run` needs beside what it trains."""

    config: Config
    base: model.Base
    facts: Sequence[Fact]
    checkpoints: checkpoint.Checkpoints
    title: str
    keep: Callable[[Any], Any]  # what of the state is saved
    extra: dict[str, Any]
    speaker: Callable[[Any], recall.Speaker]
    until_all_hold: bool = False


def _run(loop: _Loop, method: tuning.Method, state, prepared: tuning.Facts, log: tuning.Log):
    """The loop with its progress bar and its checkpoints."""
    interval = 0.5 if sys.stderr.isatty() else 10.0  # a log file wants fewer lines than a terminal
    epochs = loop.config.tuning.epochs
    bar = tqdm.tqdm(total=epochs, initial=log.epoch, desc=loop.title, unit="epoch", mininterval=interval)

    def recalled_F(state):
        return recalled(loop.base, loop.speaker(state), loop.facts)[0]

    def after_epoch(state, log):
        counts = f"loss {log.loss[-1]:.4f}, {log.certified[-1]} of {log.worst_F.size} certified"
        bar.set_postfix_str(counts, refresh=False)
        bar.update()
        if loop.checkpoints.due():
            loop.checkpoints.save(loop.keep(state), log, loop.extra)

    options = {"recalled": recalled_F, "until_all_hold": loop.until_all_hold, "after_epoch": after_epoch}
    state = tuning.tune(method, loop.base.params, state, prepared, log, loop.config, **options)
    bar.close()
    loop.checkpoints.save(loop.keep(state), log, loop.extra)
    loop.checkpoints.close()
    return state
