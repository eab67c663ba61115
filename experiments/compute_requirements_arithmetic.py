"""The paper's arithmetic (sections 1 and 6): what it takes to train a whole model until it no longer hallucinates.

Powers are in watts, energies in kWh.
"""

import dataclasses
import math
from typing import NamedTuple

from experiments.shared.claims import Claim
from lamini_jax.data.facts import RANDOM_LENGTH

CHINCHILLA = 20  # tokens per parameter (arXiv 2203.15556)
DAY = 86_400  # seconds
# AMD's data sheet of the MI300X: bfloat16 without sparsity, and the power of a board.
MI300X_FLOPS = 1307.4e12
MI300X_WATTS = 750
# A home in the United States in 2019: kWh delivered a year; and its grid: pounds of CO2 per MWh generated, and the
# share lost in transmission (EPA, Greenhouse Gas Equivalencies Calculator).
HOME_KWH = 11_880
KG_PER_KWH = 884.2 / 1000 / 2.2046 / (1 - 0.073)
ANSWER_BITS = RANDOM_LENGTH * math.log2(36)
# Bits that a parameter was found to hold: arXiv 2404.05405 and 2505.24832.
BITS_PER_PARAMETER = (2.0, 3.6)
# A number is reproduced within the first of these factors, and in part within the second.
CLOSE, NEAR = 1.1, 1.5


def _number(default: float, text: str) -> float:
    """A field of a plan, with the help of its flag."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training run. The defaults are the paper's; its 350 MW are 1,000 W per accelerator."""

    parameters: float = _number(400e9, "Parameters of the model.")
    tokens: float = _number(CHINCHILLA * 400e9, "Tokens of an epoch; 20 per parameter unless given.")
    epochs: float = _number(100, "Epochs.")
    accelerators: float = _number(350_000, "Accelerators.")
    peak_flops: float = _number(MI300X_FLOPS, "FLOP/s of each at best.")
    mfu: float = _number(0.45, "The share of that which training reaches.")
    watts: float = _number(1000, "Watts of each, with what it takes to run it.")
    dollars_per_kwh: float = _number(0.09, "Price of electricity.")
    days: float = _number(90, "Days to be done in, for the number of accelerators that it takes.")


def requirements(plan: Plan) -> dict[str, float]:
    """What a plan needs: time with its accelerators, or accelerators for its days; power, price and carbon."""
    flops = 6 * plan.parameters * plan.tokens * plan.epochs  # 6 per parameter and token (arXiv 2001.08361)
    accelerator_days = flops / (plan.peak_flops * plan.mfu) / DAY
    kwh = accelerator_days * 24 * plan.watts / 1000
    return {
        "flops": flops,
        "days": accelerator_days / plan.accelerators,
        "accelerators_for_days": math.ceil(accelerator_days / plan.days),
        "megawatts": plan.accelerators * plan.watts / 1e6,
        "gigawatt_hours": kwh / 1e6,
        "dollars": kwh * plan.dollars_per_kwh,
        "tonnes_of_co2": kwh * KG_PER_KWH / 1000,
        "homes": kwh / HOME_KWH,
    }


class Comparison(NamedTuple):
    """A number of the paper and ours: how ours was computed, and why the two differ if they do."""

    quantity: str
    paper: float
    ours: float
    how: str
    reason: str


def comparisons() -> list[Comparison]:
    """The paper's numbers and ours."""
    plan = Plan()
    ours = requirements(plan)
    machines = plan.accelerators * plan.peak_flops * plan.mfu
    possible = machines * plan.days * DAY
    paper_flops, paper_watts = 3.43e24, 350e6
    kwh = paper_watts / 1000 * plan.days * 24
    low, high = (2e9 * bits / ANSWER_BITS for bits in BITS_PER_PARAMETER)
    return [
        Comparison(
            "FLOPs of 100 epochs of a 400B model (section 6)",
            paper_flops,
            ours["flops"],
            "6 x 400e9 parameters x 8e12 tokens (Chinchilla) x 100",
            f"a misprint in the exponent, it seems: the accelerators that it quotes do {possible:.2g} in 3 months, "
            f"and would do {paper_flops:.3g} in {paper_flops / machines / 3600:.1f} hours",
        ),
        Comparison(
            "days on 350,000 MI300X at 45% of their peak (section 6)",
            plan.days,
            ours["days"],
            f"our FLOPs at {MI300X_FLOPS / 1e12:,.0f} TFLOP/s of bfloat16",
            f"3 months would take {ours['accelerators_for_days']:,} of them",
        ),
        Comparison(
            "megawatts of 350,000 MI300X (section 6)",
            paper_watts / 1e6,
            plan.accelerators * MI300X_WATTS / 1e6,
            f"{MI300X_WATTS} W per board",
            f"the boards alone; the paper's are {paper_watts / plan.accelerators:,.0f} W each, with room for hosts, "
            "network and cooling",
        ),
        Comparison(
            "dollars of electricity (section 6)",
            68e6,
            kwh * plan.dollars_per_kwh,
            "350 MW x 90 days x $0.09",
            "other prices",
        ),
        Comparison(
            "homes whose yearly carbon it is (section 6)",
            62_000,
            kwh / HOME_KWH,
            f"350 MW x 90 days, {HOME_KWH:,} kWh a home, both from the same grid",
            "another home or grid",
        ),
        Comparison(
            "facts that the 2B parameters of memory beside 8B hold",
            1e9,
            low,
            f"{ANSWER_BITS:.1f} bits for each answer of 32 random characters, {BITS_PER_PARAMETER[0]:g} per parameter",
            f"{high:.2g} at {BITS_PER_PARAMETER[1]:g} bits per parameter, and {2e9 * 16 / ANSWER_BITS:.2g} if all 16 "
            f"of bfloat16 were used: it would take {1e9 * ANSWER_BITS / 2e9:.1f} bits in each",
        ),
    ]


def claim(comparison: Comparison) -> Claim:
    """The claim that a number of the paper is right."""
    ratio = comparison.ours / comparison.paper
    measured = f"{number(comparison.ours)} ({comparison.how}), {ratio:.3g} times the paper's"
    if factor(comparison) > CLOSE:
        measured += f"; {comparison.reason}"
    conditions = {f"within a factor of {most}": factor(comparison) <= most for most in (CLOSE, NEAR)}
    return Claim(f"{number(comparison.paper)} {comparison.quantity}", measured, conditions)


def factor(comparison: Comparison) -> float:
    """The factor, at least 1, by which the two numbers differ."""
    ratio = comparison.ours / comparison.paper
    return max(ratio, 1 / ratio)


def number(value: float) -> str:
    """With thousands separated, or with a power of ten where it is large."""
    return f"{value:.3g}" if value >= 1e8 else f"{value:,.0f}"
