"""Trains the tiny backbone that ships with the package, from nothing, on the generated world.

    python -m experiments.pretrain_backbone --workdir=runs/pretrain --output=lamini_jax/weights/tiny.safetensors

A byte-level decoder of about 0.8 million parameters reads questions and answers of the training split, packed into
sequences of its whole context, and each of 1,000 arbitrary facts exactly once. `results.json` holds the share of
held-out questions that it then answers exactly by greedy decoding, of all kinds and of each.

0.7 s per step on 2 x86-64 cores, so 41 minutes with nothing beside it; the shipped weights took 56 minutes on a machine
that was busy otherwise (Python 3.11, jax 0.10.2, optax 0.2.8). They answer 91.3% of the held-out questions: 96% to 100%
of each of 22 kinds, 78% of numbers in words, and little more than guesses where a word has to be found by another
(odd_one_out 35%, owner 47%, contains 60%, tallest 60%).
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from optax.contrib import MuonDimensionNumbers, muon

from lamini_jax import backbone, command, model, recall
from lamini_jax.config import BackboneConfig
from lamini_jax.data import world
from lamini_jax.data.tokenizer import ByteTokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the weights and results.json go.", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "Where the weights go instead of the work directory.")
_STEPS = flags.DEFINE_integer("steps", 3_500, "Training steps.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Sequences per step, each as long as the context.", lower_bound=1)

SEED = 0
ONCE = 1_000
HELD_OUT = 60  # held-out questions of each kind, fewer where it has fewer
# A question's own bytes are noise to a model that is only ever asked; a little of them keeps its reading general.
# An answer's bytes share the root of its length, lest copying long words drown the short answers, the hard ones.
QUESTION_WEIGHT = 0.03


def packed_batches(config: BackboneConfig, batch: int, steps: int):
    """Token and weight arrays (batch, context + 1) for each step: documents one after another, cut where a row ends."""
    tokenizer = ByteTokenizer()
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


def train(config: BackboneConfig, batch: int, steps: int, path: Path) -> backbone.Params:
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
    for number, (tokens_BT, weights_BT) in enumerate(packed_batches(config, batch, steps), 1):
        params, state, loss = step(params, state, tokens_BT, weights_BT)
        if number % 50 == 0 or number == steps:
            elapsed = time.time() - started
            left = elapsed / number * (steps - number) / 60
            print(f"step {number}/{steps}  loss {loss:.4f}  {left:.0f} min left", flush=True)
        if number % 500 == 0:
            backbone.save(path, config, backbone.join(params))
    return backbone.join(params)


def heldout_accuracy(config: BackboneConfig, params: backbone.Params) -> dict[str, float]:
    """The share of held-out questions of each kind, and of all, that greedy decoding answers exactly."""
    base = model.Base(backbone.Decoder(config, 1), backbone.cut(params, 1), ByteTokenizer())
    questions = [qa for kind in world.KINDS for qa in world.held_out(kind, HELD_OUT, SEED)]
    right = np.array(recall.accuracy(base, recall.bare, questions))
    kinds = np.array([qa.kind for qa in questions])
    return {str(kind): float(right[kinds == kind].mean()) for kind in np.unique(kinds)} | {"all": float(right.mean())}


def main() -> None:
    config = BackboneConfig()
    directory = command.open_workdir(_WORKDIR.value, {"steps": _STEPS.value, "batch": _BATCH.value})
    started = time.time()
    path = Path(_OUTPUT.value or directory / "tiny.safetensors")
    params = train(config, _BATCH.value, _STEPS.value, path)
    seconds = round(time.time() - started)
    backbone.save(path, config, params)
    print(f"trained in {seconds / 60:.0f} min; {path}; asking held-out questions ...", flush=True)
    accuracy = heldout_accuracy(config, params)
    for kind, share in sorted(accuracy.items(), key=lambda item: item[1]):
        print(f"{kind:<15}{100 * share:6.1f}%")
    results = {"seconds": seconds, "heldout_accuracy": accuracy, "environment": command.environment()}
    command.write_json(directory / "results.json", results)


if __name__ == "__main__":
    command.run(main)
