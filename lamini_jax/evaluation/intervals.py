"""95% confidence intervals for what was counted or measured on a sample of questions."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The interval of a proportion (Wilson 1927)."""
    low, high = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(low), float(high)


def normal(values_Q: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean of values between 0 and 1, by the normal approximation."""
    if len(values_Q) < 2:
        return 0.0, 1.0  # a single value says nothing about the spread
    mean, margin = np.mean(values_Q), stats.norm.ppf(0.975) * stats.sem(values_Q)
    return max(0.0, float(mean - margin)), min(1.0, float(mean + margin))
