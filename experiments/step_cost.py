"""What a tuning step costs as experts are added: seconds per step at N = 2^20 over N = 2^14.

    python -m experiments.step_cost --workdir=runs/step_cost

Both memories take steps in turn on the same facts, which have the same experts in both. Takes 10 seconds on 2 x86-64
cores (jax 0.10.2).
"""

import dataclasses
import statistics

from experiments.shared import study
from experiments.shared.step_timing import TURNS, TimedStep, take_turns, with_own_experts
from lamini_jax.backbone import frozen_model
from lamini_jax.config import DataConfig
from lamini_jax.data import batches, datasets
from lamini_jax.runtime import processes

NUM_EXPERTS = (2**14, 2**20)


def table(results: dict) -> str:
    """The results as text."""
    lines = [
        f"N = {int(num_experts):>9,}: {1e3 * seconds:.1f} ms per step of {results['facts']} facts"
        for num_experts, seconds in results["seconds_per_step"].items()
    ]
    return "\n".join([*lines, f"ratio {results['ratio']:.3f}"])


def main(arguments: study.Arguments) -> None:
    config = arguments.config
    model = frozen_model.load(config)
    directory = study.open_study(arguments.workdir, config, backbone=model.fingerprint)
    data = DataConfig("phone_book", config.tuning.batch_size)
    facts = datasets.load(data, "true", config.seed, model.tokenizer, model.max_seq_len)
    steps = {}
    for num_experts in NUM_EXPERTS:
        memory = dataclasses.replace(config.memory, num_experts=num_experts)
        padding = batches.Padding(model.max_seq_len // 2)
        method = with_own_experts(dataclasses.replace(config, memory=memory), model, facts, padding)
        steps[str(num_experts)] = TimedStep(method)
    with processes.progress_bar(total=len(steps) * (TURNS + 1), unit="step") as bar:
        seconds = take_turns(steps, bar)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    few, many = medians.values()
    results = {"facts": len(facts), "seconds_per_step": medians, "ratio": many / few}
    study.finish(directory, results | {"seconds": sum(map(sum, seconds.values()))}, table)


if __name__ == "__main__":
    study.start(main)
