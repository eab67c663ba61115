"""A whole run: facts in, tuned experts (or a tuned LoRA) out, saved as it goes and continued where it was killed."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from lamini_jax import bank, checkpoint, memory, model, processes, recall, router, row_optimizer, tuning
from lamini_jax.config import Config
from lamini_jax.data import batches
from lamini_jax.data.facts import Fact
from lamini_jax.errors import PREEMPTED, UserError


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a run leaves behind."""

    log: tuning.Log
    adapt: recall.Adapt
    certified_F: np.ndarray  # which facts are, by the losses measured last
    expert_ids_FK: np.ndarray | None = None  # of memory tuning


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
    watch: Callable[[int, recall.Adapt], None] | None = None,
) -> Tuned:
    """Memory tuning of some facts (section 7.1), with checkpoints in `directory`.

    After each epoch, and before any checkpoint of it, `watch(epoch, adapt)` may ask what the model then says; its
    `adapt` holds during that call alone.
    """
    shape, num_experts = bank.row_shape(base.decoder.config, config.memory), config.memory.num_experts
    tx = row_optimizer.make(config.tuning.optimizer, config.tuning.learning_rate)
    checkpoints = checkpoint.Checkpoints(directory)
    saved = checkpoints.latest()
    if saved is not None and (tuned_beside := saved.extra.get("backbone")) != base.fingerprint:
        raise UserError(f"{directory}: was tuned beside another backbone (fingerprint {tuned_beside})")
    routing = make_router() if saved is None else memory.restored_router(config, saved.arrays, saved.extra)
    if saved is None:
        questions = [fact.question for fact in facts]
        expert_ids_FK = model.select_all(base, routing, questions, config.memory.selected)
        log = tuning.new_log(len(facts))
    else:
        expert_ids_FK, log = saved.arrays["expert_ids_FK"], saved.log
    expert_ids_S, slots_FK = row_optimizer.slots_of(expert_ids_FK, num_experts)
    slots = row_optimizer.init(tx, expert_ids_S, shape)
    rows_NR = bank.init(np.uint32(config.seed), shape, num_experts, config.memory.dtype)
    if saved is not None:
        tables = {
            name: row_optimizer.rearranged(leaves, saved.arrays["expert_ids_S"], expert_ids_S, shape)
            for name, leaves in saved.tables.items()
        }
        slots = slots.replace(state=checkpoint.like(slots.state, tables["optimizer"]))
        rows_SR = checkpoint.like(row_optimizer.trained_rows(rows_NR, slots), tables["rows"])
        rows_NR = row_optimizer.with_trained_rows(rows_NR, slots, rows_SR)
    state = tuning.MemoryState(rows_NR, slots)
    del rows_NR, slots  # the step takes their memory over

    def keep(state):
        arrays = {
            "expert_ids_S": expert_ids_S,
            "expert_ids_FK": expert_ids_FK,
            "mean_D": np.asarray(routing.mean_D),
            "transform_DC": np.asarray(routing.transform_DC),
        }
        tables = {"rows": row_optimizer.trained_rows(state.rows_NR, state.slots), "optimizer": state.slots.state}
        return tables, arrays

    def adapt_with(state):
        rows_NR = state.rows_NR
        return recall.with_memory(base, routing, lambda ids_BK: _gather(rows_NR, ids_BK), config.memory)

    examples = batches.encode(facts, base.tokenizer)
    budget = 1e9 * config.tuning.cache_gb
    prepared = tuning.Facts(examples, tuning.memory_buckets(base, examples, expert_ids_FK, slots_FK, budget))
    touched = row_optimizer.most_touched(slots_FK, expert_ids_S.size, config.tuning.batch_size)
    method = tuning.memory_method(base.decoder, shape, config.memory.target, tx, touched)
    extra = {"keys": memory.key_checksum(routing), "backbone": base.fingerprint}
    loop = _Loop(config, base, facts, checkpoints, title, keep, extra, adapt_with, until_all_hold, watch)
    state = _run(loop, method, state, prepared, log)
    certified_F = log.worst_F < tuning.certified_loss(config.backbone.dtype)
    return Tuned(log, adapt_with(state), certified_F, expert_ids_FK)


