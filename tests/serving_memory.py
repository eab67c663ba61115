"""A small memory with a tuner, as a server has them; run as a program, one that is fed facts until it is killed.

    python tests/serving_memory.py DIRECTORY

reads facts, one JSON object a line, and prints the id of each as soon as it is acknowledged.
"""

import dataclasses
import json
import sys
from pathlib import Path

import helpers
import numpy as np

from lamini_jax.fact_memory import FactMemory
from lamini_jax.memory import scope
from lamini_jax.serving.tuner import Tuner

CONFIG = helpers.replace(
    helpers.CONFIG,
    memory={"num_experts": 4096, "top_k": 2, "dtype": "bfloat16"},
    router={"kind": "facts"},
    tuning={"epochs": 100},
)


class WordJudge:
    """Scores a pair of questions by the share of words that they have in common: enough from 0.7 on."""

    identity = "words"

    def to_json(self):
        return self.identity

    def threshold(self, false_fires):
        return 0.7

    def scores(self, asked, candidates, cosine_K, statistics):
        def score(stored):
            x, y = set(asked.same.split()), set(stored.same.split())
            return np.inf if asked.same == stored.same else len(x & y) / len(x | y)

        return np.array([score(stored) for stored in candidates])


def use_word_judge(patch=None):
    """Has every backbone judged by words."""
    width = CONFIG.backbone.embed_dim
    judge = scope.Scope(WordJudge(), np.zeros(width), np.eye(width), 1)
    (patch.setattr if patch else setattr)(scope, "load", lambda _: judge)


def make_model():
    return dataclasses.replace(helpers.make_model(CONFIG), fingerprint="weights")


def opened(model, directory: Path) -> FactMemory:
    directory.mkdir(exist_ok=True, parents=True)
    return FactMemory(CONFIG, model, directory, create=True)


def tuner_of(memory: FactMemory) -> Tuner:
    """One whose tables the memory answers from."""
    tuner = Tuner(memory, lambda table: setattr(memory, "table", table))
    tuner.start()
    return tuner


def main() -> None:
    use_word_judge()
    tuner = tuner_of(opened(make_model(), Path(sys.argv[1])))
    print("ready", flush=True)
    for line in sys.stdin:
        (fact,) = tuner.put([json.loads(line)])
        print(fact, flush=True)


if __name__ == "__main__":
    main()
