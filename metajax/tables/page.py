"""report.html of a table: ours beside the paper's, costs, curves, spread, and what each row changes; whole or still in the making."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from metajax.config import config_from, difference
from metajax.reporting.figures import SpreadColumn, loss_curves, seed_spread
from metajax.reporting.html import (
    as_set,
    budget,
    corpus,
    curve_unit,
    curves,
    environment_facts,
    held_out,
    short_count,
    templates,
    with_code,
    write_page,
)
from metajax.runs.directory import FAILURE_LOG, read_config
from metajax.runs.files import find_readable, read_json
from metajax.tables import formats
from metajax.tables.results import COMPLETE, FAILED
from metajax.vision.page import source_line

Row = Mapping[str, Any]  # of a result
Reports = Mapping[str, Mapping[str, Any]]  # row -> the report of its first complete run


def write_table_page(folder: Path, result: formats.Result, root: Path) -> Path:
    """Write report.html of a table from its result and from its runs' own files, and return its path.

    Args:
      result: of `metajax.tables.results.gather`; runs that are not complete are shown as what they are.
      root: where the result's run folders start.
    """
    first = {row["name"]: read_json(root / run["folder"] / "report.json") for row in result["rows"] if (run := _complete(row))}
    filled = [c for c in result["columns"] if any(row["cells"][c["key"]]["ours"] for row in result["rows"])]
    basis_row = result["baseline"] if result["baseline"] in first else next(iter(first), None)
    page = templates.get_template("table.html").render(
        title=f"{result['name']} at scale {result['scale']}",
        result=result,
        sentence=_sentence(result, first.get(basis_row)),
        progress=_progress(result),
        failures=[found | {"href": _href(folder, root / found["folder"] / FAILURE_LOG)} for found in formats.failures(result)],
        columns=[_head(column, result) for column in result["columns"]],
        groups=_groups(result),
        costs=_costs(result),
        seed_values=_seed_values(result, filled),
        remarks=[with_code(note) for note in [*result["notes"], *formats.remarks(result)]],
        differs_from=f"The config against {result['baseline']}'s" if result["baseline"] in first else "The config against the table's base",
        rows=[_row_card(folder, root, row, result, first) for row in result["rows"]],
        curves=_curve_figures(result, root),
        spreads=[Markup(svg) for svg in seed_spread([_spread(result, c) for c in filled], result["baseline"])],
        spread_caption=_spread_caption(result),
        budgets=[budget(name, r["counts"], config_from(r["config"])) for name, r in first.items() if "slots" in r["counts"]],
        samples=[{"row": name, **report["sample"]} for name, report in first.items() if report["sample"]],
        corpora=[corpus(found) for found in first[basis_row]["corpora"] if "tokens" in found] if first else [],
        images=[source_line(found) for found in first[basis_row]["corpora"] if "splits" in found] if first else [],
        held_out=held_out(first[basis_row]) if first else None,
        machine=_machine(root, next(row for row in result["rows"] if row["name"] == basis_row)) if first else None,
    )  # fmt: skip
    return write_page(folder, page)


def _complete(row: Row) -> Mapping[str, Any] | None:
    return next((run for run in row["runs"] if run["state"] == COMPLETE), None)


def _href(folder: Path, target: Path) -> str:
    return quote(Path(os.path.relpath(target, folder)).as_posix())


def _sentence(result: formats.Result, report: Mapping[str, Any] | None) -> str:
    """What was compared: the summary, and what the baseline's run says was spent on it."""
    rows = len(result["rows"])
    said = f"{rows} row{'' if rows == 1 else 's'}: {result['summary']}."
    if report is None or result["baseline"] is None:
        return said
    return (
        f"{said} The baseline {result['baseline']} has {short_count(report['parameters']['total'])} parameters and {report['steps']:,} "
        "training steps; what every other row changes is listed below."
    )


