"""Answering as `lamini_jax.ask` does it: questions per second as N grows, and what part of their time is routing."""

import math
import statistics
import time

import jax
import numpy as np

from lamini_jax import bank, memory, model, recall, router, sharding
from lamini_jax.config import LOOKUPS, Config, MemoryConfig, RouterConfig
from lamini_jax.data import batches, world

TRAINED = 2**13  # rows that a memory of 256 facts holds
BATCH = 64
LONGEST = 32  # tokens of an answer
TURNS = 7


def rows(sizes: list[int], progress) -> list[dict]:
    """One row per lookup and N (for product keys, a square), in turns. Experts add nothing: equal answers."""
    base = model.load_base(Config())
    pool = [qa.question for kind in world.KINDS for qa in world.held_out(kind, BATCH, 0)]
    commonest = max(batches.prompts(pool, base.tokenizer), key=lambda bucket: len(bucket.index_F))
    questions = [pool[i] for i in commonest.index_F[:BATCH]]  # one batch of one shape
    (bucket,) = batches.prompts(questions, base.tokenizer)
    feature_BD = model.features(base.decoder, base.params, bucket.tokens_FT, bucket.length_F)
    select = jax.jit(router.select, static_argnums=2)

    def runners(name, num_experts):
        config = Config(memory=MemoryConfig(num_experts), router=RouterConfig(lookup=name, calibration=256))
        routing = model.make_router(config, base, questions)
        ids_S = np.sort(np.random.default_rng(0).choice(num_experts, min(TRAINED, num_experts), replace=False))
        rows_SR = bank.init(np.uint32(0), bank.row_shape(config.backbone, config.memory), len(ids_S))
        tuned = memory.Memory(routing, sharding.put(ids_S.astype(np.int32)), rows_SR, base.fingerprint)
        adapt = memory.adapt_with(base, tuned, config)

        def ask():
            recall.answers(base, adapt, questions, LONGEST)

        def route():
            jax.block_until_ready(select(routing, feature_BD, config.memory.selected))

        return ask, route

    cases = [(name, n) for name in LOOKUPS for n in sizes if name != "product" or math.isqrt(n) ** 2 == n]
    contenders = {case: runners(*case) for case in cases}
    seconds = {case: ([], []) for case in cases}
    for turn in range(TURNS + 1):
        for case, pair in contenders.items():
            for kept, run in zip(seconds[case], pair, strict=True):
                started = time.perf_counter()
                run()
                if turn:  # the first turns compile
                    kept.append(time.perf_counter() - started)
        progress.update()
    results = []
    for (name, num_experts), (asking, routing) in seconds.items():
        total, part = statistics.median(asking), statistics.median(routing)
        figures = {"questions_per_second": BATCH / total, "seconds": total, "routing_share": part / total}
        results.append({"lookup": name, "num_experts": num_experts, "batch": BATCH, **figures})
    return results


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
