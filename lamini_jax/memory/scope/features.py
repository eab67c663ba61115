"""What tells whether a question asks for a stored fact: numbers of a pair of wordings, computed with numpy alone."""

import functools
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

from lamini_jax.memory.scope.wordings import Statistics, Wording, Words

Weights = dict[str, float]  # by word
# What tells whether both are about the same, and whether they ask the same of it; by name, in which direction: +1 for
# what is larger for such pairs, -1 for what is smaller.
SUBJECT = {
    "key": 1,  # cosine of the keys
    "letters": 1,  # cosine of letter triples, each with its word's weight
    "slips": 1,  # near 1 for two texts that differ in a letter or two, 0 for others
    "outside": 1,  # share of the asked text beside the sentences that are compared, which make keys differ
    "asked_names": -1,  # share of the asked names' weight that the stored wording lacks
    "stored_names": -1,  # share of the stored names' weight that the asked wording lacks
    "stored_name": -1,  # the weight of the rarest of these names
    "nameless": -1,  # 1 if the stored wording has no names
}
RELATION = {
    "slips": 1,
    "meaning": 1,  # cosine of the weighted sums of meanings of the words that are no names
    "told": 1,  # the best cosine of the stored wording's rarest such word with an asked one
    "stored_rest": -1,  # share of such words' weight that the asked wording lacks
    "stored_word": -1,  # the weight of the rarest of them
    "asked_word": -1,
    "opening": -1,  # 1 if both begin with a question word, and not the same
}
NAMES = tuple(dict.fromkeys((*SUBJECT, *RELATION)))
_MOST_EDITS, _SHORTEST = 2, 3  # slips of a text, and letters of a word that has one
_DIGITS = re.compile(r"\d+")
_OPENINGS = frozenset("what which who whom whose when where why how".split())


def features(asked: Wording, candidates: Sequence[Wording], cosine_K: np.ndarray, statistics: Statistics) -> np.ndarray:
    """feature_KX of one asked question and its K candidates, in the order of NAMES.

    `cosine_K` is that of their keys.
    """
    weight = functools.cache(statistics.weight)
    rows = [_pair(asked, stored, weight, statistics) for stored in candidates]
    table_KX = [
        [{**row, "key": float(cosine)}[name] for name in NAMES] for row, cosine in zip(rows, cosine_K, strict=True)
    ]
    return np.array(table_KX).reshape(len(rows), len(NAMES))


def _pair(asked: Wording, stored: Wording, weight: Callable, statistics: Statistics) -> dict[str, float]:
    b = {word: weight(word) for word in stored.runs[0]}
    runs = [{word: weight(word) for word in run} for run in asked.runs]
    a = max(runs, key=lambda run: _overlap(run, b))  # of equal ones the longest
    names = asked.named | stored.named
    slips = _slips(asked.same, stored.same, names)
    # In other words, a name that differs in a letter is another name.
    alike_a, alike_b = _matches(a, b, () if slips else names)
    lacks_a, lacks_b = ({w: v * (1 - s[w]) for w, v in x.items()} for x, s in ((a, alike_a), (b, alike_b)))
    (name_a, rest_a), (name_b, rest_b) = _split(a, names), _split(b, names)
    meaning, told = _meanings(rest_a, rest_b, statistics.words)
    openings = {next(iter(a), ""), next(iter(b), "")}
    return {
        "letters": _letters(a, b),
        "slips": slips,
        "outside": 1 - sum(a.values()) / max(sum(runs[0].values()), 1e-9),
        "asked_names": _share(lacks_a, name_a),
        "stored_names": _share(lacks_b, name_b),
        "stored_name": _rarest(lacks_b, name_b) / statistics.most,
        "nameless": float(stored.nameless),
        "meaning": meaning,
        "told": told,
        "stored_rest": _share(lacks_b, rest_b),
        "stored_word": _rarest(lacks_b, rest_b) / statistics.most,
        "asked_word": _rarest(lacks_a, rest_a) / statistics.most,
        "opening": float(len(openings) == 2 and openings <= _OPENINGS),
    }


def _split(weights: Weights, names: Collection[str]) -> tuple[Weights, Weights]:
    """The names among some words, and the others."""
    return {w: v for w, v in weights.items() if w in names}, {w: v for w, v in weights.items() if w not in names}


def _share(lacks: Weights, of: Weights) -> float:
    return sum(lacks[w] for w in of) / max(sum(of.values()), 1e-9)


