"""What a model really answers: free-running decoding, exact recall, and accuracy with its interval.

What is judged is a backbone and what is added to it, `adapt(prompt_BT, length_B) -> decoding.Adapted`. It is given
prompts, and prompts hold no answer.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lamini_jax import bank, decoding, model, router
from lamini_jax.config import MemoryConfig
from lamini_jax.data import batches
from lamini_jax.decoding import Adapted, Sampling

Adapt = Callable[..., Adapted]

_BATCH = 64


class Answer(NamedTuple):
    """What was said, the probability of its least likely token, and the experts that the question selected."""

    text: str
    probability: float
    expert_ids: list[int]


def bare(prompt_BT, length_B) -> Adapted:
    """The backbone alone."""
    return decoding.BARE


def with_lora(adapters) -> Adapt:
    """The backbone with the baseline's adapters."""
    return lambda prompt_BT, length_B: Adapted(**adapters)


def with_memory(base: model.Base, routing: router.Router, fetch: Callable, memory: MemoryConfig) -> Adapt:
    """Lamini-1: every question selects its experts anew, and `fetch(expert_ids_BK) -> rows_BKR` reads theirs alone."""
    build = jax.jit(bank.adapter, static_argnums=2)

    def adapt(prompt_BT, length_B):
        selection = model.select(base.decoder, base.params, routing, prompt_BT, length_B, memory.selected)
        adapter = build(fetch(selection.expert_ids_BK), selection.gates_BK, memory.target)
        return Adapted(suffix=adapter, expert_ids_BK=selection.expert_ids_BK)

    return adapt


def ask(
    base: model.Base,
    adapt: Adapt,
    questions: Sequence[str],
    longest: int | None = None,
    sampling: Sampling | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answers, each with its question's number, batch by batch.

    They are cut off after `longest` tokens, or else where the context ends.
    """
    longest = longest or base.decoder.config.context
    draws = itertools.count()
    for bucket in batches.prompts(questions, base.tokenizer):
        batch = min(_BATCH, len(bucket.index_F))
        for rows_B in batches.in_order(len(bucket.index_F), batch):
            prompt_BT, length_B = bucket.tokens_FT[rows_B], bucket.length_F[rows_B]
            adapted = adapt(prompt_BT, length_B)
            drawn = sampling and sampling._replace(key=jax.random.fold_in(sampling.key, next(draws)))
            generated = decoding.generate(
                base.decoder, base.params, prompt_BT, length_B, longest, base.tokenizer.stop_ids, adapted, drawn
            )
            answer_BA, probability_B = jax.tree.map(np.asarray, generated)
            none_BK = np.zeros((rows_B.size, 0), int)
            expert_ids_BK = none_BK if adapted.expert_ids_BK is None else np.asarray(adapted.expert_ids_BK)
            for i in np.flatnonzero(rows_B >= 0):
                text = base.tokenizer.decode(answer_BA[i])
                yield int(bucket.index_F[rows_B[i]]), Answer(text, float(probability_B[i]), expert_ids_BK[i].tolist())


def stream(base: model.Base, adapt: Adapt, question: str, sampling: Sampling | None = None) -> Iterator[Answer]:
    """The answer to one question as it grows, token by token."""
    (bucket,) = batches.prompts([question], base.tokenizer)
    adapted, stops = adapt(bucket.tokens_FT, bucket.length_F), base.tokenizer.stop_ids
    expert_ids = [] if adapted.expert_ids_BK is None else np.asarray(adapted.expert_ids_BK)[0].tolist()
    context, parts = base.decoder.config.context, (base.decoder, base.params)
    state = decoding.start(*parts, bucket.tokens_FT, bucket.length_F, context, stops, adapted, sampling)
    for step in itertools.count(1):
        state = decoding.proceed(*parts, state, step, stops, adapted, sampling)
        text = base.tokenizer.decode(np.asarray(state.answer_BA)[0, : int(state.step)])
        yield Answer(text, float(np.exp(state.least_B[0])), expert_ids)
        if int(state.step) < step or step == state.answer_BA.shape[1]:
            return


def answers(base: model.Base, adapt: Adapt, questions: Sequence[str], longest: int | None = None) -> list[str]:
    """The answers of greedy decoding, as text."""
    texts = dict(ask(base, adapt, questions, longest))
    return [texts[number].text for number in range(len(questions))]


def accuracy(base: model.Base, adapt: Adapt, questions_and_answers) -> list[bool]:
    """Which questions are answered exactly. Decoding stops one token after the longest right answer."""
    longest = max(len(base.tokenizer.completion(qa.answer)) for qa in questions_and_answers) + 1
    given = answers(base, adapt, [qa.question for qa in questions_and_answers], longest)
    return [text == qa.answer for text, qa in zip(given, questions_and_answers, strict=True)]


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927)."""
    z = 1.959964
    share, weight = successes / trials, 1 / (1 + z * z / trials)
    centre = weight * (share + z * z / (2 * trials))
    margin = weight * z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, centre - margin), min(1.0, centre + margin)
