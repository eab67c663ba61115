"""Sections 1 and 6: what it costs to remove hallucination, by training a whole model or fact by fact.

    python -m experiments.compute_requirements --workdir=runs/compute_requirements
    python -m experiments.compute_requirements --workdir=runs/mine --parameters=8e9 --tokens=15e12 --epochs=1

There are three parts. First, the paper's numbers next to the same arithmetic done here. Second, a calculator: FLOPs,
days, accelerators, power, price and carbon of any training run (the flags; by default the paper's). Third, the cost of
one fact in one step: full fine-tuning, LoRA and memory experts take steps in turn on the same phone book entries, with
the FLOPs counted by hand (`shared/flops.py`) and by the compiler, and the same count for Llama 3 8B. The compiler
counts the layers of a scan once, so it is compared with the count for one layer of the prefix.

Takes 15 seconds on 2 x86-64 cores (jax 0.10.2). Expect two of the paper's six numbers to be reproduced (power bill,
carbon), two in part (days, megawatts) and two not (FLOPs, 1B facts); per fact and step 1.5 ms for full fine-tuning,
1.8 for LoRA and 0.5 for memory experts, 1.02 times as long with 2^20 experts as with 2^14.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import tqdm
from absl import flags

from experiments import compute_requirements_arithmetic as arithmetic
from experiments.compute_requirements_arithmetic import Comparison, Plan, number
from experiments.shared import flops, plotting, study
from experiments.shared.claims import Claim
from experiments.shared.step_timing import FEW_EXPERTS, TURNS, TimedStep, one_length, take_turns, with_own_experts
from lamini_jax import Fact, UserError
from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import LLAMA3_8B, Config, DataConfig, large
from lamini_jax.data import datasets
from lamini_jax.runtime import processes
from lamini_jax.training import FullMethod, LoraMethod

METHODS = ("full", "lora", "mome")
LARGE_FACT = 128, 48  # tokens of a fact with Llama 3 8B, and of its answer
BILLION = 1e9


def define_flags() -> None:
    for field in dataclasses.fields(Plan):
        flags.DEFINE_float(field.name, None, f"{field.metadata['help']} Default: the paper's.")


def plan(given: Mapping[str, float | None]) -> Plan:
    """The paper's plan, with the given values instead of its own. Raises UserError for one that is not positive."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not 0 < value < math.inf or (name == "mfu" and value > 1):
            raise UserError(f"--{name}={value:g}: must be positive{' and at most 1' if name == 'mfu' else ''}")
    if "parameters" in given:
        given.setdefault("tokens", arithmetic.CHINCHILLA * given["parameters"])
    return Plan(**given)


def timed_steps(config: Config, model: FrozenModel, facts: list[Fact]) -> dict[str, TimedStep]:
    """The step of each method, and that of memory tuning with few experts, on facts of one length."""
    padding = one_length(model, facts)
    few = dataclasses.replace(config, memory=dataclasses.replace(config.memory, num_experts=FEW_EXPERTS))
    methods = {
        "full": FullMethod.create(config, model, facts, padding),
        "lora": LoraMethod.create(config, model, facts, padding),
        "mome": with_own_experts(config, model, facts, padding),
        "few": with_own_experts(few, model, facts, padding),
    }
    return {name: TimedStep(method) for name, method in methods.items()}


def measured(config: Config, model: FrozenModel, bar: tqdm.tqdm) -> dict:
    """Seconds and FLOPs of a step, per fact, of each method."""
    data = DataConfig("phone_book", config.tuning.batch_size)
    facts = datasets.load(data, "true", config.seed, model.tokenizer, model.max_seq_len)
    steps = timed_steps(config, model, facts)
    seconds = take_turns(steps, bar)
    tokens, answer = steps["lora"].tokens, steps["lora"].answer_tokens
    one_prefix_layer = 1, config.memory.num_layers
    by_compiler = {name: step.compiled.cost_analysis()["flops"] / len(facts) for name, step in steps.items()}
    return {
        "facts": len(facts),
        "tokens": tokens,
        "answer_tokens": answer,
        "num_experts": config.memory.num_experts,
        "few_experts": FEW_EXPERTS,
        "methods": {
            method: {
                "seconds": statistics.median(seconds[method]) / len(facts),
                "flops": flops.per_fact(config, method, tokens, answer),
                "flops_of_one_prefix_layer": flops.per_fact(config, method, tokens, answer, one_prefix_layer),
                "flops_by_compiler": by_compiler[method],
                "trained_parameters": flops.trained_parameters(config, method),
            }
            for method in METHODS
        },
        "flops_once": flops.before_first_step(config, tokens),
        "seconds_over_few": statistics.median(a / b for a, b in zip(seconds["mome"], seconds["few"], strict=True)),
        "flops_over_few": by_compiler["mome"] / by_compiler["few"],
    }


