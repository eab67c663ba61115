"""The router of a memory whose facts come and go: a question selects the one fact that it asks for, or none.

Its key, read from an early layer, is compared with those of all stored wordings by an exact lookup; the scope judges
the few nearest. A question that is in no fact's scope selects nothing: the backbone answers it as if it were alone.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.errors import UserError
from lamini_jax.index import exact
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.memory.scope import CANDIDATES, Scope, wordings
from lamini_jax.memory.scope.wordings import Statistics, Words
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.memory.store import StoredFact
from lamini_jax.runtime import sharded_tables, sharding

NONE = -1  # the number of no fact
_FEW = 64  # wordings for which there is room at least, and which are added without sending all keys again
_AXES = ("keys", None)


@flax.struct.dataclass
class Found:
    """What each question selected, and why: numbers of facts (NONE where there is none), and the scores of the best."""

    expert_ids_BK: np.ndarray
    gates_BK: np.ndarray
    fact_B: np.ndarray  # the fact in whose scope the question is
    best_B: np.ndarray  # the fact with the highest score, whether that is enough or not
    wording_B: np.ndarray  # and which of the wordings it is found by
    score_B: np.ndarray
    runner_up_B: np.ndarray
    runner_up_score_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class FactRouter:
    """Finds facts by their wordings. It is never changed: a memory that changes has another one, which takes over what
    has stayed."""

    scope: Scope
    statistics: Statistics  # of the texts
    facts: list[StoredFact]  # known by their numbers here
    keys: list[np.ndarray]  # of each fact, one for each of its wordings
    places: dict[str, int]  # the number of each fact by its id
    asking: dict[str, tuple[str, ...]]  # ids by each wording, of which case, space and final punctuation do not count
    texts: list[str]  # wordings of the facts that answer, in their order: one that is not certified does not
    fact_W: np.ndarray
    keys_WC: jax.Array  # on the devices, with room so that few sizes compile
    most: int  # the experts that one of these facts has at most

    @classmethod
    def empty(cls, model: FrozenModel, scope: Scope) -> "FactRouter":
        """The router that finds nothing."""
        keys_WC = sharding.put(_table([], _capacity(0), scope.width), *_AXES)
        return cls(scope, Statistics(Words(model)), [], [], {}, {}, [], np.zeros(0, np.int64), keys_WC, 1)

    def changed(self, put: Sequence[tuple[StoredFact, np.ndarray]], forget: Sequence[str]) -> "FactRouter":
        """The router without some facts, and with others, and their keys, in the place of those with the same id."""
        new = [fact for fact, _ in put]
        old = [self.facts[self.places[i]] for i in (*forget, *(fact.id for fact in new)) if i in self.places]
        facts, keys, places, stays = list(self.facts), list(self.keys), dict(self.places), not forget
        for fact, key_WC in put:
            place = places.setdefault(fact.id, len(facts))
            if place < len(self.facts):
                stays &= _found_alike(facts[place], fact) and np.array_equal(keys[place], key_WC)
            facts[place : place + 1], keys[place : place + 1] = [fact], [key_WC]
        if gone := set(forget):
            kept = [place for fact_id, place in places.items() if fact_id not in gone]
            facts, keys = [facts[place] for place in kept], [keys[place] for place in kept]
            places = {fact.id: place for place, fact in enumerate(facts)}
        statistics = self.statistics.copy()
        statistics.remove(text for fact in old if fact.certified for text in fact.wordings)
        statistics.add(text for fact in new if fact.certified for text in fact.wordings)
        asking = _asking(self.asking, old, new)
        router = dataclasses.replace(self, statistics=statistics, facts=facts, keys=keys, places=places, asking=asking)
        return router._read_from(len(self.facts) if stays else 0)

    def _read_from(self, first: int) -> "FactRouter":
        """The router that has read the wordings of its facts from the number `first` on; those before it had been.

        If these are few, they alone are sent to the devices.
        """
        new = [number for number in range(first, len(self.facts)) if self.facts[number].certified]
        keys, count = [self.keys[number] for number in new], int(np.searchsorted(self.fact_W, first))
        added = [text for number in new for text in self.facts[number].wordings]
        size = _capacity(count + len(added))
        if size == len(self.keys_WC) and len(added) <= _FEW:
            keys_WC = _with_keys(self.keys_WC, _table(keys, _FEW, self.scope.width), np.int32(count))
        else:
            before = [key_WC for fact, key_WC in zip(self.facts[:first], self.keys, strict=False) if fact.certified]
            keys_WC = sharding.put(_table(before + keys, size, self.scope.width), *_AXES)
        owner_X = np.repeat(np.array(new, np.int64), [len(key_WC) for key_WC in keys])
        most = max([self.most if first else 1, *(len(self.facts[number].experts) for number in new)])
        texts, fact_W = self.texts[:count] + added, np.concatenate([self.fact_W[:count], owner_X])
        return dataclasses.replace(self, texts=texts, fact_W=fact_W, keys_WC=keys_WC, most=most)

    @property
    def holding(self) -> int:
        """How many facts answer."""
        return int(np.count_nonzero(np.diff(self.fact_W, prepend=NONE)))

    def find(self, model: FrozenModel, prompt_BT, length_B, threshold: float) -> Found:
        """What questions select: of the facts whose score is at least `threshold`, the one with the highest."""
        return self._found(*self.judged(model, prompt_BT, length_B), threshold)

    def judged(self, model: FrozenModel, prompt_BT, length_B) -> tuple[np.ndarray, np.ndarray]:
        """wording_BX and score_BX of the stored wordings nearest to questions."""
        texts, asked = self.texts, own_texts(model, prompt_BT, length_B)
        nearest = _nearest(self.keys_WC, query(model, prompt_BT, length_B, self.scope), np.int32(len(texts)))
        wording_BX, cosine_BX = (np.array(x_BX)[:, : len(texts)] for x_BX in nearest)
        score_BX = np.zeros(wording_BX.shape)
        for row, (text, wording_X) in enumerate(zip(asked, wording_BX, strict=True)):
            if (same := self._same(text)) is not None and same not in wording_X:
                wording_X[-1] = same
            candidates = [wordings.read(texts[wording]) for wording in wording_X]
            arguments = wordings.read(text), candidates, cosine_BX[row], self.statistics
            score_BX[row] = self.scope.judge.scores(*arguments) if candidates else ()
        return wording_BX, score_BX

    def _same(self, text: str) -> int | None:
        """The last wording that equals a text but for case, space and final punctuation."""
        same = wordings.normalized(text)
        for fact in (self.facts[self.places[fact_id]] for fact_id in reversed(self.asking.get(same, ()))):
            if fact.certified:
                own = [number for number, wording in enumerate(fact.wordings) if wordings.normalized(wording) == same]
                return int(np.searchsorted(self.fact_W, self.places[fact.id])) + own[-1]
        return None

    def handing(self, fact_B: np.ndarray) -> Found:
        """The same for questions that are told their facts; NONE for those that are told none."""
        told_B1 = np.asarray(fact_B)[:, None]
        first_B1 = np.searchsorted(self.fact_W, told_B1)  # of the wordings of a fact; they are in its order
        return self._found(np.where(told_B1 == NONE, NONE, first_B1), np.where(told_B1 == NONE, -np.inf, np.inf), 0.0)

    def _found(self, wording_BX: np.ndarray, score_BX: np.ndarray, threshold: float) -> Found:
        B = len(wording_BX)
        if not wording_BX.size:
            wording_BX, score_BX = np.full((B, 1), NONE), np.full((B, 1), -np.inf)
        fact_BX = np.where(wording_BX == NONE, NONE, self.fact_W[wording_BX]) if self.texts else wording_BX
        rows, order_BX = np.arange(B), np.argsort(-score_BX, axis=1, kind="stable")
        best_B, score_B, wording_B = (x_BX[rows, order_BX[:, 0]] for x_BX in (fact_BX, score_BX, wording_BX))
        # Several wordings of one fact do not compete.
        other_BX = np.where(fact_BX == best_B[:, None], -np.inf, score_BX)
        second_B = other_BX.argmax(axis=1)
        runner_up_score_B = other_BX[rows, second_B]
        runner_up_B = np.where(np.isfinite(runner_up_score_B), fact_BX[rows, second_B], NONE)
        fact_B = np.where(score_B >= threshold, best_B, NONE)
        ids_BK, gates_BK = np.full((B, self.most), EMPTY_SLOT, np.int32), np.zeros((B, self.most), np.float32)
        for row in np.flatnonzero(fact_B != NONE):
            given = self.facts[fact_B[row]].experts
            ids_BK[row, : len(given)], gates_BK[row, : len(given)] = given, len(given) ** -0.5
        return Found(ids_BK, gates_BK, fact_B, best_B, wording_B, score_B, runner_up_B, runner_up_score_B)


def keys(model: FrozenModel, texts: Sequence[str], scope: Scope) -> np.ndarray:
    """key_WC of wordings, as they are kept."""
    if not texts:
        return np.zeros((0, scope.width), np.float16)
    key_WC = frozen_model.map_questions(model, texts, functools.partial(query, model, scope=scope))
    if not np.isfinite(key_WC).all():
        bad = texts[int(np.flatnonzero(~np.isfinite(key_WC).all(axis=1))[0])]
        raise UserError(f"the backbone makes NaN of the question {bad!r}")
    return key_WC.astype(np.float16)


def query(model: FrozenModel, prompt_BT, length_B, scope: Scope):
    """query_BC of questions, of unit length."""
    return _query(model, prompt_BT, length_B, scope.mean_D, scope.transform_DC, scope.layer)


def own_texts(model: FrozenModel, prompt_BT, length_B) -> list[str]:
    """The questions in prompts, without what the prompt's format adds to them."""
    frame, prompts = model.tokenizer.frame, zip(np.asarray(prompt_BT), np.asarray(length_B), strict=True)
    return [model.tokenizer.decode(prompt_T[frame.before : length - frame.after]) for prompt_T, length in prompts]


