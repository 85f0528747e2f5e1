"""Results of multiple choice for people: rows of a table, in the terminal and on the page."""

from __future__ import annotations

from typing import Any

from metajax.reporting.tasks import title

HEAD = ("task", "in front", "examples", "acc", "acc_norm", "questions")
IN_FRONT = {"none": "nothing", "empty": "the empty pair", "task": "a fitting source"}


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells under HEAD for every task and setting, each share with its standard error, and behind each setting the mean acc."""
    rows = []
    for setting, tasks in results["settings"].items():
        context, _, shots = setting.rpartition("_")
        for name, scored in tasks.items():
            if name == "average":
                rows.append(["mean", IN_FRONT[context], shots, f"{scored:.1%}", "", ""])
            elif isinstance(scored, dict):
                shares = [f"{scored[key]:.1%} ± {scored[f'{key}_stderr']:.1%}" for key in ("acc", "acc_norm")]
                rows.append([title(name), IN_FRONT[context], shots, *shares, f"{scored['n']:,}"])
    return rows
