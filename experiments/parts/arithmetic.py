"""The paper's arithmetic (sections 1 and 6): what it takes to train all of a model until it hallucinates no more.

And what a step of each way to memorize costs, counted in matrix products. Powers are in watts, energies in kWh.
"""

import dataclasses
import math

from experiments.parts.claims import claim
from lamini_jax import backbone
from lamini_jax.config import Config
from lamini_jax.data.facts import RANDOM_LENGTH

CHINCHILLA = 20  # tokens per parameter (arXiv 2203.15556)
DAY = 86_400  # seconds
# AMD's data sheet of the MI300X: bfloat16 without sparsity, and the power of a board.
MI300X_FLOPS = 1307.4e12
MI300X_WATTS = 750
# A home in the United States in 2019, and its grid: kWh delivered a year, pounds of CO2 per MWh generated, the share
# lost on the way (EPA, Greenhouse Gas Equivalencies Calculator).
HOME_KWH = 11_880
KG_PER_KWH = 884.2 / 1000 / 2.2046 / (1 - 0.073)
ANSWER_BITS = RANDOM_LENGTH * math.log2(36)
# Bits that a parameter was found to hold: arXiv 2404.05405 and 2505.24832.
BITS_PER_PARAMETER = (2.0, 3.6)
# A number reproduces within the first of these factors, and in part within the second.
CLOSE, NEAR = 1.1, 1.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training run. The defaults are the paper's; its 350 MW are 1,000 W per accelerator."""

    parameters: float = 400e9
    tokens: float = CHINCHILLA * 400e9
    epochs: float = 100
    accelerators: float = 350_000
    peak_flops: float = MI300X_FLOPS  # of each, per second
    mfu: float = 0.45  # the share of it that training reaches
    watts: float = 1000  # of each, with what it takes to run it
    dollars_per_kwh: float = 0.09
    days: float = 90  # in which the accelerators are wanted


def training_flops(parameters: float, tokens: float, epochs: float) -> float:
    """6 per parameter and token (arXiv 2001.08361)."""
    return 6 * parameters * tokens * epochs


def requirements(plan: Plan) -> dict[str, float]:
    """What a plan takes: time with its accelerators, or accelerators for its days; power, price and carbon."""
    flops = training_flops(plan.parameters, plan.tokens, plan.epochs)
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


def comparisons() -> list[dict]:
    """The paper's numbers beside ours, each with how ours comes about, and why the two differ where they do."""
    plan = Plan()
    ours = requirements(plan)
    machines = plan.accelerators * plan.peak_flops * plan.mfu
    possible = machines * plan.days * DAY
    paper_flops, paper_watts = 3.43e24, 350e6
    kwh = paper_watts / 1000 * plan.days * 24
    low, high = (2e9 * bits / ANSWER_BITS for bits in BITS_PER_PARAMETER)
    rows = (
        (
            "FLOPs of 100 epochs of a 400B model (section 6)",
            paper_flops,
            ours["flops"],
            "6 x 400e9 parameters x 8e12 tokens (Chinchilla) x 100",
            f"a misprint in the exponent, it seems: the accelerators that it quotes do {possible:.2g} in 3 months, "
            f"and would do {paper_flops:.3g} in {paper_flops / machines / 3600:.1f} hours",
        ),
        (
            "days on 350,000 MI300X at 45% of their peak (section 6)",
            plan.days,
            ours["days"],
            f"our FLOPs at {MI300X_FLOPS / 1e12:,.0f} TFLOP/s of bfloat16",
            f"3 months would take {ours['accelerators_for_days']:,} of them",
        ),
        (
            "megawatts of 350,000 MI300X (section 6)",
            paper_watts / 1e6,
            plan.accelerators * MI300X_WATTS / 1e6,
            f"{MI300X_WATTS} W per board",
            f"the boards alone; the paper's are {paper_watts / plan.accelerators:,.0f} W each, with room for hosts, "
            "network and cooling",
        ),
        (
            "dollars of electricity (section 6)",
            68e6,
            kwh * plan.dollars_per_kwh,
            "350 MW x 90 days x $0.09",
            "other prices",
        ),
        (
            "homes whose yearly carbon it is (section 6)",
            62_000,
            kwh / HOME_KWH,
            f"350 MW x 90 days, {HOME_KWH:,} kWh a home, both from the same grid",
            "another home or grid",
        ),
        (
            "facts that the 2B parameters of memory beside 8B hold",
            1e9,
            low,
            f"{ANSWER_BITS:.1f} bits for each answer of 32 random characters, {BITS_PER_PARAMETER[0]:g} per parameter",
            f"{high:.2g} at {BITS_PER_PARAMETER[1]:g} bits per parameter, and {2e9 * 16 / ANSWER_BITS:.2g} if all 16 "
            f"of bfloat16 were used: it would take {1e9 * ANSWER_BITS / 2e9:.1f} bits in each",
        ),
    )
    found = []
    for name, paper, value, how, reason in rows:
        ratio = value / paper
        told = f"{number(value)} ({how}), {ratio:.3g} times the paper's"
        reason = "" if apart(ratio) <= CLOSE else reason
        verdict = claim(f"{number(paper)} {name}", f"{told}; {reason}" if reason else told, *same(ratio))
        one = {"quantity": name, "paper": paper, "ours": value, "ratio": ratio, "reason": reason}
        found.append(one | {"claim": verdict})
    return found


