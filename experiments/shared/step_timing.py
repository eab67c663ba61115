"""How long a training step takes: several methods in turn, so that a machine that is busy for a while slows all."""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import tqdm

from lamini_jax import Fact
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.data import batches
from lamini_jax.memory.routers import FactSelection
from lamini_jax.runtime import sharding
from lamini_jax.training import MemoryMethod, TrainMethod

FEW_EXPERTS = 2**14
TURNS = 15


class TimedStep:
    """A method's step on all of its facts, which have one length."""

    def __init__(self, method: TrainMethod):
        (examples,), (facts,) = method.data.examples, method.data.buckets
        index_B = sharding.pad_rows(np.arange(len(examples.index_F), dtype=np.int32), "batch", fill=-1)
        self._model, self._state, self._batch = method.model, method.init(), facts.batch(index_B)
        self.lowered = method.step.lower(self._model, self._state, *self._batch)
        self.tokens, self.answer_tokens = examples.tokens_FT.shape[1], examples.targets_FA.shape[1]

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        return self.lowered.compile()

    def launch_singly(self) -> None:
        """From now on a GPU launches each operation by itself: of those launched as a graph a profile has no names."""
        if jax.default_backend() == "gpu":
            options = {"xla_gpu_graph_min_graph_size": 2**30}
            self.__dict__["compiled"] = self.lowered.compile(compiler_options=options)

    def take(self) -> float:
        """Takes one step and returns its seconds. The first one compiles."""
        started = time.perf_counter()
        self._state, _ = jax.block_until_ready(self.compiled(self._model, self._state, *self._batch))
        return time.perf_counter() - started


def take_turns(steps: Mapping[str, TimedStep], bar: tqdm.tqdm) -> dict[str, list[float]]:
    """The seconds of each step, taken in turn so that a machine that is busy for a while slows all.

    Each turn takes two, of which the second counts: the first finds the caches as another method has left them.
    """
    seconds = {name: [] for name in steps}
    for turn in range(TURNS + 1):  # the first turn compiles
        for name, step in steps.items():
            bar.set_postfix_str(name, refresh=False)
            step.take()
            taken = step.take()
            seconds[name] += [taken] if turn else []
            bar.update()
    return seconds


def one_length(model: FrozenModel, facts: Sequence[Fact]) -> batches.Padding:
    """The least padding with which all facts have one length."""
    paddings = (batches.Padding(tokens) for tokens in itertools.count(8, 8))
    return next(padding for padding in paddings if len(batches.encode(facts, model.tokenizer, padding)) == 1)


def with_own_experts(
    config: Config, model: FrozenModel, facts: Sequence[Fact], padding: batches.Padding
) -> MemoryMethod:
    """Memory tuning where each fact has experts of its own, the same ones for any N, so all steps update as many."""
    k, among = config.memory.top_k, min(FEW_EXPERTS, config.memory.num_experts)
    picked = np.random.default_rng(config.seed).permutation(among)[: len(facts) * k]
    ids_FK = picked.astype(np.int32).reshape(-1, k)
    gates_FK = np.full(ids_FK.shape, k**-0.5, np.float32)
    return MemoryMethod.create(config, model, facts, FactSelection(None, ids_FK, gates_FK), padding=padding)
