"""How much the studies measure: beside the backbone that ships, and beside a real one, whose tokens cost far more."""

import dataclasses

from lamini_jax import Config


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of questions, and how soon a memory is tuned."""

    truthful_qa: int | None  # questions judged by likelihood; None: all
    mmlu_per_subject: int
    sampled_facts: int  # whose answers are drawn at each stage of loss_threshold
    timed: int  # questions whose latency retrieval_comparison measures
    tuned_within: float  # the share of the budget of epochs in which memory tuning goes from no fact to all of them


_SHIPPED = Sizes(truthful_qa=None, mmlu_per_subject=5, sampled_facts=32, timed=30, tuned_within=1 / 3)
_REAL = Sizes(truthful_qa=50, mmlu_per_subject=1, sampled_facts=8, timed=10, tuned_within=2 / 3)


def of(config: Config) -> Sizes:
    """The sizes of studies with this config."""
    return _REAL if config.backbone.path else _SHIPPED
