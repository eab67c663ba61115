"""What a model really answers: free-running decoding, exact recall, and accuracy with its interval.

What is judged is a backbone and what is added to it, `adapt(prompt_BT, length_B) -> decoding.Adapted`. It is given
prompts, and prompts hold no answer. Multiple choice is judged by the likelihood of each choice, as
lm-evaluation-harness does.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax import backbone, bank, decoding, model, processes, router, sharding
from lamini_jax.config import MemoryConfig
from lamini_jax.data import batches
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.decoding import Adapted, Sampling

_BATCH = 64
_Z = 1.959964  # of the 95% intervals


class Adapt(NamedTuple):
    """What is added to the backbone for each question: `build(select(prompt_BT, length_B))`.

    A selection is a pytree of arrays with a leading axis B, so that one can be kept for many sequences.
    """

    select: Callable
    build: Callable[..., Adapted]

    def __call__(self, prompt_BT, length_B) -> Adapted:
        return self.build(self.select(prompt_BT, length_B))


class Answer(NamedTuple):
    """What was said, the probability of its least likely token, and the experts that the question selected."""

    text: str
    probability: float
    expert_ids: list[int]


def with_lora(adapters: dict) -> Adapt:
    """The backbone with the baseline's adapters, the same for all questions."""
    return Adapt(lambda prompt_BT, length_B: (), lambda selection: Adapted(**adapters))


bare = with_lora({})  # the backbone alone


def with_memory(base: model.Base, routing: router.Router, fetch: Callable, memory: MemoryConfig) -> Adapt:
    """Lamini-1: every question selects its experts anew, and `fetch(expert_ids_BK) -> rows_BKR` reads theirs alone."""
    adapter = jax.jit(bank.adapter, static_argnums=2)

    def select(prompt_BT, length_B):
        return model.select(base.decoder, base.params, routing, prompt_BT, length_B, memory.selected)

    def build(selection):
        suffix = adapter(fetch(selection.expert_ids_BK), selection.gates_BK, memory.target)
        return Adapted(suffix=suffix, expert_ids_BK=selection.expert_ids_BK)

    return Adapt(select, build)


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
    """The answers of greedy decoding, as text. Tells of its progress if it takes long."""
    given = ask(base, adapt, questions, longest)
    texts = dict(
        processes.bar(given, total=len(questions), desc="asking", unit="question", delay=processes.LONG, leave=False)
    )
    return [texts[number].text for number in range(len(questions))]


def accuracy(base: model.Base, adapt: Adapt, questions_and_answers) -> list[bool]:
    """Which questions are answered exactly. Decoding stops one token after the longest right answer."""
    longest = max(len(base.tokenizer.completion(qa.answer)) for qa in questions_and_answers) + 1
    given = answers(base, adapt, [qa.question for qa in questions_and_answers], longest)
    return [text == qa.answer for text, qa in zip(given, questions_and_answers, strict=True)]