def _progress(result: formats.Result) -> str | None:
    """How far a table that is not whole has come."""
    states = [run["state"] for row in result["rows"] for run in row["runs"]]
    if all(state in (COMPLETE, FAILED) for state in states):
        return None
    return f"{states.count(COMPLETE)} of {len(states)} runs are complete. This page is written anew after every run; reload it to see more."


# ------------------------------------------------------------------------------------------------------- cells


def _head(column: Mapping[str, Any], result: formats.Result) -> dict[str, Any]:
    arrow = {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}", "": ""}[column["better"]]
    return {"title": column["title"], "better": column["better"], "arrow": arrow, "paper": formats.has_paper(result, column)}


def _groups(result: formats.Result) -> list[dict[str, Any]]:
    """The rows under their headings, each with its cells, or with one line that says why there are none."""
    groups: list[dict[str, Any]] = []
    for row in result["rows"]:
        if not groups or groups[-1]["name"] != row["group"]:
            groups.append({"name": row["group"], "rows": []})
        cells = [_cell(row, column, result) for column in result["columns"]]
        groups[-1]["rows"].append(
            {"name": formats.label(row, result), "baseline": row["name"] == result["baseline"], "cells": cells}
        )
    return groups


def _cell(row: Row, column: Mapping[str, Any], result: formats.Result) -> dict[str, Any]:
    cell = row["cells"][column["key"]]
    ours, _, spread = formats.ours_text(row, column, len(result["seeds"])).partition(f" {formats.PLUS_MINUS} ")
    difference = cell["difference"]
    return {
        "ours": ours,
        "spread": spread,
        "state": "" if cell["ours"] else formats.state_of(row, column),
        "difference": formats.difference_text(row, column, result) if difference else "",
        "verdict": _verdict(difference, column["better"]),
        "has_paper": formats.has_paper(result, column),
        "paper": formats.paper_text(row, column, result),
        "paper_difference": formats.paper_difference_text(row, column),
    }


def _verdict(found: Mapping[str, Any] | None, better: str) -> str:
    """Better or worse than the baseline where the interval of the difference leaves 0 out."""
    if found is None or not found["clear_of_zero"] or not better:
        return ""
    return "better" if (found["mean"] < 0) == (better == "lower") else "worse"


def _costs(result: formats.Result) -> dict[str, Any] | None:
    shown = formats.shown_costs(result)
    if not shown:
        return None
    rows = [[row["name"], *(formats.cost_text(row, key, result).partition(" ") for key, _ in shown)] for row in result["rows"]]
    return {"head": ["row", *(title for _, title in shown)], "rows": rows}


