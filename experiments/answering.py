"""Answering as `lamini_jax.ask` does it: questions per second as N grows, and what part of their time is routing."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax import bank, model, recall, router, runs
from lamini_jax.config import Config, MemoryConfig, RouterConfig
from lamini_jax.data import batches, world

TRAINED = 2**13  # rows that a memory of 256 facts holds
BATCH = 64
LONGEST = 32  # tokens of an answer
TURNS = 7


def rows(sizes: list[int], progress) -> list[dict]:
    """One row per N, measured in turns. The experts add nothing, so that all give the same answers."""
    kinds = list(world.KINDS)
    pool = [qa.question for kind in kinds for qa in world.held_out(kind, BATCH, 0)]
    configs = {n: Config(memory=MemoryConfig(n), router=RouterConfig(calibration=256)) for n in sizes}
    base = model.load_base(Config())
    longest = max(batches.prompts(pool, base.tokenizer), key=lambda bucket: len(bucket.index_F))
    questions = [pool[i] for i in longest.index_F[:BATCH]]  # one batch of one shape
    asked, routed = {}, {}
    for num_experts, config in configs.items():
        routing = model.make_router(config, base, questions)
        ids_S = np.sort(np.random.default_rng(0).choice(num_experts, min(TRAINED, num_experts), replace=False))
        rows_SR = bank.init(jax.random.key(0), bank.row_shape(config.backbone, config.memory), len(ids_S))
        speak = runs.answer_with(base, runs.Memory(routing, jnp.asarray(ids_S, jnp.int32), rows_SR), config)
        select = jax.jit(router.select, static_argnums=2)
        (bucket,) = batches.prompts(questions, base.tokenizer)
        feature_BD = model.features(base.decoder, base.params, bucket.tokens_FT, bucket.length_F)
        asked[num_experts] = lambda speak=speak: recall.answers(base, speak, questions, LONGEST)
        routed[num_experts] = lambda routing=routing, feature_BD=feature_BD, config=config, select=select: (
            jax.block_until_ready(select(routing, feature_BD, config.memory.selected))
        )
    seconds = {n: ([], []) for n in sizes}
    for turn in range(TURNS + 1):
        for num_experts in sizes:
            for kept, run in zip(seconds[num_experts], (asked[num_experts], routed[num_experts]), strict=True):
                started = time.perf_counter()
                run()
                if turn:  # the first turns compile
                    kept.append(time.perf_counter() - started)
            progress.update()
    results = []
    for num_experts, (asking, routing) in seconds.items():
        total, part = statistics.median(asking), statistics.median(routing)
        figures = {"questions_per_second": BATCH / total, "seconds": total, "routing_share": part / total}
        results.append({"num_experts": num_experts, "batch": BATCH, **figures})
    return results


def table(results: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'answering':<15}{'experts':>11}{'batch':>7}{'questions/s':>13}{'ms':>10}{'of it routing':>15}"]
    for row in results:
        lines.append(
            f"{'ask':<15}{row['num_experts']:>11,}{row['batch']:>7,}{row['questions_per_second']:>13,.0f}"
            f"{1e3 * row['seconds']:>10.2f}{100 * row['routing_share']:>14.1f}%"
        )
    slower = results[-1]["seconds"] / results[0]["seconds"]
    lines.append(
        f"N = {results[-1]['num_experts']:,} takes {slower:.2f} times as long as N = {results[0]['num_experts']:,}"
    )
    return "\n".join(lines)