def _rarest(lacks: Weights, of: Weights) -> float:
    return max((lacks[w] for w in of), default=0.0)


def _meanings(a: Weights, b: Weights, words: Words) -> tuple[float, float]:
    """The cosine of two lists of words, and the best one of the second's rarest word with one of the first."""
    if not a or not b:
        return 0.0, 0.0
    meaning_AC, meaning_BC = (np.stack([words.meaning(word) for word in x]) for x in (a, b))
    # Words that many stored questions ask with tell no less what is asked.
    weight_A, weight_B = (np.array([words.weight(word) for word in x]) for x in (a, b))
    sum_a, sum_b = weight_A @ meaning_AC, weight_B @ meaning_BC
    cosine = sum_a @ sum_b / (np.linalg.norm(sum_a) * np.linalg.norm(sum_b) + 1e-6)
    return float(cosine), float((meaning_AC @ meaning_BC[weight_B.argmax()]).max())


def _overlap(a: Weights, b: Weights) -> float:
    return 2 * sum(v for w, v in a.items() if w in b) / max(sum(a.values()) + sum(b.values()), 1e-9)


def _matches(a: Weights, b: Weights, strict: Collection[str]) -> tuple[Weights, Weights]:
    """By word of either, how alike its nearest word of the other is; words in `strict` are only like themselves."""
    alike_a, alike_b = ({w: float(w in y) for w in x} for x, y in ((a, b), (b, a)))
    for w in [w for w in a if w not in b and w not in strict]:
        for v in [v for v in b if v not in a and v not in strict]:
            alike = _alike(w, v)
            alike_a[w], alike_b[v] = max(alike_a[w], alike), max(alike_b[v], alike)
    return alike_a, alike_b


@functools.lru_cache(maxsize=1 << 16)
def _alike(w: str, v: str) -> float:
    """1 for equal words, less for words that one or two slips make of each other, and 0 for others."""
    longest = max(len(w), len(v))
    most = 0 if longest < 4 else 1 if longest < 7 else 2
    distance = edits(w, v, most)
    return 1 - 0.1 * distance if distance <= most else 0.0


def edits(a: str, b: str, most: int) -> int:
    """The number of letters swapped, dropped, added or replaced that makes one text of the other; at most `most` + 1.

    Damerau and Levenshtein's distance (of non-overlapping edits) in a band, after what both begin and end with.
    """
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    a, b = a[start:], b[start:]
    end = 0
    while end < min(len(a), len(b)) and a[-1 - end] == b[-1 - end]:
        end += 1
    a, b = a[: len(a) - end], b[: len(b) - end]
    if not a or not b or abs(len(a) - len(b)) > most:
        return min(max(len(a), len(b)), most + 1)
    before, last = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i] + [most + 1] * len(b)
        for j in range(max(1, i - most), min(len(b), i + most) + 1):
            row[j] = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != b[j - 1]))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == b[j - 1]:
                row[j] = min(row[j], before[j - 2] + 1)
        if min(row) > most:
            return most + 1
        before, last = last, row
    return min(last[-1], most + 1)


def _slips(a: str, b: str, names: Collection[str]) -> float:
    """Falls with the slips that make one text of the other: 1 for none, 0 for more than two and for another number."""
    total = edits(a, b, _MOST_EDITS)
    if total > _MOST_EDITS or _DIGITS.findall(a) != _DIGITS.findall(b):  # another number is another question
        return 0.0
    x, y = a.split(), b.split()
    pairs = [pair for pair in zip(x, y, strict=False) if len(set(pair)) == 2] if len(x) == len(y) else []
    if any(max(map(len, pair)) < _SHORTEST and not names.isdisjoint(pair) for pair in pairs):
        return 0.0  # in a short name, another letter makes another name
    # Two slips in one word are rare, and names that differ in two letters are not.
    return float(np.exp(-(2 * total if total == 2 and len(pairs) == 1 else total) / 2))


def _letters(a: Weights, b: Weights) -> float:
    x, y = _triples(a), _triples(b)
    return sum(v * y[t] for t, v in x.items() if t in y) / (_norm(x) * _norm(y) + 1e-9)


def _triples(a: Weights) -> Weights:
    found: Weights = {}
    for word, weight in a.items():
        padded = f" {word} "
        for i in range(len(padded) - 2):
            found[padded[i : i + 3]] = max(found.get(padded[i : i + 3], 0.0), weight)
    return found


def _norm(a: Weights) -> float:
    return sum(v * v for v in a.values()) ** 0.5
