"""Sections 1 and 6: what it costs to banish hallucination, by training all of a model and fact by fact.

    python -m experiments.compute_requirements --workdir=runs/compute_requirements
    python -m experiments.compute_requirements --workdir=runs/mine --parameters=8e9 --tokens=15e12 --epochs=1

Three parts. The paper's numbers beside the same arithmetic done here. A calculator: FLOPs, days, accelerators, power,
price and carbon of any training run (the flags; by default the paper's). And what one fact costs in one step: full
fine-tuning, LoRA and memory experts take steps in turn on the same phone book entries, with the FLOPs counted by hand
(`arithmetic.py`) and by the compiler, and the same count for Llama 3 8B. The compiler counts the layers of a scan once,
so it is compared with the count for one layer of each part.

Takes 20 seconds on 2 x86-64 cores (jax 0.10.2). Expect of the paper's six numbers two to reproduce (power bill,
carbon), two in part (days, megawatts) and two not (FLOPs, 1B facts); per fact and step 7.4 ms for full fine-tuning,
5.2 for LoRA and 2.4 for memory experts, 1.03 times as long with 2^20 experts as with 2^14.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags

from experiments.parts import arithmetic, figures, study
from experiments.parts.arithmetic import Plan, number
from experiments.parts.claims import claim
from lamini_jax import backbone, bank, command, model, processes, row_optimizer, sharding, tuning
from lamini_jax.config import LLAMA3_8B, Config, large
from lamini_jax.data import batches
from lamini_jax.data import facts as facts_lib
from lamini_jax.errors import UserError

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results.json goes.", required=True)
_PLAN = {
    "parameters": "Parameters of the model.",
    "tokens": "Tokens of an epoch; 20 per parameter unless given.",
    "epochs": "Epochs.",
    "accelerators": "Accelerators.",
    "peak_flops": "FLOP/s of each at best.",
    "mfu": "The share of that which training reaches.",
    "watts": "Watts of each, with what it takes to run it.",
    "dollars_per_kwh": "Price of electricity.",
    "days": "Days to be done in, for the number of accelerators that it takes.",
}
_GIVEN = {name: flags.DEFINE_float(name, None, f"{text} Default: the paper's.") for name, text in _PLAN.items()}

METHODS = ("full", "lora", "mome")
FEW_EXPERTS = 2**14
TURNS = 15
LARGE_FACT = 128, 48  # tokens of a fact beside Llama 3 8B, and of its answer
BILLION = 1e9


def plan(given: Mapping[str, float | None]) -> Plan:
    """The paper's plan with what is given instead. Raises UserError, with the flag, for what is not positive."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not 0 < value < math.inf or (name == "mfu" and value > 1):
            raise UserError(f"--{name}={value:g}: must be positive{' and at most 1' if name == 'mfu' else ''}")
    if "parameters" in given:
        given.setdefault("tokens", arithmetic.CHINCHILLA * given["parameters"])
    return Plan(**given)


def full_step(decoder: backbone.Decoder, tx: optax.GradientTransformation):
    """A step of full fine-tuning, shaped as `tuning.Method.step` is: what it trains are all parameters."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(_, trained, bucket: tuning.Bucket, rows_B):
        params, state = trained
        batch = bucket.take(rows_B)

        def mean_loss(params):
            hidden_BTD, _ = backbone.prefix(decoder, params, batch.inputs)
            losses_BA, _ = model.token_losses(decoder, params, hidden_BTD, batch.start_F, batch.targets_FA, None)
            mask_BA = jnp.arange(losses_BA.shape[1])[None] < batch.length_F[:, None]
            return jnp.sum(losses_BA * mask_BA) / jnp.sum(mask_BA)

        loss, gradients = jax.value_and_grad(mean_loss)(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return step


class Stepper:
    """A way to memorize, made for one batch, with the seconds that its steps took."""

    def __init__(self, step: Callable, params: Any, state: Any, bucket: tuning.Bucket):
        self.batch = bucket, np.arange(bucket.start_F.shape[0], dtype=np.int32)
        self.lowered = step.lower(params, state, *self.batch)
        self.params, self.state, self.seconds = params, state, []

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        return self.lowered.compile()

    def take(self) -> None:
        started = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.compiled(self.params, self.state, *self.batch))
        self.seconds.append(time.perf_counter() - started)


def steppers(config: Config, base: model.Base, examples) -> dict[str, Stepper]:
    """Each method's, and that of memory experts among few."""
    (bucket,) = tuning.lora_buckets(examples)
    tx = row_optimizer.make(config.lora.optimizer, config.lora.learning_rate)
    params = jax.tree.map(jnp.copy, base.params)  # which the steps consume
    state = tuning.lora_state(base.decoder, config.lora.rank, tx, np.uint32(config.seed))
    return {
        "full": Stepper(full_step(base.decoder, tx), None, (params, tx.init(params)), bucket),
        "lora": Stepper(tuning.lora_method(base.decoder, tx).step, base.params, state, bucket),
        "mome": memory_stepper(config, base, examples, config.memory.num_experts),
        "few": memory_stepper(config, base, examples, FEW_EXPERTS),
    }