def beside_llama(given: Plan) -> dict[str, dict[str, float]]:
    """What a fact costs with Llama 3 8B and the plan's epochs and accelerators, and what a billion facts cost."""
    config = large(LLAMA3_8B, 2**20)
    tokens, answer = LARGE_FACT
    result = {}
    for method in METHODS:
        total = given.epochs * flops.per_fact(config, method, tokens, answer)
        total += flops.before_first_step(config, tokens) if method == "mome" else 0
        seconds = total / (given.peak_flops * given.mfu)
        result[method] = {
            "flops": total,
            "accelerator_seconds": seconds,
            "dollars": seconds / 3600 * given.watts / 1000 * given.dollars_per_kwh,
            "accelerator_days_of_a_billion": BILLION * seconds / arithmetic.DAY,
            "trained_parameters": flops.trained_parameters(config, method),
        }
    return result


def claims(results: dict) -> list[Claim]:
    """The paper's claims, with what was measured."""
    steps = results["steps"]
    methods, flops_ratio, seconds_ratio = steps["methods"], steps["flops_over_few"], steps["seconds_over_few"]
    costs = (
        f"{name} {1e3 * row['seconds']:.1f} ms and {row['flops'] / 1e6:.0f} MFLOP" for name, row in methods.items()
    )
    more = steps["num_experts"] > steps["few_experts"]
    return [
        *(arithmetic.claim(Comparison(**one)) for one in results["paper"]),
        Claim(
            "The cost of memorizing a fact does not grow with the parameters of the memory (section 7.1)",
            f"A step with {steps['num_experts']:,} experts takes {flops_ratio:.3f} times the FLOPs and "
            f"{seconds_ratio:.2f} times the time of one with {steps['few_experts']:,}; what grows is the lookup, once "
            f"per fact ({steps['flops_once'] / 1e6:.0f} MFLOP with reading the question)",
            {
                "more experts, at most 1.01 times the FLOPs": flops_ratio <= 1.01 and more,
                "more experts, at most 1.1 times the time": seconds_ratio <= 1.1 and more,
            },
        ),
        Claim(
            "A step of memory tuning is cheaper than one of LoRA (section 7)",
            f"Per fact and step {', '.join(costs)}: what the frozen first layers make of a fact is kept",
            {
                "less time": methods["mome"]["seconds"] < methods["lora"]["seconds"],
                "fewer FLOPs": methods["mome"]["flops"] < methods["lora"]["flops"],
            },
        ),
    ]


