"""Wordings of questions as the scope compares them: their words, what these mean, and how often they are stored."""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable

import numpy as np

from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.data import calibration, world
from lamini_jax.runtime import sharded_tables, user_cache

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’]s$", re.IGNORECASE)
_SENTENCES = re.compile(r"(?<=\w\w\w[.?!])\s+|\n+")  # "J. Smith" and "Dr. No" are one sentence
_MOST_SENTENCES = 4
# A memory of eight facts knows nothing about words, so that many questions that nobody stored count beside it.
_BACKGROUND = 500
_GENERATED, _OFTEN = 2048, 5  # generated questions behind the background, and how many have a word that counts
_PRIOR = 500.0  # the questions for which the tokenizer's opinion of a word counts
_RAREST = 2e-6  # the share of questions that have a word of several tokens
_FIRST = 256  # tokens before the first word, in a vocabulary that begins with bytes
_RIDGE = 1e-2  # of the largest variance of embeddings
_MOST_ROWS = 20_000  # of the embeddings, for their covariance


@dataclasses.dataclass(frozen=True)
class Wording:
    """One text: its sentences, each a list of words, and which of these are named (have a capital or a digit)."""

    text: str
    same: str  # equal for texts that count as one wording: case, space and final punctuation do not tell them apart
    sentences: tuple[tuple[str, ...], ...]
    named: frozenset[str]
    nameless: bool  # `named` are the words of a noun phrase then

    @functools.cached_property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """The words of all its runs of sentences, the whole text first: a question may stand beside other text."""
        count = len(self.sentences)
        spans = sorted(((i, j) for i in range(count) for j in range(i + 1, count + 1)), key=lambda s: s[0] - s[1])
        return tuple(tuple(word for words in self.sentences[i:j] for word in words) for i, j in spans)


@functools.lru_cache(maxsize=1 << 17)
def normalized(text: str) -> str:
    """The text without what does not make it another question: case, space and final punctuation."""
    return " ".join(text.casefold().split()).rstrip(" .?!:;,…")


@functools.lru_cache(maxsize=1 << 14)
def read(text: str) -> Wording:
    """The wording of a text; any text has one."""
    parts = [part for part in _SENTENCES.split(text) if _WORD.search(part)]
    parts = parts[: 1 - _MOST_SENTENCES] + [" ".join(parts[1 - _MOST_SENTENCES :])] if len(parts) > 4 else parts
    found = [_split(part) for part in parts]
    named = {word.casefold() for words in found for word in words if word != word.lower() or not word.isalpha()}
    # The first word of a sentence has a capital in any case.
    first = {words[0].casefold() for words in found} & _COMMON_FIRST
    sentences = tuple(tuple(word.casefold() for word in words) for words in found)
    subject = named - first or {word for words in sentences for word in _noun_phrase(words)}
    return Wording(text, normalized(text), sentences or ((),), frozenset(subject), not named - first)


