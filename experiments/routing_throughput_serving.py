"""A part of `routing_throughput`: answering as `lamini_jax.ask` does it.

It measures questions per second as N grows, and the share of routing in their time.
"""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from lamini_jax.backbone import answering, frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, MemoryConfig, RouterConfig
from lamini_jax.data import batches, world
from lamini_jax.errors import UserError
from lamini_jax.index import LOOKUPS
from lamini_jax.memory import experts, routers, storage
from lamini_jax.memory.routers import experts as router_kind
from lamini_jax.runtime import sharding

TRAINED = 2**13  # experts that a memory of 256 facts holds
BATCH = 64
MAX_NEW_TOKENS = 32
TURNS = 7


def rows(sizes: tuple[int, ...], progress) -> list[dict]:
    """One row for each lookup that training may use and each N that it supports. Experts add nothing: equal answers."""
    model = frozen_model.load(Config())
    questions = equal_questions(model)
    cases = [(name, size) for name in LOOKUPS.names() for size in sizes if may_answer(name, size)]
    contenders = {case: contender(*case, model, questions) for case in cases}
    seconds = {case: ([], []) for case in cases}
    for turn in range(TURNS + 1):
        for case, pair in contenders.items():
            for kept, run in zip(seconds[case], pair, strict=True):
                started = time.perf_counter()
                run()
                if turn:  # the first turns compile
                    kept.append(time.perf_counter() - started)
        progress.update()
    return [row_of(*case, *map(statistics.median, pair)) for case, pair in seconds.items()]


def row_of(name: str, num_experts: int, seconds: float, routing_seconds: float) -> dict:
    """The row of a lookup, from the seconds for a batch and for its routing."""
    return {
        "lookup": name,
        "num_experts": num_experts,
        "batch": BATCH,
        "questions_per_second": BATCH / seconds,
        "seconds": seconds,
        "routing_share": routing_seconds / seconds,
    }


def may_answer(name: str, num_experts: int) -> bool:
    """Whether facts can be tuned with this lookup among so many experts."""
    if not LOOKUPS[name].ALWAYS_FINDS_THE_SAME:
        return False
    try:
        LOOKUPS[name].check(num_experts, RouterConfig().key_dim)
    except UserError:
        return False
    return True


def equal_questions(model: FrozenModel) -> list[str]:
    """A batch of questions whose prompts have one shape: a single compiled program answers them."""
    pool = [qa.question for kind in world.KINDS for qa in world.held_out(kind, BATCH, 0)]
    commonest = max(batches.prompts(pool, model.tokenizer), key=lambda bucket: len(bucket.index_F))
    return [pool[i] for i in commonest.index_F[:BATCH]]


def contender(
    name: str, num_experts: int, model: FrozenModel, questions: list[str]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions: one answers the questions with a memory of `num_experts`, the other only finds their experts."""
    config = Config(memory=MemoryConfig(num_experts), router=RouterConfig(lookup=name, calibration_questions=256))
    router = routers.train(config, model, questions)
    ids_S = np.sort(np.random.default_rng(0).choice(num_experts, min(TRAINED, num_experts), replace=False))
    experts_SR = experts.init(np.uint32(0), experts.expert_shape(config.backbone, config.memory), len(ids_S))
    memory = storage.StoredMemory(router, sharding.put(ids_S.astype(np.int32)), experts_SR, model.fingerprint)
    adapter_fn = storage.adapter_fn(model, memory, config)
    (bucket,) = batches.prompts(questions, model.tokenizer)
    feature_BD = router_kind.features(model, bucket.tokens_FT, bucket.length_F, router.layer)
    select = jax.jit(router_kind.select_by_feature, static_argnums=2)

    def ask() -> None:
        answering.answers(model, adapter_fn, questions, MAX_NEW_TOKENS)

    def route() -> None:
        jax.block_until_ready(select(router, feature_BD, config.memory.top_k))

    return ask, route


def table(results: list[dict]) -> str:
    """The rows as text."""
    lines = [
        f"{'ask with':<15}{'experts':>11}{'batch':>7}{'questions/s':>13}{'ms':>10}{'routing':>9}{'over least N':>14}"
    ]
    for row in results:
        least = next(other for other in results if other["lookup"] == row["lookup"])
        lines.append(
            f"{row['lookup']:<15}{row['num_experts']:>11,}{row['batch']:>7,}{row['questions_per_second']:>13,.0f}"
            f"{1e3 * row['seconds']:>10.2f}{100 * row['routing_share']:>8.1f}%"
            f"{row['seconds'] / least['seconds']:>14.2f}"
        )
    return "\n".join(lines)
