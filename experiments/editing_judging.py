"""How answers and findings of `editing` are judged, alike for the memory and for its rivals: shares and intervals.

A system finds for each question the stored fact that is likeliest to be asked for, with a score, and answers with what
it keeps of that fact, or without any fact. The same scores are judged at several rates of false fires: a threshold lets
that share of the questions pass that nobody stored, but that are most like stored ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.editing_questions import NO_FACT, Asked
from lamini_jax.evaluation import intervals

RATES = (0.05, 0.01, 0.001)  # of false fires
OWN_RATE = 0.01  # at which a system works that brings no threshold of its own
_CURVE_END, _CURVE_POINTS = 0.2, 60


class Found(NamedTuple):
    """Of some questions the nearest fact, or NO_FACT, how near it is, and whether a system would use it."""

    index_Q: np.ndarray
    score_Q: np.ndarray
    fires_Q: np.ndarray | None = None  # None: where the score is above the threshold at OWN_RATE


class System(Protocol):
    """What is judged."""

    def find(self, questions: Sequence[str]) -> Found:
        """The nearest fact of each question."""

    def answer(self, questions: Sequence[str], index_Q: Sequence[int]) -> list[str]:
        """The answer to each question with this fact, or as without facts where it is NO_FACT."""


def threshold_at(scores: Sequence[float], rate: float) -> float:
    """The least threshold above which at most this share of some scores lies; -inf if there are no scores."""
    falling = np.sort(np.asarray(scores, float))[::-1]
    passing = math.floor(rate * falling.size + 1e-9)
    return float(falling[passing]) if passing < falling.size else -math.inf


def recall_at(others: Sequence[float], asked: Sequence[float], right: Sequence[bool]) -> dict[str, list[bool]]:
    """By rate of false fires on `others`, which questions are found at that threshold and answered right."""
    if not len(others):
        return {}
    above = {rate: np.asarray(asked, float) > threshold_at(others, rate) for rate in RATES}
    return {str(rate): (above_Q & np.asarray(right, bool)).tolist() for rate, above_Q in above.items()}


def curve(others: Sequence[float], asked: Sequence[float], right: Sequence[bool]) -> list[list[float]]:
    """Pairs of a rate of false fires and the recall at its threshold, up to a fifth of the questions."""
    if not len(others) or not len(asked):
        return []
    counts = np.unique(np.linspace(0, math.floor(_CURVE_END * len(others)), _CURVE_POINTS).round().astype(int))
    points = []
    for count in counts.tolist():
        least = threshold_at(others, count / len(others))
        recalled_Q = (np.asarray(asked, float) > least) & np.asarray(right, bool)
        points.append([float(np.mean(np.asarray(others, float) > least)), float(np.mean(recalled_Q))])
    return points


def with_intervals(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Shares in place of a tree's lists of booleans, None in place of empty ones, and beside them `intervals`."""
    found = _mapped(flags, lambda some: float(np.mean(some)))
    return {**found, "intervals": _mapped(flags, lambda some: intervals.wilson(int(np.sum(some)), len(some)))}


def _mapped(tree: Mapping[str, Any], function: Callable[[Sequence[bool]], Any]) -> dict[str, Any]:
    def of(value):
        return _mapped(value, function) if isinstance(value, Mapping) else function(value) if len(value) else None

    return {name: of(value) for name, value in tree.items()}


def judge(system: System, asked: Asked, given: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """What a system answers to questions about stored facts, and how often it takes others for such.

    `given` are answers to all questions of a kind that are known already.
    """
    strangers = {kind: system.find(texts) for kind, texts in asked.strangers.items()}
    others = strangers[asked.near].score_Q if asked.near in strangers else np.array([])
    least = threshold_at(others, OWN_RATE)
    fired = {kind: _fires(found, least) for kind, found in strangers.items()}
    flags: dict[str, Any] = {"false_fires": fired, "wrong_fact": [], "contained": {}}
    more = {}
    for kind, pairs in asked.about.items():
        texts, facts = [text for text, _ in pairs], np.array([fact for _, fact in pairs], int)
        found = system.find(texts)
        fires_Q = _fires(found, least)
        told = (given or {}).get(kind) or system.answer(texts, np.where(fires_Q, found.index_Q, NO_FACT).tolist())
        flags[kind], flags["contained"][kind] = exact(told, asked, facts), contained(told, asked, facts)
        flags["wrong_fact"] += (fires_Q & (found.index_Q != facts)).tolist()
        if kind == "rephrased":
            handed = _handed(system, texts, found, fires_Q, told)
            scored = others, found.score_Q, exact(handed, asked, facts)
            flags["recall_at"], more["curve"] = recall_at(*scored), curve(*scored)
    return {**with_intervals(flags), **more, "asked": counts(asked)}


def judge_model(tell: Callable[[Sequence[str]], list[str]], asked: Asked) -> dict[str, Any]:
    """The same of a model that answers every question by itself, and so never fires."""
    flags: dict[str, Any] = {"contained": {}}
    for kind, pairs in asked.about.items():
        told, facts = tell([text for text, _ in pairs]), [fact for _, fact in pairs]
        flags[kind], flags["contained"][kind] = exact(told, asked, facts), contained(told, asked, facts)
    return {**with_intervals(flags), "asked": {kind: len(pairs) for kind, pairs in asked.about.items()}}


def exact(texts: Sequence[str], asked: Asked, facts: Sequence[int]) -> list[bool]:
    """Which texts are the answers of these facts."""
    return [text == asked.facts[fact].answer for text, fact in zip(texts, facts, strict=True)]


def contained(texts: Sequence[str], asked: Asked, facts: Sequence[int]) -> list[bool]:
    """In which texts the answers of these facts occur, whatever else they say."""
    return [asked.facts[fact].answer in text for text, fact in zip(texts, facts, strict=True)]


def counts(asked: Asked) -> dict[str, int]:
    """How many questions of each kind are asked."""
    return {kind: len(some) for kind, some in (asked.about | asked.strangers).items()}


def _fires(found: Found, least: float) -> np.ndarray:
    return found.score_Q > least if found.fires_Q is None else found.fires_Q


def _handed(system: System, texts: list[str], found: Found, fires_Q: np.ndarray, told: Sequence[str]) -> list[str]:
    """The answers with the nearest fact of each question, also where it did not fire."""
    missing = np.flatnonzero(~fires_Q).tolist()
    index = [int(found.index_Q[i]) for i in missing]
    more = system.answer([texts[i] for i in missing], index) if missing else []
    handed = dict(enumerate(told)) | dict(zip(missing, more, strict=True))
    return [handed[i] for i in range(len(texts))]
