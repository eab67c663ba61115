"""What a model really answers: free-running greedy decoding, exact recall, and accuracy with its interval.

A *speaker* is `speak(prompt_BT, length_B, longest) -> answer_BA`. It is given prompts, and prompts hold no answer.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from lamini_jax import bank, decoding, model, router
from lamini_jax.config import MemoryConfig
from lamini_jax.data import batches

Speaker = Callable

_BATCH = 64


def bare(base: model.Base) -> Speaker:
    """The backbone alone."""
    return with_lora(base, {"prefix": None, "suffix": None})


def with_lora(base: model.Base, adapters) -> Speaker:
    """The backbone with the baseline's adapters."""

    def speak(prompt_BT, length_B, longest):
        return decoding.greedy(
            base.decoder,
            base.params,
            prompt_BT,
            length_B,
            longest,
            base.tokenizer.stop_id,
            adapters["suffix"],
            adapters["prefix"],
        )

    return speak


def with_memory(base: model.Base, routing: router.Router, fetch: Callable, memory: MemoryConfig) -> Speaker:
    """Lamini-1: every question selects its experts anew, and `fetch(expert_ids_BK) -> rows_BKR` reads theirs alone."""
    build = jax.jit(bank.adapter, static_argnums=2)

    def speak(prompt_BT, length_B, longest):
        selection = model.select(base.decoder, base.params, routing, prompt_BT, length_B, memory.selected)
        adapter = build(fetch(selection.expert_ids_BK), selection.gates_BK, memory.target)
        return with_lora(base, {"prefix": None, "suffix": adapter})(prompt_BT, length_B, longest)

    return speak


def answers(base: model.Base, speak: Speaker, questions: Sequence[str], longest: int | None = None) -> list[str]:
    """The answers to some questions, as text, cut off after `longest` tokens or else where the context ends."""
    texts: list[str] = [""] * len(questions)
    for bucket in batches.prompts(questions, base.tokenizer):
        batch = min(_BATCH, len(bucket.index_F))
        for rows_B in batches.in_order(len(bucket.index_F), batch):
            length_B = bucket.length_F[rows_B]
            answer_BA = speak(bucket.tokens_FT[rows_B], length_B, longest or base.decoder.config.context)
            for row, answer_A in zip(rows_B, np.asarray(answer_BA), strict=True):
                if row >= 0:
                    texts[bucket.index_F[row]] = base.tokenizer.decode(answer_A)
    return texts


def accuracy(base: model.Base, speak: Speaker, questions_and_answers) -> list[bool]:
    """Which questions are answered exactly. Decoding stops one token after the longest right answer."""
    longest = max(len(base.tokenizer.completion(qa.answer)) for qa in questions_and_answers) + 1
    given = answers(base, speak, [qa.question for qa in questions_and_answers], longest)
    return [text == qa.answer for text, qa in zip(given, questions_and_answers, strict=True)]


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927)."""
    z = 1.959964
    share, weight = successes / trials, 1 / (1 + z * z / trials)
    centre = weight * (share + z * z / (2 * trials))
    margin = weight * z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, centre - margin), min(1.0, centre + margin)
