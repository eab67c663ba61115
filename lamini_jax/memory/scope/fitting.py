"""Fits a judge: simulated memories, asked what they hold in other words and what they do not hold, and a regression.

A memory stores the questions of some records, and of half of them what looks like these too, so that facts about one
subject stand side by side. Asked are other wordings and typos, which are right for one stored question, and the
look-alikes that are not stored, which are right for none.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize

from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config, router_layer
from lamini_jax.data import question_pairs
from lamini_jax.data.question_pairs import Related
from lamini_jax.memory.routers import experts
from lamini_jax.memory.scope import CANDIDATES, Scope
from lamini_jax.memory.scope.features import NAMES, RELATION, SUBJECT, features
from lamini_jax.memory.scope.judge import Judge, Linear
from lamini_jax.memory.scope.wordings import Statistics, Words, normalized, read

SIZES = (64, 1000)  # of the simulated memories, in records
SHOWN = (0.05, 0.01, 0.001)
RATES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
_MOST = 2000  # questions of each list that whiten the keys
_RIDGE = 1e-2  # of that whitening, relative to the largest variance
_ROUNDS = 3
_PENALTY = 1e-3  # on squared weights of standardized features, where all pairs together weigh 1


@dataclasses.dataclass(frozen=True)
class Asked:
    """What was asked of one memory, with the candidates (K) found among what it stores."""

    feature_QKX: np.ndarray
    right_QK: np.ndarray  # bool; nowhere for a question that asks for nothing stored
    known_Q: np.ndarray  # bool: whether it asks for something stored
    counted_Q: np.ndarray  # bool: whether it counts for the share of false fires
    fold_Q: np.ndarray  # 0 or 1, by record


def simulate(
    records: Sequence[Related], keys: Callable[[Sequence[str]], np.ndarray], words: Words, size: int, seed: int
) -> Asked:
    """A memory of `size` of the records, and what it is asked. `keys` gives key_FC of texts."""
    rng = np.random.default_rng((seed, size))
    chosen = rng.permutation(len(records))[:size]
    beside = [(*records[i].others, *records[i].siblings) if n % 2 else () for n, i in enumerate(chosen)]
    stored = [records[i].question for i in chosen] + [text for texts in beside for text in texts]
    held = {normalized(text) for text in stored}
    asked = []
    for n, i in enumerate(chosen):
        record, slip = records[i], question_pairs.typo(rng, records[i].question)
        asked += [(text, n, False, i % 2) for text in (*record.rephrased[:2], slip)]
        asked += [(text, -1, True, i % 2) for text in record.others]
        asked += [(text, -1, False, i % 2) for text in record.siblings]
    asked = [one for one in asked if normalized(one[0]) not in held]
    texts, right_Q, counted_Q, fold_Q = (np.array([one[part] for one in asked]) for part in range(4))
    cosine_QF = keys(texts.tolist()) @ keys(stored).T
    candidates_QK = np.argsort(-cosine_QF, axis=1, kind="stable")[:, :CANDIDATES]
    statistics = Statistics(words)
    statistics.add(stored)
    feature_QKX = [
        features(read(text), [read(stored[i]) for i in ids_K], cosine_F[ids_K], statistics)
        for text, ids_K, cosine_F in zip(texts.tolist(), candidates_QK, cosine_QF, strict=True)
    ]
    found = Asked(np.array(feature_QKX), candidates_QK == right_Q[:, None], right_Q >= 0, counted_Q, fold_Q)
    # What a slip makes of a stored question cannot be told from a slip, whatever it was meant to be.
    return _part(found, found.known_Q | (found.feature_QKX[..., NAMES.index("slips")].max(axis=1) == 0))


def fit(memories: Sequence[Asked], weights: Sequence[float], fingerprint: str) -> Judge:
    """The judge of these memories, each of which has a weight in all.

    A question counts with the candidate that is right and with the best of the wrong ones, best by the judge of the
    round before.
    """
    judge = None
    for _ in range(_ROUNDS):
        parts = [_hardest(judge, memory, weight) for memory, weight in zip(memories, weights, strict=True)]
        judge = regress(*(np.concatenate(part) for part in zip(*parts, strict=True)), fingerprint)
    return judge


def _hardest(judge: Judge | None, memory: Asked, weight: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """feature_PX, whether they are right, and weights: half for right ones, most of the rest for unknown questions."""
    score_QK = judge.log_odds(memory.feature_QKX) if judge else memory.feature_QKX[..., NAMES.index("key")]
    score_QK = np.where(memory.right_QK, -np.inf, score_QK)
    wrong_QX = memory.feature_QKX[np.arange(len(score_QK)), score_QK.argmax(axis=1)]
    right_PX, known_Q = memory.feature_QKX[memory.right_QK], memory.known_Q
    groups = (right_PX, 1.0, 0.5), (wrong_QX[~known_Q], 0.0, 0.4), (wrong_QX[known_Q], 0.0, 0.1)
    groups = [(rows, right, share * weight) for rows, right, share in groups if len(rows)]
    sizes = [len(rows) for rows, _, _ in groups]
    return (
        np.concatenate([rows for rows, _, _ in groups]),
        np.repeat([right for _, right, _ in groups], sizes),
        np.repeat([share / len(rows) for rows, _, share in groups], sizes),
    )


def regress(feature_PX: np.ndarray, right_P: np.ndarray, weight_P: np.ndarray, fingerprint: str) -> Judge:
    """Both regressions at once, by the likelihood of their product: which of the two a wrong pair teaches is found out.

    Each feature may only speak in its own direction: what speaks otherwise in one set of questions is an accident of
    it, and misleads in others.
    """
    weight_P = weight_P / weight_P.sum()
    parts = [_standardized(feature_PX, weight_P, directions) for directions in (SUBJECT, RELATION)]
    (subject_PX, *_), (relation_PX, *_) = parts
    split = subject_PX.shape[1] + 1  # weights of each part, then its bias

    penalized_W = np.ones(subject_PX.shape[1] + relation_PX.shape[1] + 2)
    penalized_W[[split - 1, -1]] = 0  # not the biases

    def loss(w):
        score_2P = np.stack([x_PX @ v[:-1] + v[-1] for x_PX, v in ((subject_PX, w[:split]), (relation_PX, w[split:]))])
        log_P = -np.logaddexp(0, -score_2P).sum(axis=0)
        wrong_P = np.maximum(-np.expm1(log_P), 1e-12)
        value = -weight_P @ (right_P * log_P + (1 - right_P) * np.log(wrong_P))
        slope_P = weight_P * ((1 - right_P) * np.exp(log_P) / wrong_P - right_P)
        slope_2P = slope_P / (1 + np.exp(score_2P))
        gradient = [
            x for x_PX, g_P in zip((subject_PX, relation_PX), slope_2P, strict=True) for x in (g_P @ x_PX, g_P.sum())
        ]
        penalty_W = _PENALTY * penalized_W * w
        return value + penalty_W @ w / 2, np.hstack(gradient) + penalty_W

    bounds = [bound for x_PX, *_ in parts for bound in [(0, None)] * x_PX.shape[1] + [(None, None)]]
    start = np.hstack([np.full(split - 1, 0.3), 0.0, np.full(relation_PX.shape[1], 0.3), 1.0])
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    linear = [
        Linear(tuple(names), *(tuple(map(float, x)) for x in (mean, scale, w[:-1] * [*names.values()])), float(w[-1]))
        for names, w, (_, mean, scale) in zip((SUBJECT, RELATION), (found[:split], found[split:]), parts, strict=True)
    ]
    return Judge(fingerprint, *linear)


def _standardized(feature_PX, weight_P, directions: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some of the features, turned so that more of each says more, with mean 0 and variance 1; both of before."""
    own_PX = feature_PX[:, [NAMES.index(name) for name in directions]]
    mean_X = weight_P @ own_PX
    scale_X = np.sqrt(weight_P @ (own_PX - mean_X) ** 2) + 1e-6
    return (own_PX - mean_X) / scale_X * [*directions.values()], mean_X, scale_X