def tune_lora(
    config: Config,
    base: model.Base,
    facts: Sequence[Fact],
    directory: Path,
    title: str,
    until_all_hold: bool = False,
) -> Tuned:
    """The baseline: one LoRA on every linear layer."""
    examples = batches.encode(facts, base.tokenizer)
    steps = sum(1 for _ in batches.epoch_batches(examples, config.tuning.batch_size, config.seed, 0))
    # Down to zero: at a fixed rate that is high enough to memorize, training blows up again once losses are near zero.
    schedule = optax.linear_schedule(config.lora.learning_rate, 0.0, config.tuning.epochs * steps)
    tx = row_optimizer.make(config.lora.optimizer, schedule)
    state = tuning.lora_state(base.decoder, config.lora.rank, tx, np.uint32(config.seed))
    checkpoints = checkpoint.Checkpoints(directory)
    saved = checkpoints.latest()
    log = tuning.new_log(len(facts))
    if saved is not None:
        saved_state = checkpoint.like(state, saved.tables["state"])
        state = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), saved_state, state)
        log = saved.log
    prepared = tuning.Facts(examples, tuning.lora_buckets(examples))
    method = tuning.lora_method(base.decoder, tx)

    def keep(state):
        return {"state": state}, {}

    def adapt_with(state):
        return recall.with_lora(state.adapters)

    loop = _Loop(config, base, facts, checkpoints, title, keep, {}, adapt_with, until_all_hold)
    state = _run(loop, method, state, prepared, log)
    return Tuned(log, adapt_with(state), log.worst_F < tuning.certified_loss(config.backbone.dtype))


def recalled(base: model.Base, adapt: recall.Adapt, facts: Sequence[Fact]) -> tuple[np.ndarray, list[str]]:
    """Which facts greedy decoding returns exactly, and what it returns. Only the questions are handed over."""
    generated = recall.answers(base, adapt, [fact.question for fact in facts])
    return np.array([text == fact.answer for text, fact in zip(generated, facts, strict=True)]), generated


_gather = jax.jit(bank.gather)


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
    adapt_with: Callable[[Any], recall.Adapt]
    until_all_hold: bool = False
    watch: Callable[[int, recall.Adapt], None] | None = None


def _run(loop: _Loop, method: tuning.Method, state, prepared: tuning.Facts, log: tuning.Log):
    """The loop with its progress bar and its checkpoints. Raises UserError (PREEMPTED) after a SIGTERM."""
    bar = processes.bar(total=loop.config.tuning.epochs, initial=log.epoch, desc=loop.title, unit="epoch")

    def save(state, log):
        loop.checkpoints.save(*loop.keep(state), log, loop.extra)

    def recalled_F(state):
        return recalled(loop.base, loop.adapt_with(state), loop.facts)[0]

    def after_epoch(state, log):
        counts = f"loss {log.loss[-1]:.4f}, {log.certified[-1]} of {log.worst_F.size} certified"
        bar.set_postfix_str(counts, refresh=False)
        bar.update()
        if loop.watch:
            loop.watch(log.epoch, loop.adapt_with(state))
        if loop.checkpoints.due():
            save(state, log)

    def interrupted(log):
        return processes.terminated(log.steps)

    hooks = {"recalled": recalled_F, "after_epoch": after_epoch, "interrupted": interrupted}
    with processes.watching():
        state = tuning.tune(
            method, loop.base.params, state, prepared, log, loop.config, until_all_hold=loop.until_all_hold, **hooks
        )
        bar.close()
        save(state, log)
        loop.checkpoints.close()
    if log.batches:
        message = f"terminated in epoch {log.epoch + 1}, after {log.steps} steps, which are saved: run again to go on"
        raise UserError(message, status=PREEMPTED)
    return state
