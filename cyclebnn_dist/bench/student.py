"""Student's t: intervals for the mean of a few paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MeanInterval:
    """Mean of ``count`` values with the ends of its two-sided 95 % t interval, and their standard deviation.

    Ends and deviation are NaN where there are fewer than two values.
    """

    mean: float
    low: float
    high: float
    deviation: float
    count: int


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """The interval mean -+ t s / sqrt(n), t of n - 1 degrees of freedom; there must be a value."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return MeanInterval(mean, math.nan, math.nan, math.nan, count)
    deviation = statistics.stdev(values)
    reach = t_quantile(CONFIDENCE, count - 1) * deviation / math.sqrt(count)
    return MeanInterval(mean, mean - reach, mean + reach, deviation, count)


def t_quantile(within: float, degrees: int) -> float:
    """The t that a variable of Student's distribution lies within, -t to t, with probability ``within``."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < within else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """Probability of |T| < sqrt(degrees) tan(angle): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for index in range((degrees - odd) // 2):
        total += term
        last = 2 * index + 1 + odd
        term *= cosine * cosine * last / (last + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
