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

import numpy as np
from absl import flags

from experiments.parts import pretraining
from lamini_jax import backbone, command, model, recall
from lamini_jax.config import BackboneConfig
from lamini_jax.data import world
from lamini_jax.data.tokenizer import ByteTokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the weights and results.json go.", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "Where the weights go instead of the work directory.")
_STEPS = flags.DEFINE_integer("steps", 3_500, "Training steps.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Sequences per step, each as long as the context.", lower_bound=1)

HELD_OUT = 60  # held-out questions of each kind, fewer where it has fewer


def heldout_accuracy(config: BackboneConfig, params: backbone.Params) -> dict[str, float]:
    """The share of held-out questions of each kind, and of all, that greedy decoding answers exactly."""
    base = model.Base(backbone.Decoder(config, 1), backbone.cut(params, 1), ByteTokenizer())
    questions = [qa for kind in world.KINDS for qa in world.held_out(kind, HELD_OUT, pretraining.SEED)]
    right = np.array(recall.accuracy(base, recall.bare, questions))
    kinds = np.array([qa.kind for qa in questions])
    return {str(kind): float(right[kinds == kind].mean()) for kind in np.unique(kinds)} | {"all": float(right.mean())}


def main() -> None:
    config = BackboneConfig()
    directory = command.open_workdir(_WORKDIR.value, {"steps": _STEPS.value, "batch": _BATCH.value})
    started = time.time()
    path = Path(_OUTPUT.value or directory / "tiny.safetensors")
    params = pretraining.train(config, ByteTokenizer(), _BATCH.value, _STEPS.value, path)
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
