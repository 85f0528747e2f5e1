"""report.html of a complete or incomplete table: our and the paper's results, costs, curves, spread, and each row's changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from metajax.config import config_from
from metajax.reporting import facts, page
from metajax.reporting.figures import SpreadColumn, loss_curves, seed_spread
from metajax.reporting.html import document_pieces, sample_pieces
from metajax.reporting.page import Part
from metajax.runs.directory import FAILURE_LOG, read_config
from metajax.runs.files import find_readable, read_json
from metajax.tables import formats
from metajax.tables.formats import Line, Result
from metajax.tables.results import COMPLETE, FAILED

Reports = Mapping[str, Mapping[str, Any]]  # row -> the report of its first complete run
FILES = {"table.json": "every number of every seed", "table.md": "", "table.csv": "", "table.tex": ""}


def write_table_page(folder: Path, result: Result, root: Path) -> Path:
    """Write report.html of a table from its result and the files of its runs, and return its path.

    Args:
      result: from `metajax.tables.results.gather`; runs that are not complete are shown with their state.
      root: folder to which the result's run folders are relative.
    """
    complete = {row["name"]: run for row in result["rows"] for run in reversed(row["runs"]) if run["state"] == COMPLETE}
    first = {name: read_json(root / run["folder"] / "report.json") for name, run in complete.items()}
    basis = result["baseline"] if result["baseline"] in first else next(iter(first), None)
    paper = f"{result['coverage']} of {result['paper']}" if result["coverage"] else result["paper"]
    seeds = f"{page.plural(len(result['seeds']), 'seed')} ({', '.join(map(str, result['seeds']))})"
    remarks = page.lines([page.with_code(note) for note in [*result["notes"], *formats.remarks(result)]], "remarks")
    return page.write_page(
        folder / "report.html",
        title=f"{result['name']} at scale {result['scale']}",
        eyebrow=" · ".join(filter(None, ("Table", f"scale {result['scale']}", seeds, paper))),
        heading=result["name"],
        sentence=_sentence(result, first.get(basis)),
        notes=[_progress(result), _failures(folder, root, result)],
        sections=[
            page.section("", _results(result), remarks),
            _curves_and_spread(result, root),
            _costs(result),
            _differences(folder, root, result, first),
            _budgets(first),
            _samples(first),
            _foundation(root / complete[basis]["folder"], first[basis]) if basis else None,
        ],
        files=FILES,
    )


def _href(folder: Path, target: Path) -> str:
    return quote(Path(os.path.relpath(target, folder)).as_posix())


def _sentence(result: Result, report: Mapping[str, Any] | None) -> str:
    """What was compared: the summary, and the size and steps of the baseline's run."""
    words = f"{page.plural(len(result['rows']), 'row')}: {result['summary']}."
    if report is None or result["baseline"] is None:
        return words
    size = f"{page.short_count(report['parameters']['total'])} parameters and {report['steps']:,} training steps"
    return f"{words} The baseline {result['baseline']} has {size}; the changes of every other row are listed below."


def _progress(result: Result) -> Part:
    """The number of complete runs of an incomplete table."""
    states = [run["state"] for row in result["rows"] for run in row["runs"]]
    if all(state in (COMPLETE, FAILED) for state in states):
        return None
    done = f"{states.count(COMPLETE)} of {len(states)} runs are complete. This page is rewritten after every run; reload it to see more."
    return page.group("note", page.text(Markup("<b>Not finished.</b> {}").format(done)))


def _failures(folder: Path, root: Path, result: Result) -> Part:
    lines = []
    for run in formats.failures(result):
        log = page.link(_href(folder, root / run["folder"] / FAILURE_LOG), "log")
        lines.append(Markup("{row}, seed {seed}: {reason} ({log})").format(**run, log=log))
    title = f"{page.plural(len(lines), 'run')} failed. The same command tries again."
    return page.group("warning", page.lines(lines, ""), title=title)


def _results(result: Result) -> Part:
    """The main table: ours, its spread and difference to the baseline, and the paper's value."""
    arrows = {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}", "": ""}
    columns = []
    for column in result["columns"]:
        better, paper = column["better"], formats.has_paper(result, column)
        columns.append({"title": column["title"], "better": better, "arrow": arrows[better], "paper": paper})
    rows, group = [], ""
    for row in result["rows"]:
        cells = []
        for column in result["columns"]:
            shown = formats.cell(row, column, result)
            shown["ours"], _, shown["spread"] = shown["ours"].partition(f" {formats.PLUS_MINUS} ")
            cells.append(shown | {"verdict": _verdict(row["cells"][column["key"]]["difference"], column["better"])})
        heading, group = row["group"] if row["group"] != group else "", row["group"]
        is_baseline = row["name"] == result["baseline"]
        rows.append({"heading": heading, "name": formats.label(row, result), "baseline": is_baseline, "cells": cells})
    return {"kind": "results", "scale": result["scale"], "columns": columns, "rows": rows}