def best(judge: Judge, memory: Asked) -> tuple[np.ndarray, np.ndarray]:
    """score_Q of the best candidate of each question, and whether it is the right one."""
    score_QK = judge.log_odds(memory.feature_QKX)
    questions, best_Q = np.arange(len(score_QK)), score_QK.argmax(axis=1)
    return score_QK[questions, best_Q], memory.right_QK[questions, best_Q]


def cross_fitted(memories: Sequence[Asked], weights: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`best` of each memory, where each half of the records is scored by a judge of the other half."""
    found = [(np.zeros(len(memory.known_Q)), np.zeros(len(memory.known_Q), bool)) for memory in memories]
    for fold in (0, 1):
        other = fit([_part(memory, memory.fold_Q != fold) for memory in memories], weights, "")
        for memory, arrays in zip(memories, found, strict=True):
            for array_Q, best_Q in zip(arrays, best(other, memory), strict=True):
                array_Q[memory.fold_Q == fold] = best_Q[memory.fold_Q == fold]
    return found


def calibrated(judge: Judge, memories: Sequence[Asked], weights: Sequence[float], found) -> Judge:
    """The judge with the thresholds of its false fires, from what `cross_fitted` found."""
    unknown = [score_Q[memory.counted_Q] for memory, (score_Q, _) in zip(memories, found, strict=True)]
    score_Q = np.concatenate(unknown)
    share_Q = np.concatenate([np.full(len(x), weight / len(x)) for x, weight in zip(unknown, weights, strict=True)])
    order = np.argsort(-score_Q)
    fired_Q = np.cumsum(share_Q[order]) / share_Q.sum()
    thresholds = tuple(float(score_Q[order][np.searchsorted(fired_Q, rate)]) for rate in RATES)
    return dataclasses.replace(judge, rates=RATES, thresholds=thresholds)


def _part(memory: Asked, taken_Q: np.ndarray) -> Asked:
    return Asked(*(getattr(memory, field.name)[taken_Q] for field in dataclasses.fields(memory)))


def train(config: Config, model: FrozenModel, sources: Sequence[Sequence[Related]]) -> tuple[Scope, list[str]]:
    """A scope for this backbone from lists of records, each of which counts the same; and lines on how it does."""
    layer, words = router_layer(config), Words(model)
    texts = [record.question for records in sources for record in records[:_MOST]] + question_pairs.unrelated()
    mean_D, transform_DC = experts.whitening(experts.question_features(model, texts, layer), _RIDGE)

    def keys(texts):
        return np.asarray(experts.query(mean_D, transform_DC, experts.question_features(model, texts, layer), 1))

    memories, weights = [], []
    for number, records in enumerate(sources):
        memories += [simulate(records, keys, words, size, number) for size in SIZES]
        weights += [1.0] * len(SIZES)
    found = cross_fitted(memories, weights)
    judge = calibrated(fit(memories, weights, model.fingerprint), memories, weights, found)
    lines = [_told(judge, memory, *scores) for memory, scores in zip(memories, found, strict=True)]
    return Scope(judge, mean_D, transform_DC, layer), lines


def _told(judge: Judge, memory: Asked, score_Q: np.ndarray, right_Q: np.ndarray) -> str:
    """How one memory fares at some thresholds."""
    groups = {
        "found": memory.known_Q,
        "false": memory.counted_Q,
        "false of the same subject": ~memory.known_Q & ~memory.counted_Q,
    }
    told = []
    for rate in SHOWN:
        fired_Q = (score_Q > judge.threshold(rate)) & (right_Q | ~memory.known_Q)
        parts = [f"{name} {fired_Q[group_Q].mean():.1%}" for name, group_Q in groups.items() if group_Q.any()]
        told.append(f"at {rate:.1%}: " + ", ".join(parts))
    return "; ".join(told)