def memory_stepper(config: Config, base: model.Base, examples, num_experts: int) -> Stepper:
    """Memory tuning where each fact has experts of its own, the same ones for any N: a step has as many to update."""
    memory = config.memory
    count = len(examples[0].index_F) * memory.selected
    shape = bank.row_shape(config.backbone, memory)
    tx = row_optimizer.make(config.tuning.optimizer, config.tuning.learning_rate)
    picked = np.random.default_rng(config.seed).permutation(min(FEW_EXPERTS, memory.num_experts))[:count]
    ids_FK = picked.astype(np.int32).reshape(-1, memory.selected)
    ids_S, slots_FK = row_optimizer.slots_of(ids_FK, num_experts)
    (bucket,) = tuning.memory_buckets(base, examples, ids_FK, slots_FK)
    rows_NR = bank.init(np.uint32(config.seed), shape, num_experts, memory.dtype)
    state = tuning.MemoryState(rows_NR, row_optimizer.init(tx, ids_S, shape))
    return Stepper(tuning.memory_method(base.decoder, shape, memory.target, tx, count).step, base.params, state, bucket)


def measured(config: Config, progress: tqdm.tqdm) -> dict:
    """Seconds and FLOPs of a step, per fact, of each method."""
    base = model.load_base(config)
    facts = facts_lib.load("phone_book", "true", config.tuning.batch_size, config.seed, "")
    examples = batches.encode(facts, base.tokenizer, multiple=config.backbone.context // 4)  # one bucket
    tokens, answer = examples[0].tokens_FT.shape[1], examples[0].targets_FA.shape[1]
    found = steppers(config, base, examples)
    for _ in range(TURNS + 1):  # the first turn compiles
        for name, stepper in found.items():
            progress.set_postfix_str(name)
            stepper.take()
            progress.update()
    rows = {}
    for name, stepper in found.items():
        method = "mome" if name == "few" else name
        rows[name] = {
            "seconds": statistics.median(stepper.seconds[1:]) / len(facts),
            "flops": arithmetic.flops_per_fact(config, method, tokens, answer),
            "flops_of_one_layer_each": arithmetic.flops_per_fact(config, method, tokens, answer, (1, 1)),
            "flops_by_compiler": stepper.compiled.cost_analysis()["flops"] / len(facts),
            "trained_parameters": arithmetic.trained_parameters(config, method),
        }
    few = rows.pop("few")
    # Turn by turn, so that a machine that is busy for a while slows both.
    ratios = [a / b for a, b in zip(found["mome"].seconds[1:], found["few"].seconds[1:], strict=True)]
    return {
        "facts": len(facts),
        "tokens": tokens,
        "answer_tokens": answer,
        "num_experts": config.memory.num_experts,
        "few_experts": FEW_EXPERTS,
        "methods": rows,
        "flops_once": arithmetic.flops_once(config, tokens),
        "seconds_over_few": statistics.median(ratios),
        "flops_over_few": rows["mome"]["flops_by_compiler"] / few["flops_by_compiler"],
    }


def beside_llama(given: Plan) -> dict[str, dict[str, float]]:
    """What a fact costs beside Llama 3 8B with the plan's epochs and accelerators, and what a billion facts do."""
    config = large(LLAMA3_8B, 2**20)
    tokens, answer = LARGE_FACT
    result = {}
    for method in METHODS:
        flops = given.epochs * arithmetic.flops_per_fact(config, method, tokens, answer)
        flops += arithmetic.flops_once(config, tokens) if method == "mome" else 0
        seconds = flops / (given.peak_flops * given.mfu)
        result[method] = {
            "flops": flops,
            "accelerator_seconds": seconds,
            "dollars": seconds / 3600 * given.watts / 1000 * given.dollars_per_kwh,
            "accelerator_days_of_a_billion": BILLION * seconds / arithmetic.DAY,
            "trained_parameters": arithmetic.trained_parameters(config, method),
        }
    return result


def claims(compared: list[dict], steps: dict) -> list[dict[str, str]]:
    """What the paper says, what came out, and whether that bears it out."""
    methods, flops, seconds = steps["methods"], steps["flops_over_few"], steps["seconds_over_few"]
    costs = (
        f"{name} {1e3 * row['seconds']:.1f} ms and {row['flops'] / 1e6:.0f} MFLOP" for name, row in methods.items()
    )
    return [
        *(one["claim"] for one in compared),
        claim(
            "The cost of memorizing a fact does not grow with the parameters of the memory (section 7.1)",
            f"a step with {steps['num_experts']:,} experts takes {flops:.3f} times the FLOPs and {seconds:.2f} times "
            f"the time of one with {steps['few_experts']:,}; what grows is the lookup, once per fact "
            f"({steps['flops_once'] / 1e6:.0f} MFLOP with reading the question)",
            flops <= 1.01 and steps["num_experts"] > steps["few_experts"],
            seconds <= 1.1 and steps["num_experts"] > steps["few_experts"],
        ),
        claim(
            "A step of memory tuning is cheaper than one of LoRA (section 7)",
            f"per fact and step {', '.join(costs)}: what the frozen first layers make of a fact is kept",
            methods["mome"]["seconds"] < methods["lora"]["seconds"],
            methods["mome"]["flops"] < methods["lora"]["flops"],
        ),
    ]


def table(results: dict) -> str:
    """The results as text."""
    lines = [f"{'number of the paper':<58}{'paper':>12}{'ours':>12}{'ratio':>8}"]
    for one in results["paper"]:
        lines.append(
            f"{one['quantity']:<58}{number(one['paper']):>12}{number(one['ours']):>12}{one['ratio']:>8.3g}  "
            f"{one['claim']['verdict']}"
        )
        lines += [f"    {one['reason']}"] if one["reason"] else []
    need = results["requirements"]
    lines.append(
        f"\nthe plan: {need['flops']:.3g} FLOPs, {need['days']:,.3g} days ({need['accelerators_for_days']:,} "
        f"accelerators for {results['plan']['days']:g} days), {need['megawatts']:,.3g} MW, "
        f"{need['gigawatt_hours']:,.3g} GWh, ${need['dollars']:,.0f}, {need['tonnes_of_co2']:,.0f} t of CO2, "
        f"as {need['homes']:,.0f} homes in a year"
    )
    steps = results["steps"]
    lines.append(
        f"\n{'a step, per fact':<18}{'ms':>9}{'MFLOP':>10}{'one layer each':>16}{'compiler':>10}{'trained':>12}"
        f"   {'Llama 3 8B: TFLOP':>20}{'s':>10}{'$':>12}{'trained':>16}"
    )
    for name, row in steps["methods"].items():
        llama = results["llama3_8b"][name]
        lines.append(
            f"{name:<18}{1e3 * row['seconds']:>9.2f}{row['flops'] / 1e6:>10.1f}"
            f"{row['flops_of_one_layer_each'] / 1e6:>16.1f}{row['flops_by_compiler'] / 1e6:>10.1f}"
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


def main() -> None:
    given = plan({name: flag.value for name, flag in _GIVEN.items()})
    config = model.configure(_CONFIG.value)
    experts = min(FEW_EXPERTS, config.memory.num_experts)
    if config.tuning.batch_size * config.memory.selected > experts:
        raise UserError(f"--config.tuning.batch_size={config.tuning.batch_size}: too many facts for {experts} experts")
    sharding.use(config.mesh)
    directory = study.directory_of(_WORKDIR.value, config, plan=dataclasses.asdict(given))
    started = time.time()
    with processes.bar(total=(TURNS + 1) * (len(METHODS) + 1), unit="step") as bar:
        steps = measured(config, bar)
    compared = arithmetic.comparisons()
    results = {
        "paper": compared,
        "plan": dataclasses.asdict(given),
        "requirements": arithmetic.requirements(given),
        "steps": steps,
        "llama3_8b": beside_llama(given),
        "claims": claims(compared, steps),
        "seconds": round(time.time() - started, 1),
    }
    study.finish(directory, results, table(results), figures.compute_requirements)


if __name__ == "__main__":
    command.run(main)