def train(config: Config, model: FrozenModel, questions: Sequence[str]):
    """Refuses, because studies of the paper tune experts that questions select by chance."""
    raise UserError("--config.router.kind=facts: is for tune and ask; here it must be experts")


def _found_alike(one: StoredFact, other: StoredFact) -> bool:
    """Whether two facts with the same keys are found alike, and have as many experts."""
    found = [(fact.certified, fact.wordings, len(fact.experts)) for fact in (one, other)]
    return found[0] == found[1]


def _asking(
    asking: dict[str, tuple[str, ...]], old: Sequence[StoredFact], new: Sequence[StoredFact]
) -> dict[str, tuple[str, ...]]:
    """Ids by wording, when some facts are gone and others have come."""
    asking = dict(asking)
    for fact in old:
        for same in {wordings.normalized(text) for text in fact.wordings}:
            left = tuple(fact_id for fact_id in asking.pop(same) if fact_id != fact.id)
            if left:
                asking[same] = left
    for fact in new:
        for same in {wordings.normalized(text) for text in fact.wordings}:
            asking[same] = (*asking.get(same, ()), fact.id)
    return asking


def _capacity(count: int) -> int:
    return sharding.round_up(max(_FEW, 1 << (count - 1).bit_length() if count else 0), "keys")