def apart(ratio: float) -> float:
    """By what factor, at least 1, two numbers of this ratio differ."""
    return max(ratio, 1 / ratio)


def same(ratio: float) -> tuple[bool, bool]:
    """Whether a number is the paper's, and whether it is so in part."""
    return apart(ratio) <= CLOSE, apart(ratio) <= NEAR


def number(value: float) -> str:
    """With thousands separated, or with a power of ten where it is large."""
    return f"{value:.3g}" if value >= 1e8 else f"{value:,.0f}"


def flops_per_fact(config: Config, method: str, tokens: int, answer: int, depth: tuple[int, int] | None = None):
    """FLOPs of one step (forward and backward) for one fact: all of the model (`full`), `lora` or `mome`.

    Of `tokens` tokens, of which `answer` have logits; `depth` replaces the layers of prefix and suffix. Backward costs
    a product for the activations, and one more for what is trained and for attention, whose both sides have gradients.
    """
    c, memory = config.backbone, config.memory
    prefix, suffix = depth or (c.num_layers - memory.layers, memory.layers)
    shapes = backbone.linear_shapes(c)
    weights = sum(i * o for i, o in shapes.values())
    attention = 2 * tokens * c.num_heads * c.head_width
    unembedding = answer * c.width * c.vocab_size
    if method == "full":
        products = 3 * (prefix + suffix) * tokens * (weights + attention) + 3 * unembedding
    elif method == "lora":
        adapters = config.lora.rank * sum(i + o for i, o in shapes.values())
        products = (prefix + suffix) * tokens * (2 * weights + 3 * attention + 3 * adapters) + 2 * unembedding
    else:
        experts = memory.selected * sum(shapes[memory.target])
        products = suffix * tokens * (2 * weights + 3 * attention + 3 * experts) + 2 * unembedding
    return 2 * products


def flops_once(config: Config, tokens: int) -> int:
    """FLOPs that memory tuning spends on a fact before its first step: two readings of the prefix and one lookup."""
    c = config.backbone
    weights = sum(i * o for i, o in backbone.linear_shapes(c).values())
    layers = c.num_layers - config.memory.layers
    reading = layers * tokens * (weights + 2 * tokens * c.num_heads * c.head_width)
    return 2 * (2 * reading + config.memory.num_experts * config.router.key_width)


def trained_parameters(config: Config, method: str) -> int:
    """Parameters that a step on one fact changes."""
    c = config.backbone
    shapes = backbone.linear_shapes(c)
    if method == "full":
        tables = 1 if c.tied_embeddings else 2
        per_layer = sum(i * o for i, o in shapes.values()) + 2 * c.width
        return c.num_layers * per_layer + tables * c.vocab_size * c.width + c.width
    if method == "lora":
        return c.num_layers * config.lora.rank * sum(i + o for i, o in shapes.values())
    return config.memory.layers * config.memory.selected * sum(shapes[config.memory.target])
