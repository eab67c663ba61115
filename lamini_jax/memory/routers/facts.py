"""The router of a memory whose facts come and go: a question selects the one fact that it asks for, or none.

Its key, read from an early layer, is compared with those of all stored wordings by an exact lookup; the scope judges
the few nearest. A question that is in no fact's scope selects nothing: the backbone answers it as if it were alone.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax
import jax
import numpy as np

from lamini_jax.backbone import frozen_model
from lamini_jax.backbone.frozen_model import FrozenModel
from lamini_jax.config import Config
from lamini_jax.errors import UserError
from lamini_jax.index import exact
from lamini_jax.memory.routers import experts as expert_router
from lamini_jax.memory.scope import CANDIDATES, Scope, wordings
from lamini_jax.memory.scope.wordings import Statistics
from lamini_jax.memory.slots import EMPTY_SLOT
from lamini_jax.runtime import sharding

NONE = -1  # the number of no fact


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


class Wordings(NamedTuple):
    """The wordings under which facts are found: their texts, keys, and the numbers of their facts."""

    texts: list[str]
    key_WC: np.ndarray  # float16
    fact_W: np.ndarray


class FactRouter:
    """Finds facts by their wordings. It is never changed: a memory that changes has another one."""

    def __init__(self, scope: Scope, statistics: Statistics, wordings: Wordings, experts_F: Sequence[Sequence[int]]):
        """`statistics` are those of the wordings' texts; `experts_F` are the experts of each fact."""
        self.scope, self.statistics, self.wordings, self.experts_F = scope, statistics, wordings, experts_F
        capacity = _capacity(len(wordings.texts))  # so that few sizes compile
        key_WC = np.zeros((sharding.round_up(capacity, "keys"), scope.width), np.float32)
        key_WC[: len(wordings.texts)] = wordings.key_WC
        self._keys = sharding.put(key_WC, "keys", None)
        self._most = max(map(len, experts_F), default=1)

    def find(self, model: FrozenModel, prompt_BT, length_B, threshold: float) -> Found:
        """What questions select: of the facts whose score is at least `threshold`, the one with the highest."""
        texts, asked = self.wordings.texts, own_texts(model, prompt_BT, length_B)
        nearest = _nearest(self._keys, query(model, prompt_BT, length_B, self.scope), np.int32(len(texts)))
        wording_BX, cosine_BX = (np.array(x_BX)[:, : len(texts)] for x_BX in nearest)
        score_BX = np.zeros(wording_BX.shape)
        for row, (text, wording_X) in enumerate(zip(asked, wording_BX, strict=True)):
            if (same := self.same.get(wordings.normalized(text))) is not None and same not in wording_X:
                wording_X[-1] = same
            candidates = [wordings.read(texts[wording]) for wording in wording_X]
            arguments = wordings.read(text), candidates, cosine_BX[row], self.statistics
            score_BX[row] = self.scope.judge.scores(*arguments) if candidates else ()
        return self._found(wording_BX, score_BX, threshold)

    @functools.cached_property
    def same(self) -> dict[str, int]:
        """The wording of each text, of which case, space and final punctuation do not count."""
        return {wordings.normalized(text): number for number, text in enumerate(self.wordings.texts)}

    def handing(self, fact_B: np.ndarray) -> Found:
        """The same for questions that are told their facts; NONE for those that are told none."""
        told_B1 = np.asarray(fact_B)[:, None]
        first_B1 = np.searchsorted(self.wordings.fact_W, told_B1)  # of the wordings of a fact; they are in its order
        return self._found(np.where(told_B1 == NONE, NONE, first_B1), np.where(told_B1 == NONE, -np.inf, np.inf), 0.0)

    def _found(self, wording_BX: np.ndarray, score_BX: np.ndarray, threshold: float) -> Found:
        B = len(wording_BX)
        if not wording_BX.size:
            wording_BX, score_BX = np.full((B, 1), NONE), np.full((B, 1), -np.inf)
        fact_BX = np.append(self.wordings.fact_W, NONE)[wording_BX]  # that of NONE, which is -1, is NONE
        rows, order_BX = np.arange(B), np.argsort(-score_BX, axis=1, kind="stable")
        best_B, score_B, wording_B = (x_BX[rows, order_BX[:, 0]] for x_BX in (fact_BX, score_BX, wording_BX))
        # Several wordings of one fact do not compete.
        other_BX = np.where(fact_BX == best_B[:, None], -np.inf, score_BX)
        second_B = other_BX.argmax(axis=1)
        runner_up_score_B = other_BX[rows, second_B]
        runner_up_B = np.where(np.isfinite(runner_up_score_B), fact_BX[rows, second_B], NONE)
        fact_B = np.where(score_B >= threshold, best_B, NONE)
        ids_BK, gates_BK = np.full((B, self._most), EMPTY_SLOT, np.int32), np.zeros((B, self._most), np.float32)
        for row in np.flatnonzero(fact_B != NONE):
            given = self.experts_F[fact_B[row]]
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


def _capacity(count: int) -> int:
    return max(64, 1 << (count - 1).bit_length() if count else 0)


@functools.partial(jax.jit, static_argnames="layer")
def _query(model: FrozenModel, prompt_BT, length_B, mean_D, transform_DC, layer: int):
    feature_BD = expert_router.features(model, prompt_BT, length_B, layer)
    return expert_router.query(mean_D, transform_DC, feature_BD, exact.QUERY_PARTS)


@jax.jit
def _nearest(keys_WC, query_BC, count):
    """The nearest of the first `count` keys, the best first."""
    return exact.find(keys_WC, sharding.constrain(query_BC), CANDIDATES, count)