def score(
    base: model.Base,
    adapt: Adapt,
    items: Sequence[MultipleChoice],
    after_batch: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Of each item, the log-likelihoods (nats) of its choices after its context, each summed over the choice's tokens.

    Experts are selected by the item's question. `after_batch` is told how many choices have been scored.
    """
    if not items:
        return []
    prompts = batches.prompts([item.question for item in items], base.tokenizer)
    selection = model.over(prompts, adapt.select)
    scores = [np.zeros(len(item.choices)) for item in items]
    for bucket in batches.choices(items, base.tokenizer):
        for rows_B in batches.in_order(len(bucket.item_F), min(_BATCH, len(bucket.item_F))):
            item_B, choice_BC = bucket.item_F[rows_B], bucket.choice_FC[rows_B]
            adapted = adapt.build(jax.tree.map(lambda x, item_B=item_B: x[item_B], selection))
            arrays = bucket.tokens_FT[rows_B], bucket.start_F[rows_B], bucket.length_F[rows_B]
            sum_BC = _log_likelihoods(base.decoder, base.params, *arrays, bucket.targets_FAC[rows_B], adapted)
            taken_BC = (choice_BC >= 0) & (rows_B >= 0)[:, None]
            for row, column in np.argwhere(taken_BC):
                scores[item_B[row]][choice_BC[row, column]] = np.asarray(sum_BC)[row, column]
            if after_batch:
                after_batch(int(taken_BC.sum()))
    return scores


@functools.partial(jax.jit, static_argnames="decoder")
def _log_likelihoods(decoder, params, tokens_BT, start_B, length_B, targets_BAC, adapted: Adapted):
    hidden_BTD, _ = backbone.prefix(decoder, params, tokens_BT, adapter=adapted.prefix)
    longest = targets_BAC.shape[1]
    logits_BAV = model.answer_logits(decoder, params, hidden_BTD, start_B, longest, adapted.suffix)
    losses_BAC = jax.nn.logsumexp(logits_BAV, axis=-1, keepdims=True) - jnp.take_along_axis(logits_BAV, targets_BAC, -1)
    counted_BA1 = (jnp.arange(longest)[None] < length_B[:, None])[:, :, None]
    return sharding.constrain(-jnp.sum(jnp.where(counted_BA1, losses_BAC, 0.0), axis=1))


def mc1(item: MultipleChoice, score_C: np.ndarray) -> bool:
    """TruthfulQA's MC1: whether the best answer is likelier than each incorrect one."""
    return bool(score_C[0] > score_C[~np.array(item.right)].max())


def mc2(item: MultipleChoice, score_C: np.ndarray) -> float:
    """TruthfulQA's MC2: the probability of all correct answers over that of all answers."""
    weight_C = np.exp(score_C - score_C.max())
    return float(weight_C[np.array(item.right)].sum() / weight_C.sum())


def likeliest(item: MultipleChoice, score_C: np.ndarray) -> bool:
    """MMLU's: whether the right choice is the likeliest."""
    return item.right[int(score_C.argmax())]


def truthful_qa_results(items: Sequence[MultipleChoice], scores: Sequence[np.ndarray]) -> dict:
    """MC1 and MC2, means over questions, with their 95% intervals; MC2's is the normal approximation."""
    first_Q, share_Q = (list(map(judge, items, scores)) for judge in (mc1, mc2))
    return {
        "mc1": sum(first_Q) / len(items),
        "mc1_interval": wilson(sum(first_Q), len(items)),
        "mc2": float(np.mean(share_Q)),
        "mc2_interval": normal(share_Q),
        "questions": len(items),
    }


def mmlu_results(items: Sequence[MultipleChoice], scores: Sequence[np.ndarray], left_out: int) -> dict:
    """How often the right choice is the likeliest, over all questions and by subject."""
    subjects: dict[str, list[bool]] = {}
    for item, score_C in zip(items, scores, strict=True):
        subjects.setdefault(item.subject, []).append(likeliest(item, score_C))
    right = sum(map(sum, subjects.values()))
    return {
        "accuracy": right / len(items),
        "interval": wilson(right, len(items)),
        "questions": len(items),
        "left_out": left_out,
        "by_subject": {
            name: {"accuracy": sum(right_Q) / len(right_Q), "questions": len(right_Q)}
            for name, right_Q in subjects.items()
        },
    }


def normal(values_Q: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean of values between 0 and 1."""
    if len(values_Q) < 2:
        return 0.0, 1.0  # one value says nothing about how they spread
    mean, margin = np.mean(values_Q), _Z * np.std(values_Q, ddof=1) / len(values_Q) ** 0.5
    return max(0.0, float(mean - margin)), min(1.0, float(mean + margin))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927)."""
    z, share = _Z, successes / trials
    weight = 1 / (1 + z * z / trials)
    centre = weight * (share + z * z / (2 * trials))
    margin = weight * z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, centre - margin), min(1.0, centre + margin)
