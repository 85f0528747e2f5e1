"""Train steps that are timed in turns in one process: seconds, ratios to the first, their sentence and their figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

from metajax.core.progress import progress
from metajax.reporting.panels import GREY, name_rows, point


def step_seconds(steps: Mapping[str, Callable[[Any], Any]], states: Mapping[str, Any], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each step, `state -> state`, in each of `rounds`; an extra first round is not counted."""
    states, taken = dict(states), {name: [] for name in steps}
    with progress("timing train steps", total=rounds + 1) as advance:
        for _ in range(rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                states[name] = jax.block_until_ready(step(states[name]))
                taken[name].append(time.perf_counter() - began)
            advance(1)
    return {name: np.array(seconds[1:]) for name, seconds in taken.items()}


def against_first(seconds: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{name: {ms, ratio, ratio_low, ratio_high}}: median time, and median and quartiles of the ratio to the first in the same round."""
    first, found = next(iter(seconds.values())), {}
    for name, taken in seconds.items():
        low, ratio, high = np.quantile(taken / first, (0.25, 0.5, 0.75)).tolist()
        found[name] = {"ms": 1e3 * float(np.median(taken)), "ratio": ratio, "ratio_low": low, "ratio_high": high}
    return found


def step_words(step: Mapping[str, float]) -> str:
    """The time of a train step as text."""
    return f"step {step['ms']:.2f} ms, {step['ratio']:.3f}x ({step['ratio_low']:.3f} to {step['ratio_high']:.3f})"


def ratio_panel(axes: Axes, result: Mapping[str, Any], names: Mapping[str, str], what: str) -> None:
    """The ratio of each step to the first, with its quartiles."""
    for y, step in enumerate(result[name]["step"] for name in names):
        point(axes, y, step["ratio_low"], step["ratio"], step["ratio_high"], y)
    axes.axvline(1, color=GREY, linewidth=1)
    name_rows(axes, list(names.values()), what)
