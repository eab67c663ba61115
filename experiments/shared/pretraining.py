"""Training whole backbones from nothing on the generated world."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lamini_jax.backbone import transformer
from lamini_jax.backbone.checkpoints import shipped
from lamini_jax.config import BackboneConfig
from lamini_jax.data import world

SEED = 0
ONCE = 1_000  # arbitrary facts (`world.once`) that training from nothing shows exactly once
# A model that only answers need not predict a question's own bytes; a small weight on them keeps its reading general.
# An answer has the weight sqrt(length) in all: else copying long words would outweigh short answers, the hard ones.
QUESTION_WEIGHT = 0.03


def packed_batches(config: BackboneConfig, tokenizer, batch: int, steps: int):
    """Token and weight arrays (batch, context + 1) for each step: documents one after another, cut where a row ends."""
    stream = world.training_stream(SEED)
    once = world.once(ONCE, SEED)
    size = batch * (config.max_seq_len + 1)
    tokens, weights = [], []
    for step in range(steps):
        # The facts that are seen once are spread evenly over all steps except the last.
        due = once[step * ONCE // max(steps - 1, 1) : (step + 1) * ONCE // max(steps - 1, 1)]
        while len(tokens) < size:
            qa = due.pop() if due else next(stream)
            prompt, completion = tokenizer.prompt(qa.question), tokenizer.completion(qa.answer)
            tokens += prompt + completion
            weights += [QUESTION_WEIGHT] * len(prompt) + [len(completion) ** -0.5] * len(completion)
        shape = (batch, config.max_seq_len + 1)
        yield np.array(tokens[:size], np.int32).reshape(shape), np.array(weights[:size], np.float32).reshape(shape)
        tokens, weights = tokens[size:], weights[size:]


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the embedding and the norms; warmed up, then cosine to zero."""

    def matrices(params):
        def dimensions(path, x):  # of the layers' matrices, which may be in a stack
            in_layers = any(str(key.key).endswith("_layers") for key in path)
            return MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if in_layers and path[-1].key == "weight" else None

        return jax.tree_util.tree_map_with_path(dimensions, params)

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 10), steps)

    transformation = muon(
        schedule(2e-2), weight_decay=0.01, adam_learning_rate=schedule(4e-3), muon_weight_dimension_numbers=matrices
    )
    return optax.chain(optax.clip_by_global_norm(1.0), transformation)


def train(config: BackboneConfig, tokenizer, batch: int, steps: int, path: Path) -> transformer.Params:
    """Whole parameters after `steps` steps; they are written to `path` every 500 steps, in case it is stopped."""
    decoder = transformer.Decoder(config, memory_layers=1)
    tx = optimizer(steps)

    @jax.jit
    def start():
        params = transformer.init(decoder, jax.random.key(SEED))
        return params, tx.init(params)

    @jax.jit
    def step(params, state, tokens_BT, weights_BT):
        def mean_loss(params):
            logits_BTV = transformer.all_logits(decoder, params, tokens_BT[:, :-1])
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
            shipped.save(path, config, transformer.join_layers(params))
    return transformer.join_layers(params)