def _seed_values(result: formats.Result, columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every seed's number, a block for each column."""
    return [
        {
            "title": column["title"],
            "rows": [
                [row["name"], *("-" if v is None else f"{v:.{column['digits'] + 1}f}" for v in row["cells"][column["key"]]["values"])]
                for row in result["rows"]
            ],
        }
        for column in columns
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- what differs


def _row_card(folder: Path, root: Path, row: Row, result: formats.Result, first: Reports) -> dict[str, Any]:
    """A row's difference to the baseline and the way to its runs' own reports."""
    made = {
        "name": row["name"],
        "note": row["note"],
        "unchanged": "nothing",
        "links": [_link(folder, root, run) for run in row["runs"]],
    }
    parents = dict.fromkeys(run["parent"].rsplit("/", 2)[0] for run in row["runs"] if run["parent"])
    made["parents"] = ", ".join(parents)
    made["parameters"] = _parameters(row, result)
    if row["name"] == result["baseline"]:
        return made | {"changes": [], "unchanged": "this is the baseline"}
    if result["baseline"] not in first or row["name"] not in first:  # all there is, is what the row declares
        return made | {"changes": [f"{k} = {v}" for k, v in row["changes"].items()]}
    baseline, config = (config_from(first[name]["config"]) for name in (result["baseline"], row["name"]))
    changed = [
        (k, *v)
        for k, v in difference(baseline, config).items()
        if k not in ("name", "seed", "init.from_") and not k.startswith("runtime.")
    ]
    return made | {"changes": [f"{name}: {as_set(then)} \N{RIGHTWARDS ARROW} {as_set(now)}" for name, then, now in changed]}


def _link(folder: Path, root: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    warnings = f" ({run['warnings']} warning{'' if run['warnings'] == 1 else 's'})" if run["warnings"] else ""
    file = {COMPLETE: "report.html", FAILED: FAILURE_LOG}.get(run["state"])
    label = f"{run['part']} seed {run['seed']}".strip() + (warnings if run["state"] == COMPLETE else f" ({run['state']})")
    return {"label": label, "href": _href(folder, root / run["folder"] / file) if file else None}


def _parameters(row: Row, result: formats.Result) -> str:
    cost, basis = row["cost"], next((r["cost"] for r in result["rows"] if r["name"] == result["baseline"]), None)
    if cost is None:
        return ""
    text = f"{cost['parameters']:,} parameters"
    if basis is None or not basis["parameters"] or row["name"] == result["baseline"]:
        return text
    more = cost["parameters"] / basis["parameters"] - 1
    return f"{text}, {more:+.1%} against {result['baseline']}" if more else f"{text}, as many as {result['baseline']}"


def _machine(root: Path, row: Row) -> str:
    facts = dict(environment_facts(find_readable(root / _complete(row)["folder"] / "environment.json")))
    if not facts:
        return "not known: the file of the run is missing or damaged"
    return f"{facts['devices']}; jax {facts['jax']}, python {facts['python']}; git {facts['git']}"


# ------------------------------------------------------------------------------------------------------ figures


def _curve_figures(result: formats.Result, root: Path) -> list[tuple[Markup, str]]:
    """Learning curves of the complete runs, a figure with its caption for each part of the table: parts count different things."""
    found: dict[tuple[str, str], dict[str, list]] = {}
    complete = [(row["name"], run) for row in result["rows"] for run in row["runs"] if run["state"] == COMPLETE]
    for name, run in complete:
        pair = curves(root / run["folder"], read_json(root / run["folder"] / "report.json"))
        if len(pair[0][0]):
            part = run["part"], curve_unit(read_config(root / run["folder"]))
            found.setdefault(part, {}).setdefault(name, []).append(pair)
    drawn = []
    for (part, unit), of_rows in found.items():
        series = ({name: [pair[i] for pair in of_row] for name, of_row in of_rows.items()} for i in (0, 1))
        caption = _curve_caption(len(result["seeds"]), unit)
        drawn.append((Markup(loss_curves(*series, unit)), f"{part}: {caption}" if part else caption))
    return drawn


def _curve_caption(seeds: int, unit: str) -> str:
    if seeds == 1:
        return f"{unit.capitalize()} of each training batch (faint) and their moving average."
    return f"Moving averages of the training batches' {unit}: each of {seeds} seeds thin, their mean thick."


def _spread(result: formats.Result, column: Mapping[str, Any]) -> SpreadColumn:
    """A column's figure; columns whose paths end alike ("bpb") measure the same thing."""
    better = f" ({column['better']} is better)" if column["better"] else ""
    quantity = " - ".join(path.rpartition(".")[2] for path in (column["path"], column["minus"]) if path)
    cells = {row["name"]: row["cells"][column["key"]] for row in result["rows"] if not row["lacks"]}
    values = {name: [v for v in cell["values"] if v is not None] for name, cell in cells.items()}
    halves = {name: cell["ours"] and cell["ours"]["half"] for name, cell in cells.items()}
    return SpreadColumn(column["title"] + better, quantity, values, halves)


def _spread_caption(result: formats.Result) -> str:
    line = f" The dashed line is {result['baseline']}." if result["baseline"] else ""
    if len(result["seeds"]) == 1:
        return f"One dot a row, because there is one seed: how far another seed would fall is not known.{line} Axes do not start at 0."
    return (
        f"A dot for each of {len(result['seeds'])} seeds, an upright stroke at their mean, a bar for its 95 % interval "
        f"(one that reaches the frame goes on).{line} Axes do not start at 0, and columns of one quantity share theirs where they fill a third of it."
    )
