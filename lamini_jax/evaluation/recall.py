"""What a model really answers, compared to the character: free-running greedy decoding from the prompts alone."""

from collections.abc import Sequence

import numpy as np

from lamini_jax.backbone import answering
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data.facts import Fact


def recalled(model: FrozenModel, adapter_fn: AdapterFn, facts: Sequence[Fact]) -> tuple[np.ndarray, list[str]]:
    """Which facts greedy decoding returns exactly, and what it returns."""
    generated = answering.answers(model, adapter_fn, [fact.question for fact in facts])
    return exact(generated, facts), generated


def exact(generated: Sequence[str], facts: Sequence[Fact]) -> np.ndarray:
    """Which facts these answers state, to the character."""
    return np.array([text == fact.answer for text, fact in zip(generated, facts, strict=True)])


def accuracy(model: FrozenModel, adapter_fn: AdapterFn, qas: Sequence) -> list[bool]:
    """Which questions are answered exactly; `qas` are any objects that have a `question` and an `answer`.

    Decoding stops one token after the longest right answer.
    """
    max_new_tokens = max(len(model.tokenizer.completion(qa.answer)) for qa in qas) + 1
    generated = answering.answers(model, adapter_fn, [qa.question for qa in qas], max_new_tokens)
    return [text == qa.answer for text, qa in zip(generated, qas, strict=True)]
