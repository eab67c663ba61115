"""Questions in, answers out: free-running decoding of a backbone, with or without adapters.

A backbone and an AdapterFn answer together. Both see only prompts, which contain no answer.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lamini_jax.backbone import decoding
from lamini_jax.backbone.decoding import Sampling
from lamini_jax.backbone.frozen_model import Adapters, FrozenModel
from lamini_jax.data import batches
from lamini_jax.runtime import processes


class AdapterFn(NamedTuple):
    """Makes the adapters that are added to the backbone for each question: `build(select(prompt_BT, length_B))`.

    A selection is a pytree of arrays with a leading axis B, so that it can be kept and used for many sequences.
    """

    select: Callable[[Any, Any], Any]
    build: Callable[[Any], Adapters]

    def __call__(self, prompt_BT, length_B) -> Adapters:
        return self.build(self.select(prompt_BT, length_B))


class Answer(NamedTuple):
    """A text, the probability of its least likely token, and what the question selected (without the axis B)."""

    text: str
    probability: float
    selection: Any


def same_for_all(**adapters: Any) -> AdapterFn:
    """The same adapters (`prefix`, `suffix`) for every question."""
    return AdapterFn(lambda prompt_BT, length_B: (), lambda selection: Adapters(**adapters))


def handed(model: FrozenModel, questions: Sequence[str], selection: Any, build: Callable[[Any], Adapters]) -> AdapterFn:
    """Adapters for these questions alone, each of which is handed its part of a selection that was made before."""
    numbers = {tuple(model.tokenizer.prompt(question)): number for number, question in enumerate(questions)}

    def select(prompt_BT, length_B):
        prompts = zip(np.asarray(prompt_BT), np.asarray(length_B), strict=True)
        index_B = np.array([numbers[tuple(prompt_T[:length].tolist())] for prompt_T, length in prompts])
        return jax.tree.map(lambda x: x[index_B], selection)

    return AdapterFn(select, build)


BARE = same_for_all()  # the backbone alone


def ask(
    model: FrozenModel,
    adapter_fn: AdapterFn,
    questions: Sequence[str],
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answers, each with its question's number, batch by batch.

    Each is cut off after `max_new_tokens`, if given, and where prompt and answer reach the model's `max_seq_len`.
    """
    max_new_tokens = max_new_tokens or model.max_seq_len
    draws = itertools.count()
    for bucket in batches.prompts(questions, model.tokenizer):
        for index_B in batches.in_order(len(bucket.index_F), min(model.reading_batch, len(bucket.index_F))):
            prompt_BT, length_B = bucket.tokens_FT[index_B], bucket.length_F[index_B]
            adapters = adapter_fn(prompt_BT, length_B)
            drawn = sampling and sampling._replace(key=jax.random.fold_in(sampling.key, next(draws)))
            generated = decoding.generate(model, prompt_BT, length_B, max_new_tokens, adapters, drawn)
            answer_BA, probability_B = jax.tree.map(np.asarray, generated)
            selection = jax.tree.map(np.asarray, adapters.selection)
            for i in np.flatnonzero(index_B >= 0):
                text = model.tokenizer.decode(answer_BA[i])
                yield int(bucket.index_F[index_B[i]]), Answer(text, float(probability_B[i]), _at(selection, i))


def stream(
    model: FrozenModel, adapter_fn: AdapterFn, question: str, sampling: Sampling | None = None
) -> Iterator[Answer]:
    """The answer to one question as it grows, token by token."""
    (bucket,) = batches.prompts([question], model.tokenizer)
    adapters = adapter_fn(bucket.tokens_FT, bucket.length_F)
    selection = _at(jax.tree.map(np.asarray, adapters.selection), 0)
    state = decoding.prefill(model, bucket.tokens_FT, bucket.length_F, model.max_seq_len, adapters, sampling)
    for step in itertools.count(1):
        reach = decoding.reach_for(state, bucket.tokens_FT.shape[1] + step)
        state = decoding.decode(model, state, step, adapters, sampling, reach=reach)
        text = model.tokenizer.decode(np.asarray(state.answer_BA)[0, : int(state.step)])
        yield Answer(text, float(state.probability_B[0]), selection)
        if int(state.step) < step or step == state.answer_BA.shape[1]:
            return


def ask_in_order(
    model: FrozenModel,
    adapter_fn: AdapterFn,
    questions: Sequence[str],
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """The same in the order of the questions. Shows a progress bar if it takes long."""
    given = ask(model, adapter_fn, questions, max_new_tokens, sampling)
    options = {"desc": "asking", "unit": "question", "delay": processes.LONG_SECONDS, "leave": False}
    answers = dict(processes.progress_bar(given, total=len(questions), **options))
    return [answers[number] for number in range(len(questions))]


def answers(
    model: FrozenModel, adapter_fn: AdapterFn, questions: Sequence[str], max_new_tokens: int | None = None
) -> list[str]:
    """The answers of greedy decoding, as text."""
    return [answer.text for answer in ask_in_order(model, adapter_fn, questions, max_new_tokens)]


def _at(selection: Any, number: int) -> Any:
    """What one question of a batch selected."""
    return jax.tree.map(lambda x_B: x_B[number], selection)