def _table(keys: Sequence[np.ndarray], size: int, width: int) -> np.ndarray:
    """key_XC: so many rows, of which the first are these keys."""
    key_XC = np.zeros((size, width), np.float32)
    if keys:
        np.concatenate(keys, out=key_XC[: sum(map(len, keys))])
    return key_XC


@jax.jit
def _with_keys(keys_WC, key_XC, first):
    """The keys with others from the row `first` on; each device keeps those in its own rows."""

    def local(shard, keys_wC, key_XC, first):
        rows = keys_wC.shape[0]
        own_X = first + jnp.arange(key_XC.shape[0]) - (jax.lax.axis_index(sharding.AXES) * rows if shard.sharded else 0)
        return keys_wC.at[jnp.where(own_X < 0, rows, own_X)].set(key_XC, mode="drop")

    return sharded_tables.on_shards(local, (_AXES, (), ()), _AXES)(keys_WC, key_XC, first)


@functools.partial(jax.jit, static_argnames="layer")
def _query(model: FrozenModel, prompt_BT, length_B, mean_D, transform_DC, layer: int):
    feature_BD = expert_router.features(model, prompt_BT, length_B, layer)
    return expert_router.query(mean_D, transform_DC, feature_BD, exact.QUERY_PARTS)


@jax.jit
def _nearest(keys_WC, query_BC, count):
    """The nearest of the first `count` keys, the best first."""
    return exact.find(keys_WC, sharding.constrain(query_BC), CANDIDATES, count)