def _noun_phrase(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words after the last article, or else after the last preposition, that are likely to be a sentence's subject
    matter."""
    for marks in (_ARTICLES, _PREPOSITIONS):
        starts = [i + 1 for i, word in enumerate(words) if word in marks and words[i + 1 : i + 2]]
        for start in reversed(starts):
            rest = words[start:]
            end = next((i for i, word in enumerate(rest) if word in _ENDS), len(rest))
            if end:
                return rest[:end]
    return words[-1:]


_ARTICLES = frozenset("the our my your his her their its a an this that these those".split())
_PREPOSITIONS = frozenset("of for in on at to from by with about behind under over near into onto after before".split())
_ENDS = _ARTICLES.union(
    _PREPOSITIONS,
    "is are was were be been has have had do does did can could may might must should will would shall".split(),
    "and or if when where who what which how why that not i we you he she it they me us him them need get".split(),
)
_COMMON_FIRST = frozenset(
    "what which who whom whose when where why how is are was were do does did can could in on at to of for from by the "
    "a an name tell say write give list explain find if it they he she i with under during after before as and".split()
)


class Words:
    """What a backbone knows of single words: how common they are, and what they mean."""

    def __init__(self, model: FrozenModel):
        self._encode = model.tokenizer.encode
        embedding_VD = sharded_tables.whole(model.params["embedding"]).astype(np.float32)
        self._centred_VD = embedding_VD - embedding_VD.mean(axis=0)
        name = f"words/{model.fingerprint}-{_MOST_ROWS}-{_RIDGE}"
        self._whitening_DC = user_cache.array(name, self._whiten) if model.fingerprint else self._whiten()
        self.share = functools.lru_cache(maxsize=1 << 17)(self._share)
        self.meaning = functools.lru_cache(maxsize=1 << 14)(self._meaning)

    def _whiten(self) -> np.ndarray:
        """whitening_DC of the embeddings: few directions hold most of what they have in common."""
        variances_D, axes_DD = np.linalg.eigh(np.cov(self._centred_VD[:_MOST_ROWS], rowvar=False))
        return axes_DD / np.sqrt(np.maximum(variances_D, 0) + _RIDGE * variances_D.max())

    def _share(self, word: str) -> float:
        """The share of questions that have a word, by Zipf's law if it is one token: vocabularies begin with common
        ones."""
        rank = min((ids[0] for ids in self._tokens(word) if len(ids) == 1), default=0)
        return min(1 / max(rank - _FIRST, 4), 0.25) if rank else _RAREST

    def _meaning(self, word: str) -> np.ndarray:
        """meaning_C of unit length: the whitened embedding of the word, or the mean of its parts'."""
        written = self._tokens(word)
        ids = next((ids for ids in written if len(ids) == 1), written[0])
        meaning_C = self._centred_VD[ids].mean(axis=0) @ self._whitening_DC
        return meaning_C / (np.linalg.norm(meaning_C) + 1e-6)

    def weight(self, word: str) -> float:
        """What a word tells where nothing is stored."""
        counts, size = _background()
        return math.log((size + _PRIOR) / (counts.get(word, 0.0) + _PRIOR * self.share(word)))

    def _tokens(self, word: str) -> list[list[int]]:
        return [self._encode(f" {written}") for written in (word, word.capitalize())]


class Statistics:
    """In how many of the stored wordings each word occurs, beside a background that never changes."""

    def __init__(self, words: Words):
        self.words = words
        self.count = 0
        self._stored: collections.Counter[str] = collections.Counter()

    def add(self, texts: Iterable[str], times: int = 1) -> None:
        """Counts these wordings in."""
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            self.count += times
            counts.update(_words(text))
        for word, count in counts.items():
            self._stored[word] += times * count
            if not self._stored[word]:
                del self._stored[word]

    def remove(self, texts: Iterable[str]) -> None:
        """Counts wordings out that had been added; nothing of them is left."""
        self.add(texts, times=-1)

    def copy(self) -> "Statistics":
        """The same statistics, to be changed apart."""
        other = Statistics(self.words)
        other.count, other._stored = self.count, self._stored.copy()
        return other

    def weight(self, word: str) -> float:
        """What a word tells: minus the logarithm of the share of questions that have it, about 1 to 15."""
        counts, size = _background()
        seen = self._stored[word] + counts.get(word, 0.0) + _PRIOR * self.words.share(word)
        return math.log((self.count + size + _PRIOR) / seen)

    @property
    def most(self) -> float:
        """The weight of a word that nobody has written."""
        return math.log((self.count + _background()[1] + _PRIOR) / (_PRIOR * _RAREST))


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _split(text)}


def _split(text: str) -> list[str]:
    """The words of a text, without the 's of a possessive."""
    return [_POSSESSIVE.sub("", word) for word in _WORD.findall(text)]


@functools.cache
def _background() -> tuple[dict[str, float], float]:
    """By word, in how many of the background's questions it occurs; and their number."""
    texts = calibration.questions(_GENERATED, 0)
    texts += [qa.question for qa in itertools.islice(world.training_stream(0), _GENERATED)]
    counts = collections.Counter(word for text in texts for word in _words(text))
    share = _BACKGROUND / len(texts)
    return {word: count * share for word, count in counts.items() if count >= _OFTEN}, float(_BACKGROUND)
