"""Numbers as analyses save them: means with 95 % intervals, names that hold a value, short lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from metajax.evaluation.statistics import summarize


def pooled(values: Float[np.ndarray, "N ..."], chosen: Bool[np.ndarray, "N ..."]) -> dict[str, Any]:
    """Mean, median and share above 0 of the chosen values, pooled over prompts, in the unit of the values.

    half, positive_half: half widths of 95 % intervals. The values of one prompt are not independent, so prompts (N of them) are the
    clusters of a cluster-robust standard error: sqrt(N / (N - 1) sum_i (sum of residuals of prompt i)^2) / number of values.
    """
    (mean, half), (share, share_half) = (cluster_mean(x, chosen) for x in (values, (values > 0).astype(np.float64)))
    found = {
        "mean": mean,
        "half": half,
        "median": float(np.median(values[chosen])),
        "positive": share,
        "positive_half": share_half,
    }
    return found | {"values": int(chosen.sum()), "prompts": len(values)}


def cluster_mean(values: Float[np.ndarray, "N ..."], chosen: Bool[np.ndarray, "N ..."]) -> tuple[float, float]:
    """(mean of the chosen values, half width of its 95 % interval over prompts)."""
    n, total = len(values), int(chosen.sum())
    mean = float(values[chosen].mean(dtype=np.float64))
    residuals = np.where(chosen, values - mean, 0.0).reshape(n, -1).sum(axis=1, dtype=np.float64)
    error = np.sqrt(n / (n - 1) * np.square(residuals).sum()) / total
    return mean, float(stdtrit(n - 1, 0.975) * error)


def mean_over_rows(values: Float[np.ndarray, " N"]) -> dict[str, float]:
    """{mean, half}: the mean over rows, and the half width of its 95 % interval (Student t)."""
    found = summarize(values.tolist())
    return {"mean": found.mean, "half": found.half}


def key_of(prefix: str, value: float) -> str:
    """The name of a value in the saved numbers, such as "g_1_5"."""
    return f"{prefix}_{value:g}".replace(".", "_")


def values_of(prefix: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers saved under names of `key_of`, by the value as text, such as "1.5"."""
    names = {name.partition("_"): found for name, found in numbers.items()}
    return {value.replace("_", "."): found for (before, _, value), found in names.items() if before == prefix}


def rounded(values: np.ndarray, digits: int = 4) -> list[Any]:
    """An array as lists of short numbers, NaN as None, for JSON."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [None if np.isnan(v) else round(v, digits) for v in values.astype(np.float64).tolist()]
