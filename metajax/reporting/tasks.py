"""Results of tasks and multiple choice: table rows for terminal and page, and the figure of accuracy by length."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metajax.config import Tasks
from metajax.reporting.figures import WIDTH, look, styled, to_svg

HEAD = ("task", "length", "exact match", "95 % interval", "token accuracy", "95 % interval", "chance", "examples")
CHOICE_HEAD = ("task", "context", "examples", "acc", "acc_norm", "questions")
CONTEXTS = {"none": "nothing", "empty": "the empty pair", "task": "a fitting source"}  # context before the question
TaskResults = dict[str, dict[str, dict[str, Any]]]  # as metajax.evaluation.tasks.evaluate_tasks returns them


def title(task: str) -> str:
    """A task's name in words."""
    return task.replace("_", " ")


def table_rows(results: TaskResults) -> list[list[str]]:
    """One row of cells for each task and length, under HEAD."""
    return [[title(task), length, *_cells(scored)] for task, bins in results.items() for length, scored in bins.items()]


def _cells(scored: dict[str, Any]) -> list[str]:
    if scored["exact"] is None:
        return ["-", scored["reason"], "-", "-", f"{scored['chance']:.1%}", "0"]
    shown = (f"{scored[k]:.1%}, {scored[f'{k}_low']:.1%} to {scored[f'{k}_high']:.1%}" for k in ("exact", "token"))
    return [part for text in shown for part in text.split(", ")] + [f"{scored['chance']:.1%}", f"{scored['n']:,}"]


def choice_rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells under CHOICE_HEAD for every task and setting: shares with standard errors, and the mean acc after each setting."""
    rows = []
    for setting, tasks in results["settings"].items():
        context, _, shots = setting.rpartition("_")
        first = CONTEXTS.get(context, context), shots
        for name, scored in tasks.items():
            if name == "average":
                rows.append(["mean", *first, f"{scored:.1%}", "", ""])
            elif isinstance(scored, dict):
                shares = [f"{scored[key]:.1%} ± {scored[f'{key}_stderr']:.1%}" for key in ("acc", "acc_norm")]
                rows.append([title(name), *first, *shares, f"{scored['n']:,}"])
    return rows


def accuracy_figure(results: TaskResults, tasks: Tasks) -> str:
    """Exact-match accuracy by length bin as SVG, a panel for each task with interval, chance and longest training length."""
    with styled():
        figure = Figure(figsize=(WIDTH, 1.9 * ((len(results) + 1) // 2) + 0.3), layout="constrained")
        panels = figure.subplots((len(results) + 1) // 2, 2, squeeze=False, sharex=True, sharey=True).flat
        for axes in list(panels)[len(results) :]:
            axes.set_axis_off()
        for axes, (task, bins) in zip(figure.axes, results.items(), strict=False):
            known = {int(length): scored for length, scored in bins.items() if scored["exact"] is not None}
            exact = [scored["exact"] for scored in known.values()]
            low, high = ([scored[key] for scored in known.values()] for key in ("exact_low", "exact_high"))
            spread = np.subtract([exact, high], [low, exact])
            axes.errorbar(list(known), exact, yerr=spread, color=look(0)[0], marker="o", markersize=4, linewidth=1.6, capsize=2)
            axes.axhline(next(iter(bins.values()))["chance"], color="#9aa0a8", linewidth=1, linestyle=(0, (4, 3)))
            axes.axvline(tasks.train_length, color="#d6d9de", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths := [int(length) for length in bins], [str(n) for n in lengths])
            axes.set_ylim(-0.04, 1.04)
            axes.set_title(title(task), fontweight="bold")
        figure.supylabel("exact match", fontsize=10.5)
        figure.supxlabel("length of the example, in tokens", fontsize=10.5)
        return to_svg(figure, f"Exact-match accuracy against length: {', '.join(map(title, results))}")