def _verdict(found: Mapping[str, Any] | None, better: str) -> str:
    """Better or worse than the baseline, if the interval of the difference excludes 0."""
    if found is None or not found["clear_of_zero"] or not better:
        return ""
    return "better" if (found["mean"] < 0) == (better == "lower") else "worse"


def _costs(result: Result) -> Part:
    head, rows = formats.costs(result)
    if not rows:
        return None
    remark = "A position is one of a row as the model sees it; training FLOPs are counted from the masks."
    remark += f" In brackets: against {result['baseline']}." if result["baseline"] else ""
    lines = []
    for name, *costs in rows:
        parts = (cost.partition(" ") for cost in costs)
        share_below = Markup('{}<span class="range">{}</span>')
        lines.append([name, *(share_below.format(number, share) if share else number for number, _, share in parts)])
    return page.section("What it costs", page.table(head, lines, "pinned"), page.text(remark, "soft small"))


def _differences(folder: Path, root: Path, result: Result, first: Reports) -> Part:
    """A card for each row: its difference to the baseline, size and note, and links to its runs' reports."""
    compared = f"{result['baseline']}'s" if result["baseline"] in first else "the table's base"
    cards = []
    for row in result["rows"]:
        parents = ", ".join(dict.fromkeys(run["parent"].rsplit("/", 2)[0] for run in row["runs"] if run["parent"]))
        links = Markup(", ").join(_link(folder, root, run) for run in row["runs"])
        texts = [page.text(words, "small") for words in (_changes(row, result, first), row["note"])]
        texts += [
            page.text(words, "small soft") for words in (f"starts from {parents}" * bool(parents), _parameters(row, result))
        ]
        cards.append(page.group("card", *texts, page.text(links, "small"), title=row["name"]))
    remark = page.text(f"The config against {compared}, and each run's own report.", "soft small")
    return page.section("What differs", remark, page.group("texts", *cards))


def _changes(row: Line, result: Result, first: Reports) -> str:
    if row["name"] == result["baseline"]:
        return "this is the baseline"
    if result["baseline"] in first and row["name"] in first:
        baseline, config = (config_from(first[name]["config"]) for name in (result["baseline"], row["name"]))
        fields = facts.changed(baseline, config, "init.from_").items()
        changes = [f"{name}: {page.as_set(then)} \N{RIGHTWARDS ARROW} {page.as_set(now)}" for name, (then, now) in fields]
    else:  # only the row's declared changes are known
        changes = [f"{name} = {value}" for name, value in row["changes"].items()]
    return Markup("<br>").join(map(page.code, changes)) or "nothing"


def _link(folder: Path, root: Path, run: Mapping[str, Any]) -> Markup:
    warnings = f" ({page.plural(run['warnings'], 'warning')})" if run["warnings"] else ""
    file = {COMPLETE: "report.html", FAILED: FAILURE_LOG}.get(run["state"])
    label = f"{run['part']} seed {run['seed']}".strip() + (warnings if run["state"] == COMPLETE else f" ({run['state']})")
    return page.link(_href(folder, root / run["folder"] / file) if file else None, label)


def _parameters(row: Line, result: Result) -> str:
    cost, basis = row["cost"], formats.cost_of_baseline(result)
    if cost is None:
        return ""
    words = f"{cost['parameters']:,} parameters"
    if basis is None or not basis["parameters"] or row["name"] == result["baseline"]:
        return words
    more = cost["parameters"] / basis["parameters"] - 1
    return f"{words}, {more:+.1%} against {result['baseline']}" if more else f"{words}, as many as {result['baseline']}"


def _budgets(first: Reports) -> Part:
    rows = [facts.budget(name, r["counts"], config_from(r["config"])) for name, r in first.items() if "positions" in r["counts"]]
    remark = "Training positions of the first seed. Positions of metadata and meta-tokens hold no text that the row reads."
    if not rows:
        return None
    return page.section("Use of the positions", page.group("card", page.bars(rows), page.text(remark, "soft small")))


