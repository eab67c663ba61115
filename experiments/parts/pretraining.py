"""Training whole backbones: from nothing on the generated world, and all weights of one on some facts."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lamini_jax import backbone, model, processes
from lamini_jax.config import BackboneConfig, Config
from lamini_jax.data import batches, world
from lamini_jax.data.facts import Fact

SEED = 0
ONCE = 1_000  # arbitrary facts (`world.once`) that training from nothing shows exactly once
# A question's own bytes are noise to a model that is only ever asked; a little of them keeps its reading general.
# An answer's bytes share the root of its length, lest copying long words drown the short answers, the hard ones.
QUESTION_WEIGHT = 0.03
_FULL_TUNING_RATE = 1e-3


def packed_batches(config: BackboneConfig, tokenizer, batch: int, steps: int):
    """Token and weight arrays (batch, context + 1) for each step: documents one after another, cut where a row ends."""
    stream = world.training_stream(SEED)
    once = world.once(ONCE, SEED)
    size = batch * (config.context + 1)
    tokens, weights = [], []
    for step in range(steps):
        # The facts seen once are spread evenly over all steps but the last.
        due = once[step * ONCE // max(steps - 1, 1) : (step + 1) * ONCE // max(steps - 1, 1)]
        while len(tokens) < size:
            qa = due.pop() if due else next(stream)
            prompt, completion = tokenizer.prompt(qa.question), tokenizer.completion(qa.answer)
            tokens += prompt + completion
            weights += [QUESTION_WEIGHT] * len(prompt) + [len(completion) ** -0.5] * len(completion)
        shape = (batch, config.context + 1)
        yield np.array(tokens[:size], np.int32).reshape(shape), np.array(weights[:size], np.float32).reshape(shape)
        tokens, weights = tokens[size:], weights[size:]


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the embedding and the norms; warmed up, then cosine to zero."""

    def matrices(params):
        return jax.tree.map(lambda x: MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params)

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 10), steps)

    transformation = muon(
        schedule(2e-2), weight_decay=0.01, adam_learning_rate=schedule(4e-3), muon_weight_dimension_numbers=matrices
    )
    return optax.chain(optax.clip_by_global_norm(1.0), transformation)


def train(config: BackboneConfig, tokenizer, batch: int, steps: int, path: Path) -> backbone.Params:
    """Whole parameters after `steps` steps; `path` has those of the latest 500, should it be stopped."""
    decoder = backbone.Decoder(config, memory_layers=1)
    tx = optimizer(steps)

    @jax.jit
    def start():
        params = backbone.init(decoder, jax.random.key(SEED))
        return params, tx.init(params)

    @jax.jit
    def step(params, state, tokens_BT, weights_BT):
        def mean_loss(params):
            logits_BTV = decoder.apply({"params": params}, tokens_BT[:, :-1])
            losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
            return jnp.sum(losses_BT * weights_BT[:, 1:]) / jnp.sum(weights_BT[:, 1:])

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = start()
    started = time.time()
    for number, (tokens_BT, weights_BT) in enumerate(packed_batches(config, tokenizer, batch, steps), 1):
        params, state, loss = step(params, state, tokens_BT, weights_BT)
        if number % min(50, max(steps // 5, 1)) == 0 or number == steps:
            elapsed = time.time() - started
            left = elapsed / number * (steps - number) / 60
            print(f"step {number}/{steps}  loss {loss:.4f}  {left:.0f} min left", flush=True)
        if number % 500 == 0:
            backbone.save(path, config, backbone.join(params))
    return backbone.join(params)


def tune_all_weights(config: Config, base: model.Base, facts: Sequence[Fact], enough: float) -> model.Base:
    """A copy, all of whose weights Adam has tuned on some facts.

    It ends when they cost less than `enough` nats per token, or with the budget of epochs.
    """
    decoder, tx = base.decoder, optax.adam(_FULL_TUNING_RATE)
    tables = batches.encode(facts, base.tokenizer)
    tokens = sum(table.answer_length_F.sum() for table in tables)

    @jax.jit
    def step(params, state, tokens_BT, start_B, length_B, targets_BA, valid_B):
        mask_BA = (jnp.arange(targets_BA.shape[1])[None] < length_B[:, None]) & valid_B[:, None]

        def mean_loss(params):
            hidden_BTD, _ = backbone.prefix(decoder, params, tokens_BT)
            losses_BA, _ = model.token_losses(decoder, params, hidden_BTD, start_B, targets_BA, None)
            total = jnp.sum(jnp.where(mask_BA, losses_BA, 0.0))
            return total / mask_BA.sum(), total

        gradients, total = jax.grad(mean_loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, total

    params, state = base.params, jax.jit(tx.init)(base.params)
    bar = processes.bar(range(config.tuning.epochs), unit="epoch", desc="all weights")
    for epoch in bar:
        totals = []
        for number, rows_B in batches.epoch_batches(tables, config.tuning.batch_size, config.seed, epoch):
            table = tables[number]
            arrays = (table.tokens_FT, table.start_F, table.answer_length_F, table.targets_FA)
            params, state, total = step(params, state, *(array_F[rows_B] for array_F in arrays), rows_B >= 0)
            totals.append(total)
        loss = float(sum(totals)) / tokens
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if loss < enough:
            break
    bar.close()
    return dataclasses.replace(base, params=params, fingerprint="")
