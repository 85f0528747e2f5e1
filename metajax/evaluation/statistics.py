"""What a handful of seeds allows to be said: means with Student-t intervals, paired differences, the seeds an effect needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1000  # a search for more is given up: such an effect is out of reach
Values = Sequence[float | None]  # one for each seed, None where there is no such number


@dataclass(frozen=True)
class Summary:
    """Mean over n seeds; its standard deviation and the half width of its interval are None for a single seed."""

    n: int
    mean: float
    deviation: float | None
    half: float | None

    @property
    def clear_of_zero(self) -> bool:
        """The whole interval lies on one side of 0."""
        return self.half is not None and abs(self.mean) > self.half


def summarize(values: Values) -> Summary | None:
    """Mean and 95 % Student-t interval of the values that are there; None when there are none."""
    numbers = np.asarray([v for v in values if v is not None], np.float64)
    n = len(numbers)
    if n == 0:
        return None
    if n == 1:
        return Summary(1, float(numbers[0]), None, None)
    deviation = float(numbers.std(ddof=1))
    half = _quantile(n - 1) * deviation / math.sqrt(n)
    return Summary(n, float(numbers.mean()), deviation, half)


def share_interval(right: int, n: int) -> tuple[float, float]:
    """The Wilson 95 % interval of a share of n."""
    from scipy.stats import binomtest  # seconds, which a run pays where it is evaluated and not when it starts

    interval = binomtest(right, n).proportion_ci(CONFIDENCE, "wilson")
    return interval.low, interval.high


def paired_difference(ours: Values, baseline: Values) -> Summary | None:
    """Ours minus the baseline's, seed by seed, over the seeds that both have."""
    return summarize([a - b for a, b in zip(ours, baseline, strict=True) if a is not None and b is not None])


def seeds_needed(effect: float, deviation: float) -> int | None:
    """The fewest paired seeds with which a mean difference of `effect` is told from 0, at 95 %, four times out of five.

    Args:
      deviation: standard deviation of the paired differences.

    Returns:
      None when it takes more than MOST_SEEDS.
    """
    from scipy.special import nctdtr

    for n in range(2, MOST_SEEDS + 1):
        if deviation == 0:
            return n if effect else None
        noncentrality = min(abs(effect) / deviation * math.sqrt(n), 100.0)  # beyond that the power is 1, and nctdtr gives up
        bound = _quantile(n - 1)
        if 1 - nctdtr(n - 1, noncentrality, bound) >= POWER:
            return n
    return None


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit  # half a second, which listing the tables does without

    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))