def table(results: dict) -> str:
    """The results as text."""
    lines = [f"{'number of the paper':<58}{'paper':>12}{'ours':>12}{'ratio':>8}"]
    for one in map(lambda one: Comparison(**one), results["paper"]):
        lines.append(
            f"{one.quantity:<58}{number(one.paper):>12}{number(one.ours):>12}{one.ours / one.paper:>8.3g}  "
            f"{arithmetic.claim(one).verdict}"
        )
        lines += [f"    {one.reason}"] if arithmetic.factor(one) > arithmetic.CLOSE else []
    need = results["requirements"]
    lines.append(
        f"\nthe plan: {need['flops']:.3g} FLOPs, {need['days']:,.3g} days ({need['accelerators_for_days']:,} "
        f"accelerators for {results['plan']['days']:g} days), {need['megawatts']:,.3g} MW, "
        f"{need['gigawatt_hours']:,.3g} GWh, ${need['dollars']:,.0f}, {need['tonnes_of_co2']:,.0f} t of CO2, "
        f"as {need['homes']:,.0f} homes in a year"
    )
    steps = results["steps"]
    lines.append(
        f"\n{'a step, per fact':<18}{'ms':>9}{'MFLOP':>10}{'one prefix layer':>18}{'compiler':>10}{'trained':>12}"
        f"   {'Llama 3 8B: TFLOP':>20}{'s':>10}{'$':>12}{'trained':>16}"
    )
    for name, row in steps["methods"].items():
        llama = results["llama3_8b"][name]
        lines.append(
            f"{name:<18}{1e3 * row['seconds']:>9.2f}{row['flops'] / 1e6:>10.1f}"
            f"{row['flops_of_one_prefix_layer'] / 1e6:>18.1f}{row['flops_by_compiler'] / 1e6:>10.1f}"
            f"{row['trained_parameters']:>12,}   {llama['flops'] / 1e12:>20.1f}{llama['accelerator_seconds']:>10.3f}"
            f"{llama['dollars']:>12.2g}{llama['trained_parameters']:>16,}"
        )
    lines.append(
        f"{steps['facts']} facts of {steps['tokens']} tokens a step here; Llama 3 8B: {results['plan']['epochs']:g} "
        f"epochs of {LARGE_FACT[0]} tokens. Memory experts: {steps['flops_once'] / 1e6:.0f} MFLOP once per fact; "
        f"{steps['num_experts']:,} experts over {steps['few_experts']:,}: {steps['seconds_over_few']:.2f} times "
        f"the time, {steps['flops_over_few']:.3f} times the FLOPs"
    )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """The paper's numbers against ours; then what a fact costs in a step, here and with Llama 3 8B."""
    figure, axes = plotting.plt.subplots(1, 3, figsize=(17, 5), width_ratios=(2, 1, 1), layout="constrained")
    compared = [Comparison(**one) for one in results["paper"]]
    places = range(len(compared))
    for most, colour in ((arithmetic.NEAR, "tab:orange"), (arithmetic.CLOSE, "tab:green")):
        axes[0].axvspan(1 / most, most, color=colour, alpha=0.3, label=f"within a factor of {most}")
    for place, one in zip(places, compared, strict=True):
        ratio = one.ours / one.paper
        axes[0].plot([1, ratio], [place, place], "o-", color="tab:blue", markevery=[1], markersize=9)
        axes[0].annotate(f"{ratio:.3g}", (ratio, place), (8, 6), textcoords="offset points")
    axes[0].axvline(1, color="black", linewidth=1)
    axes[0].set_yticks(places, [one.quantity.partition(" (")[0] for one in compared])
    axes[0].set(title="the paper's numbers: ours over theirs", xscale="log")
    axes[0].margins(x=0.25)
    axes[0].invert_yaxis()
    axes[0].legend(loc="lower right", fontsize="small")
    steps, llama = results["steps"]["methods"], results["llama3_8b"]
    names = list(steps)
    for axis, values, title in (
        (axes[1], [1e3 * steps[name]["seconds"] for name in names], "ms per fact and step, measured"),
        (axes[2], [llama[name]["flops"] / 1e12 for name in names], "TFLOP per fact, Llama 3 8B"),
    ):
        bars = axis.bar(names, values, color="tab:blue")
        axis.bar_label(bars, [f"{value:,.3g}" for value in values])
        axis.set(title=title)
        axis.margins(y=0.1)
    plotting.save(figure, path)


def main(arguments: study.Arguments) -> None:
    config, given = arguments.config, plan(vars(arguments.flags))
    batch, among = config.tuning.batch_size, min(FEW_EXPERTS, config.memory.num_experts)
    if batch * config.memory.top_k > among:
        raise UserError(f"--config.tuning.batch_size={batch}: too many facts for {among} experts")
    model = frozen_model.load(config)
    directory = study.open_study(arguments.workdir, config, model, plan=dataclasses.asdict(given))
    started = time.time()
    with processes.progress_bar(total=(TURNS + 1) * (len(METHODS) + 1), unit="step") as bar:
        steps = measured(config, model, bar)
    results = {
        "paper": [comparison._asdict() for comparison in arithmetic.comparisons()],
        "plan": dataclasses.asdict(given),
        "requirements": arithmetic.requirements(given),
        "steps": steps,
        "llama3_8b": beside_llama(given),
        "seconds": round(time.time() - started, 1),
    }
    study.finish(directory, results, table, claims, draw)


if __name__ == "__main__":
    study.start(main, define_flags)
