"""What a tuning step costs as experts are added: seconds per step at N = 2^20 over N = 2^14.

    python -m experiments.step_cost --workdir=runs/step_cost

Both banks are in memory and take steps in turn on the same facts, so that a noisy machine slows both. A minute on 2
x86-64 cores (jax 0.10.2): 217 ms per step of 16 facts of 128 tokens for both, ratio 0.997.
"""

import statistics
import time

import jax
import numpy as np
from absl import flags

from lamini_jax import bank, command, model, processes, row_optimizer, tuning
from lamini_jax.data import batches
from lamini_jax.data import facts as facts_lib

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results.json goes.", required=True)

NUM_EXPERTS = (2**14, 2**20)
STEPS = 40


def main() -> None:
    config = model.configure(_CONFIG.value)
    directory = command.open_workdir(_WORKDIR.value, {"steps": STEPS})
    base = model.load_base(config)
    facts = facts_lib.load("world", "random", config.tuning.batch_size, config.seed, "")
    examples = batches.encode(facts, base.tokenizer, multiple=config.backbone.context // 2)
    shape = bank.row_shape(config.backbone, config.memory)
    tx = row_optimizer.make(config.tuning.optimizer, config.tuning.learning_rate)
    touched = len(facts) * config.memory.selected
    method = tuning.memory_method(base.decoder, shape, config.memory.target, tx, touched)
    rng = np.random.default_rng(config.seed)
    states, buckets, seconds = {}, {}, {num_experts: [] for num_experts in NUM_EXPERTS}
    for num_experts in NUM_EXPERTS:
        ids_FK = np.stack([rng.choice(num_experts, config.memory.selected, replace=False) for _ in facts])
        expert_ids_S, slots_FK = row_optimizer.slots_of(ids_FK, num_experts)
        rows_NR = bank.init(np.uint32(config.seed), shape, num_experts)
        states[num_experts] = tuning.MemoryState(rows_NR, row_optimizer.init(tx, expert_ids_S, shape))
        (buckets[num_experts],) = tuning.memory_buckets(base, examples, ids_FK, slots_FK)
    del rows_NR
    rows_B = np.arange(len(facts), dtype=np.int32)
    for step in processes.bar(range(STEPS + 2), unit="step"):
        for num_experts in NUM_EXPERTS:
            started = time.perf_counter()
            state, losses = method.step(base.params, states[num_experts], buckets[num_experts], rows_B)
            states[num_experts] = state
            jax.block_until_ready((state, losses))
            if step >= 2:  # the first steps compile
                seconds[num_experts].append(time.perf_counter() - started)
    medians = {str(num_experts): statistics.median(times) for num_experts, times in seconds.items()}
    small, large = medians.values()
    results = {"seconds_per_step": medians, "ratio": large / small, "environment": command.environment()}
    command.write_json(directory / "results.json", results)
    for num_experts, median in medians.items():
        print(f"N = {int(num_experts):>9,}: {1e3 * median:.1f} ms per step of {len(facts)} facts")
    print(f"ratio {results['ratio']:.3f}")


if __name__ == "__main__":
    command.run(main)
