"""Statistics over a few seeds: means with Student-t intervals, paired differences, and the seeds that an effect needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1000  # an effect that needs more is out of reach
Values = Sequence[float | None]  # one per seed, None if missing


@dataclass(frozen=True)
class Summary:
    """Mean over n seeds, with standard deviation and half width of the interval. The last two are None for a single seed."""

    n: int
    mean: float
    deviation: float | None
    half: float | None

    @property
    def clear_of_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.mean) > self.half


def summarize(values: Values) -> Summary | None:
    """Mean and 95 % Student-t interval of the values that are not None; None if there are none."""
    numbers = np.asarray([v for v in values if v is not None], np.float64)
    n = len(numbers)
    if n < 2:
        return Summary(1, float(numbers[0]), None, None) if n else None
    deviation = float(numbers.std(ddof=1))
    return Summary(n, float(numbers.mean()), deviation, float(_quantile(n - 1)) * deviation / math.sqrt(n))


def share_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson 95 % interval of the share `right` / `n`."""
    from scipy.stats import binomtest  # the import takes seconds, so it waits until a run is evaluated

    interval = binomtest(right, n).proportion_ci(CONFIDENCE, "wilson")
    return interval.low, interval.high


def paired_difference(ours: Values, baseline: Values) -> Summary | None:
    """Ours minus baseline, paired by seed, over the seeds that both have."""
    return summarize([a - b for a, b in zip(ours, baseline, strict=True) if a is not None and b is not None])


def seeds_needed(effect: float, deviation: float) -> int | None:
    """The smallest number of paired seeds that detects a mean difference of `effect` at 95 % confidence with 80 % power.

    Args:
      deviation: standard deviation of the paired differences.

    Returns:
      None if it takes more than MOST_SEEDS.
    """
    from scipy.special import nctdtr

    if deviation == 0:
        return 2 if effect else None
    n = np.arange(2, MOST_SEEDS + 1)
    noncentrality = np.minimum(abs(effect) / deviation * np.sqrt(n), 100.0)  # above 100 the power is 1 and nctdtr fails
    enough = 1 - nctdtr(n - 1, noncentrality, _quantile(n - 1)) >= POWER
    return int(n[enough.argmax()]) if enough.any() else None


def _quantile(freedom: Any) -> Any:
    from scipy.special import stdtrit  # the import takes half a second, which listing the tables does not need

    return stdtrit(freedom, 0.5 + CONFIDENCE / 2)
