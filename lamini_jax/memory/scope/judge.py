"""The judge: whether a question asks for a stored fact, in log-odds, and from which log-odds on it counts."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from lamini_jax.errors import UserError
from lamini_jax.memory.scope.features import NAMES, features
from lamini_jax.memory.scope.wordings import Statistics, Wording

FORMAT = 1
_COMMAND = "python -m lamini_jax.train_scope"


@dataclasses.dataclass(frozen=True)
class Linear:
    """Log-odds that are linear in some of the features, which are standardized."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def __call__(self, feature_X: np.ndarray) -> np.ndarray:
        """The log-odds of arrays of features, whose last axis is in the order of NAMES."""
        # A sum and no product of matrices, and of numbers that lie side by side: otherwise the last bit depends on how
        # many rows there are.
        own_X = np.ascontiguousarray(feature_X[..., [NAMES.index(name) for name in self.names]])
        return ((own_X - self.mean) / self.scale * self.weights).sum(axis=-1) + self.bias


@dataclasses.dataclass(frozen=True)
class Judge:
    """A question asks for a fact if both are about the same, and if it asks the same of it: two regressions, of which
    the probabilities are multiplied. All of it is frozen beside one backbone."""

    fingerprint: str  # of the backbone
    subject: Linear
    relation: Linear
    # Shares, falling, of the look-alike questions of the training that fire, and the scores above which they do;
    # measured on questions that the coefficients were not fitted to.
    rates: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()

    def log_odds(self, feature_X: np.ndarray) -> np.ndarray:
        """Those of the product of both probabilities."""
        no_subject, no_relation = -self.subject(feature_X), -self.relation(feature_X)
        return -np.logaddexp(np.logaddexp(no_subject, no_relation), no_subject + no_relation)

    def scores(
        self, asked: Wording, candidates: Sequence[Wording], cosine_K: np.ndarray, statistics: Statistics
    ) -> np.ndarray:
        """score_K of the candidates; infinite for one that is the asked wording itself."""
        score_K = self.log_odds(features(asked, candidates, cosine_K, statistics))
        return np.where([stored.same == asked.same for stored in candidates], np.inf, score_K)

    def threshold(self, false_fires: float) -> float:
        """The score above which so large a share of look-alike questions fires. Raises UserError where that was not
        measured."""
        if not self.rates[-1] <= false_fires <= self.rates[0]:
            span = f"from {self.rates[-1]:g} to {self.rates[0]:g}"
            raise UserError(f"--config.router.false_fires={false_fires:g}: this judge was measured {span}")
        return float(np.interp(np.log(false_fires), np.log(self.rates[::-1]), self.thresholds[::-1]))

    @property
    def identity(self) -> str:
        """A hash of all that decides its scores and thresholds."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The judge as one JSON object."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Judge":
        """The inverse. Raises UserError for what is not a judge, or one of other features."""
        try:
            values = json.loads(text)
            linear = {name: Linear(**_tuples(values.pop(name))) for name in ("subject", "relation")}
            known = values.pop("format") == FORMAT and {*linear["subject"].names, *linear["relation"].names} <= {*NAMES}
            judge = cls(**linear, **_tuples(values))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"is not a judge that `{_COMMAND}` wrote") from error
        if not known:
            raise UserError(f"is a judge of other features; train it again with `{_COMMAND}`")
        return judge


def _tuples(values: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
