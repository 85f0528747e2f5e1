"""Train steps that are timed in turns in one process: ratios to the first, their sentence and their figure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

from metajax.core.progress import progress
from metajax.reporting.panels import GREY, name_rows, point


def time_steps(steps: Mapping[str, tuple[Any, ...]], rounds: int) -> dict[str, dict[str, float]]:
    """{name: {ms, ratio, ratio_low, ratio_high}} of {name: (step, state, *inputs)}, with step(state, *inputs) -> (state, metrics).

    The median time, and median and quartiles of the ratio to the first step in the same round. An extra first round is not counted.
    """
    states, taken = {name: of[1] for name, of in steps.items()}, {name: [] for name in steps}
    with progress("timing train steps", total=rounds + 1) as advance:
        for _ in range(rounds + 1):
            for name, (step, _, *inputs) in steps.items():
                began = time.perf_counter()
                states[name] = jax.block_until_ready(step(states[name], *inputs)[0])
                taken[name].append(time.perf_counter() - began)
            advance(1)
    seconds, found = {name: np.array(of_rounds[1:]) for name, of_rounds in taken.items()}, {}
    first = next(iter(seconds.values()))
    for name, of_step in seconds.items():
        low, ratio, high = np.quantile(of_step / first, (0.25, 0.5, 0.75)).tolist()
        found[name] = {"ms": 1e3 * float(np.median(of_step)), "ratio": ratio, "ratio_low": low, "ratio_high": high}
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
