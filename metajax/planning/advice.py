"""Config changes that make a plan fit, and the largest batch that fits. Every answer is checked with the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from metajax.config import AnyConfig
from metajax.core.fields import override

_MOST = 2**20  # rows; no batch is larger


def candidates(config: AnyConfig, shards: int) -> Iterator[dict[str, Any]]:
    """Config changes that need less memory and do not change the gradient, the cheapest in time first."""
    kept = {"none": ["dots", "full"], "dots": ["full"], "full": []}[config.runtime.remat]
    for remat in kept:
        yield {"runtime.remat": remat}
    if "training.accumulation_steps" in config.unread():
        return
    _, size, pieces = config.batch
    pieces *= 2
    while size % (pieces * shards) == 0:
        yield {"runtime.remat": "full", "training.accumulation_steps": pieces}
        pieces *= 2


def advise(config: AnyConfig, shards: int, plan: Callable[[AnyConfig], Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first of `candidates` whose plan fits, as {changes, total}; None if none fits."""
    for changes in candidates(config, shards):
        found = plan(override(config, changes))
        if found["fits"]:
            return {"changes": changes, "total": found["memory"]["total"]}
    return None


def largest_batch(unit: int, start: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of `unit` rows that fits, by doubling from about `start` and bisection; 0: `unit` does not fit."""
    good, bad, trial = 0, None, max(1, start // unit)
    while bad is None or bad - good > 1:
        if fits(trial * unit):
            good = trial
        else:
            bad = trial
        trial = 2 * good if bad is None else (good + bad) // 2
        if bad is None and trial * unit > _MOST:
            break
    return good * unit
