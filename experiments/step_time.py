r"""Where the time of a tuning step goes, and what a step costs as experts are added.

    python -m experiments.step_time --workdir=runs/step_time
    python -m experiments.step_time --workdir=runs/step_time_8b --config=experiments/configs/llama3_8b_one.py \
        --steps=memory_all,memory_answer
    python -m experiments.step_time --workdir=runs/step_time_8b --config=experiments/configs/llama3_8b.py \
        --config.memory.num_experts=262144 --config.execution.mesh.model=1 --random_weights \
        --steps=memory_all,memory_answer

Memory tuning with memory at all positions and on answers alone, LoRA and full fine-tuning take steps in turn on the
same phone book entries, and so does memory tuning with the config's number of experts; facts have the same experts
with any number. GFLOP/s (counted by hand, `shared/flops.py`) stand beside those of a plain matrix product, and bytes
(the compiler's count, which knows no caches) beside those of a plain copy, measured in the same run. A profile then
says how long each named scope takes. With --random_weights nothing is loaded: a step takes as long as with real ones.

Takes 40 seconds on 2 x86-64 cores (jax 0.10.2).
"""

import dataclasses
import statistics
from pathlib import Path

import jax
from absl import flags

from experiments.shared import flops, plotting, profiles, study
from experiments.shared.step_timing import FEW_EXPERTS, TURNS, TimedStep, one_length, take_turns, with_own_experts
from lamini_jax import Fact, UserError
from lamini_jax.backbone import frozen_model, transformer
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.backbone.tokenizer import ByteTokenizer
from lamini_jax.config import Config, DataConfig
from lamini_jax.data import datasets
from lamini_jax.runtime import processes, sharding
from lamini_jax.training import FullMethod, LoraMethod, TrainMethod

STEPS = "memory_all", "memory_answer", "lora", "full"
MANY = "memory_answer_many"  # with the config's number of experts


def define_flags() -> None:
    flags.DEFINE_list("steps", list(STEPS), "Which steps to take; large models have no room for all at once.")
    flags.DEFINE_integer("batch", 64, "Facts of a step.", lower_bound=1)
    flags.DEFINE_bool("random_weights", False, "A backbone of the config's shape with random weights, and bytes.")


def random_model(config: Config) -> FrozenModel:
    """A backbone of this shape with random weights, each made where it is kept."""
    decoder = transformer.Decoder(config.backbone, config.memory.num_layers, config.execution.remat)

    @jax.jit
    def init():
        params = transformer.init(decoder, jax.random.key(config.seed))
        axes = transformer.axes(config.backbone, params)
        return jax.tree.map(lambda leaf, names: sharding.constrain(leaf, *names), params, axes)

    return FrozenModel(init(), decoder, ByteTokenizer())


def create(name: str, config: Config, model: FrozenModel, facts: list[Fact]) -> TrainMethod:
    """The method that takes the steps of this name."""
    padding = one_length(model, facts)
    if name in ("lora", "full"):
        return (LoraMethod if name == "lora" else FullMethod).create(config, model, facts, padding)
    experts = config.memory.num_experts if name == MANY else min(FEW_EXPERTS, config.memory.num_experts)
    positions = "all" if name == "memory_all" else "answer"
    memory = dataclasses.replace(config.memory, positions=positions, num_experts=experts)
    return with_own_experts(dataclasses.replace(config, memory=memory), model, facts, padding)


def described(name: str, config: Config, step: TimedStep, facts: int, seconds: float) -> dict:
    """What is reported of a step that takes these seconds."""
    method = name if name in ("lora", "full") else "mome"
    positions = "all" if name == "memory_all" else "answer"
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, positions=positions))
    counted = facts * flops.per_fact(config, method, step.tokens, step.answer_tokens, remat=config.execution.remat)
    moved = step.compiled.cost_analysis().get("bytes accessed", 0.0)
    step.launch_singly()
    return {
        "milliseconds": 1e3 * seconds,
        "facts_per_second": facts / seconds,
        "gflops": counted / seconds / 1e9,
        "gbs": moved / seconds / 1e9,
        "scopes": profiles.milliseconds_by_scope(step.compiled, step.take),
    }


def _ratio(seconds: dict[str, list[float]]) -> float:
    few, many = seconds["memory_answer"], seconds[MANY]
    return statistics.median(b / a for a, b in zip(few, many, strict=True))


