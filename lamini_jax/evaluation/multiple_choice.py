"""Multiple choice, judged by the likelihood of each choice, as lm-evaluation-harness does."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import frozen_model, transformer
from lamini_jax.backbone.answering import AdapterFn
from lamini_jax.backbone.frozen_model import Adapters, FrozenModel
from lamini_jax.data import batches
from lamini_jax.data.benchmarks import MultipleChoice
from lamini_jax.evaluation import intervals
from lamini_jax.runtime import sharding


def score(
    model: FrozenModel,
    adapter_fn: AdapterFn,
    items: Sequence[MultipleChoice],
    after_batch: Callable[[int], object] | None = None,
) -> list[np.ndarray]:
    """For each item, the log-likelihoods (nats) of its choices after its context, each summed over the choice's tokens.

    Experts are selected by the item's question. `after_batch` is called with the number of choices that a batch scored.
    """
    if not items:
        return []
    selection = frozen_model.map_questions(model, [item.question for item in items], adapter_fn.select)
    scores = [np.zeros(len(item.choices)) for item in items]
    for bucket in batches.choices(items, model.tokenizer):
        for index_B in batches.in_order(len(bucket.item_F), min(model.reading_batch, len(bucket.item_F))):
            item_B, choice_BC = bucket.item_F[index_B], bucket.choice_FC[index_B]
            adapters = adapter_fn.build(jax.tree.map(lambda x, item_B=item_B: x[item_B], selection))
            arrays = (x[index_B] for x in (bucket.tokens_FT, bucket.start_F, bucket.length_F, bucket.targets_FAC))
            score_BC = np.asarray(_log_likelihoods(model, *arrays, adapters))
            taken_BC = (choice_BC >= 0) & (index_B >= 0)[:, None]
            for row, column in np.argwhere(taken_BC):
                scores[item_B[row]][choice_BC[row, column]] = score_BC[row, column]
            if after_batch:
                after_batch(int(taken_BC.sum()))
    return scores


@jax.jit
def _log_likelihoods(model: FrozenModel, tokens_BT, start_B, length_B, targets_BAC, adapters: Adapters):
    """score_BC: the sum of the log-probabilities of each choice's `length_B` tokens."""
    hidden_BTD, _ = transformer.prefix(model.decoder, model.params, tokens_BT, adapter=adapters.prefix)
    longest = targets_BAC.shape[1]
    logits_BAV = frozen_model.answer_logits(model, hidden_BTD, start_B, longest, adapters)
    losses_BAC = jax.nn.logsumexp(logits_BAV, axis=-1, keepdims=True) - jnp.take_along_axis(logits_BAV, targets_BAC, -1)
    counted_BA1 = (jnp.arange(longest)[None] < length_B[:, None])[:, :, None]
    return sharding.constrain(-jnp.sum(jnp.where(counted_BA1, losses_BAC, 0.0), axis=1))


def mc1(item: MultipleChoice, score_C: np.ndarray) -> bool:
    """TruthfulQA's MC1: whether the best answer is likelier than each incorrect one."""
    return bool(score_C[0] > score_C[~np.array(item.right)].max())


def mc2(item: MultipleChoice, score_C: np.ndarray) -> float:
    """TruthfulQA's MC2: the probability of all correct answers divided by that of all answers."""
    weight_C = np.exp(score_C - score_C.max())
    return float(weight_C[np.array(item.right)].sum() / weight_C.sum())


def likeliest(item: MultipleChoice, score_C: np.ndarray) -> bool:
    """MMLU's measure: whether the right choice is the likeliest."""
    return item.right[int(score_C.argmax())]


def truthful_qa_results(items: Sequence[MultipleChoice], scores: Sequence[np.ndarray]) -> dict:
    """MC1 and MC2, means over questions, with their 95% intervals; MC2's is the normal approximation."""
    first_Q, share_Q = (list(map(judge, items, scores)) for judge in (mc1, mc2))
    return {
        "mc1": sum(first_Q) / len(items),
        "mc1_interval": intervals.wilson(sum(first_Q), len(items)),
        "mc2": float(np.mean(share_Q)),
        "mc2_interval": intervals.normal(share_Q),
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
        "interval": intervals.wilson(right, len(items)),
        "questions": len(items),
        "left_out": left_out,
        "by_subject": {
            name: {"accuracy": sum(right_Q) / len(right_Q), "questions": len(right_Q)}
            for name, right_Q in subjects.items()
        },
    }