def _samples(first: Reports) -> Part:
    samples = {name: report["sample"] for name, report in first.items() if report["sample"]}
    if not samples:
        return None
    remark = (
        "The beginning of a validation document (grey), then the model's continuation (marked). Metadata, where a row was trained with it, comes "
        "first (coloured). First seed of each row."
    )
    original = page.group("card", document_pieces(next(iter(samples.values()))), title="The document itself")
    made = (page.group("card", sample_pieces(sample), title=name) for name, sample in samples.items())
    texts = page.group("texts", original, *made)
    return page.section("The same document, continued by each row", page.text(remark, "soft small"), texts)


def _foundation(workdir: Path, report: Mapping[str, Any]) -> Part:
    """Sources and machine of a run."""
    machine = dict(facts.environment_facts(find_readable(workdir / "environment.json")))
    known = "not known: the file of the run is missing or damaged"
    if machine:
        known = f"{machine['devices']}; jax {machine['jax']}, python {machine['python']}; git {machine['git']}"
    return page.section("What this rests on", page.group("card", *facts.sources(report), page.text(f"Run on {known}.")))


def _curves_and_spread(result: Result, root: Path) -> Part:
    """Learning curves, a figure of the seeds of each column, and the number of every seed."""
    columns = [column for column in result["columns"] if any(row["cells"][column["key"]]["ours"] for row in result["rows"])]
    spreads = seed_spread([_spread(result, column) for column in columns], result["baseline"])
    drawn = [*_curve_figures(result, root), *((svg, "") for svg in spreads)]
    if not drawn:
        return None
    numbers = []
    for column in columns:
        seeds = (f"seed {seed}" for seed in result["seeds"])
        shown = {row["name"]: row["cells"][column["key"]]["values"] for row in result["rows"]}
        digits = column["digits"] + 1
        rows = [[name, *("-" if v is None else f"{v:.{digits}f}" for v in values)] for name, values in shown.items()]
        numbers.append(page.table([column["title"], *seeds], rows, "pinned"))
    details = page.details("Every seed's number", page.group("wide-cards", *numbers))
    caption = page.text(_spread_caption(result), "soft small")
    return page.section("Curves and spread", page.figures(drawn), caption, details)


def _curve_figures(result: Result, root: Path) -> list[tuple[str, str]]:
    """Learning curves of the complete runs: one figure with caption for each part, because parts have different units."""
    found: dict[tuple[str, str], dict[str, list]] = {}
    complete = [(row["name"], run) for row in result["rows"] for run in row["runs"] if run["state"] == COMPLETE]
    for name, run in complete:
        folder = root / run["folder"]
        pair = facts.curves(folder, read_json(folder / "report.json"))
        if pair[0][0]:
            part = run["part"], facts.curve_unit(read_config(folder))
            found.setdefault(part, {}).setdefault(name, []).append(pair)
    seeds, drawn = len(result["seeds"]), []
    for (part, unit), of_rows in found.items():
        series = ({name: [pair[i] for pair in of_row] for name, of_row in of_rows.items()} for i in (0, 1))
        caption = f"Moving averages of the training batches' {unit}: each of {seeds} seeds thin, their mean thick."
        if seeds == 1:
            caption = f"{unit.capitalize()} of each training batch (faint) and their moving average."
        drawn.append((loss_curves(*series, unit), f"{part}: {caption}" if part else caption))
    return drawn


def _spread(result: Result, column: Line) -> SpreadColumn:
    """The figure of a column. Columns whose paths have the same ending ("bpb") measure the same quantity."""
    better = f" ({column['better']} is better)" if column["better"] else ""
    quantity = " - ".join(path.rpartition(".")[2] for path in (column["path"], column["minus"]) if path)
    cells = {row["name"]: row["cells"][column["key"]] for row in result["rows"] if not row["lacks"]}
    values = {name: [v for v in cell["values"] if v is not None] for name, cell in cells.items()}
    halves = {name: cell["ours"] and cell["ours"]["half"] for name, cell in cells.items()}
    return SpreadColumn(column["title"] + better, quantity, values, halves)


def _spread_caption(result: Result) -> str:
    line = f" The dashed line is {result['baseline']}." if result["baseline"] else ""
    if len(result["seeds"]) == 1:
        return f"One dot a row, because there is one seed: the spread between seeds is not known.{line} Axes do not start at 0."
    return (
        f"A dot for each of {len(result['seeds'])} seeds, a vertical stroke at their mean, a bar for its 95 % interval "
        f"(cut off at the frame).{line} Axes do not start at 0, and columns of one quantity share theirs where they fill a third of it."
    )