def table(results: dict) -> str:
    """The results as text."""
    steps = results["steps"]
    lines = [
        f"{results['facts']} facts of {results['tokens']} tokens, {results['answer_tokens']} of them in the answer; "
        f"a product {results['product_gflops']:.0f} GFLOP/s, a copy {results['copy_gbs']:.1f} GB/s",
        f"{'step':<16}{'ms':>9}{'facts/s':>10}{'GFLOP/s':>10}{'of product':>12}{'GB/s':>8}",
    ]
    for name, row in steps.items():
        lines.append(
            f"{name:<16}{row['milliseconds']:>9.1f}{row['facts_per_second']:>10.0f}{row['gflops']:>10.1f}"
            f"{row['share_of_product']:>12.2f}{row['gbs']:>8.1f}"
        )
    scopes = list(dict.fromkeys(scope for row in steps.values() for scope in row["scopes"]))
    lines.append(f"\n{'ms in':<22}" + "".join(f"{name:>16}" for name in steps))
    for scope in scopes:
        lines.append(f"{scope:<22}" + "".join(f"{row['scopes'].get(scope, 0):>16.2f}" for row in steps.values()))
    if results["ratio"] is not None:
        few, many = results["num_experts"]
        lines.append(f"\na step with {many:,} experts takes {results['ratio']:.3f} times as long as with {few:,}")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """A bar for each step, divided by named scope."""
    steps = results["steps"]
    figure, axis = plotting.plt.subplots(figsize=(10, 1.5 + 0.6 * len(steps)), layout="constrained")
    colours = dict(zip((*profiles.SCOPES, profiles.OTHER), plotting.plt.get_cmap("tab10").colors, strict=False))
    labelled = set()
    for place, row in enumerate(steps.values()):
        left = 0.0
        for scope, milliseconds in row["scopes"].items():
            style = {"hatch": "//", "alpha": 0.7} if scope.endswith("backward") else {}
            label = None if scope in labelled else scope
            axis.barh(place, milliseconds, left=left, color=colours[scope.partition(",")[0]], label=label, **style)
            labelled.add(scope)
            left += milliseconds
    axis.set_yticks(range(len(steps)), steps)
    axis.invert_yaxis()
    axis.set_xlabel(f"milliseconds of operations in a step of {results['facts']} facts")
    axis.legend(fontsize="small", ncols=2)
    plotting.save(figure, path)


def main(arguments: study.Arguments) -> None:
    config, asked = arguments.config, arguments.flags
    unknown = [name for name in asked.steps if name not in STEPS]
    if unknown or not asked.steps:
        raise UserError(f"--steps={','.join(asked.steps)}: must be some of {', '.join(STEPS)}")
    model = random_model(config) if asked.random_weights else frozen_model.load(config)
    how = {"batch": asked.batch, "steps": sorted(asked.steps), "random_weights": asked.random_weights}
    directory = study.open_study(arguments.workdir, config, model, **how)
    data = DataConfig("phone_book", asked.batch)
    facts = datasets.load(data, "true", config.seed, model.tokenizer, model.max_seq_len)
    names = [*asked.steps, *([MANY] if "memory_answer" in asked.steps else [])]
    steps = {name: TimedStep(create(name, config, model, facts)) for name in names}
    pair = {name: steps[name] for name in names if name in ("memory_answer", MANY)}
    with processes.progress_bar(total=(len(asked.steps) + len(pair)) * (TURNS + 1), unit="step") as bar:
        seconds = take_turns({name: steps[name] for name in asked.steps}, bar)
        # Apart: after a step of another method, the one that is taken first would be slower.
        compared = take_turns(pair, bar)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    told = {name: described(name, config, steps[name], len(facts), medians[name]) for name in asked.steps}
    product = profiles.product_rate(config.backbone.dtype)
    some = next(iter(steps.values()))
    results = {
        "facts": len(facts),
        "tokens": some.tokens,
        "answer_tokens": some.answer_tokens,
        "product_gflops": product,
        "copy_gbs": profiles.copy_rate(),
        "num_experts": [min(FEW_EXPERTS, config.memory.num_experts), config.memory.num_experts],
        "ratio": _ratio(compared) if pair else None,
        "steps": {name: row | {"share_of_product": row["gflops"] / product} for name, row in told.items()},
        "seconds": sum(map(sum, [*seconds.values(), *compared.values()])),
    }
    study.finish(directory, results, table, draw=draw)


if __name__ == "__main__":
    study.start(main, define_flags)
