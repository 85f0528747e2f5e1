"""A table's result as text: cells, the remarks below them, and the forms Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

from metajax.tables.results import COMPLETE, FAILED, NOT_RUN, UNFINISHED

Result = Mapping[str, Any]
Line = Mapping[str, Any]  # a row of a result, or a column of it
COSTS = {
    "parameters": "parameters",
    "flops_per_position": "FLOPs a position",
    "flops": "training FLOPs",
    "positions": "positions",
    "body": "body tokens",
    "metadata": "metadata tokens",
    "meta_tokens": "meta-tokens",
}
STAR = " *"
DELTA, PLUS_MINUS, MINUS = "\N{GREEK CAPITAL LETTER DELTA}", "\N{PLUS-MINUS SIGN}", "\N{MINUS SIGN}"


def cell(row: Line, column: Line, result: Result) -> dict[str, str]:
    """The texts of one cell.

    ours: mean and half width of the interval, the number of seeds if some are missing, or why there is no number (`state`).
    difference: paired difference to the baseline. paper: the paper's value with the number of its remark.
    paper_difference: to the paper's baseline, with as many digits as the paper gives. Each is "" if it has no value.
    """
    found, digits, seeds = row["cells"][column["key"]], column["digits"], len(result["seeds"])
    state, published, paper, against = "" if found["ours"] else state_of(row, column), found["published"], "", ""
    if published is not None:
        mark = f" [{paper_notes(result).index(published['note']) + 1}]" if published["note"] else ""
        paper = ("not stated" if published["value"] is None else str(published["value"])) + mark
        if published["difference"] is not None:
            against = f"{published['difference']:+.{len(str(published['value']).partition('.')[2])}f}"
    ours, difference = _interval(found["ours"], digits, seeds), _interval(found["difference"], digits, seeds, "+")
    return {"ours": ours or state, "state": state, "difference": difference, "paper": paper, "paper_difference": against}


def _interval(summary: Mapping[str, Any] | None, digits: int, seeds: int, sign: str = "") -> str:
    if summary is None:
        return ""
    text = f"{summary['mean']:{sign}.{digits}f}"
    text += f" {PLUS_MINUS} {summary['half']:.{digits}f}" if summary["half"] is not None else ""
    return text if summary["n"] == seeds else f"{text} (n={summary['n']})"


def state_of(row: Line, column: Line) -> str:
    """Why a cell has no number: the row cannot be run here, or the state of the runs that the column reads, or "-"."""
    if row["lacks"]:
        return "not here"
    states = {run["state"] for run in row["runs"] if column["part"] in (run["part"], "*")}
    return next((state for state in (FAILED, UNFINISHED, NOT_RUN) if state in states), "-")


def label(row: Line, result: Result) -> str:
    """The row's name, with a star if one of its runs was made by other code than the first run of the row `_basis`."""
    codes = {r["name"]: [run["git"] for run in r["runs"] if run["git"]] for r in result["rows"]}
    basis = codes.get(_basis(result))
    return row["name"] + STAR * bool(basis and any(code != basis[0] for code in codes[row["name"]]))


def _basis(result: Result) -> str:
    """The row whose code the others are compared with: the baseline, or else the first row with runs; "" if no row has runs."""
    return result["baseline"] or next((row["name"] for row in result["rows"] if any(run["git"] for run in row["runs"])), "")


def _run_name(row: Line, run: Mapping[str, Any]) -> str:
    return f"{row['name']}/{run['part']}".strip("/")


def cost_of_baseline(result: Result) -> Mapping[str, float] | None:
    """The cost of the baseline, if it has a complete run."""
    return next((row["cost"] for row in result["rows"] if row["name"] == result["baseline"]), None)


def costs(result: Result) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of the costs that any row has, with increases over the baseline's; no rows if there are none."""
    shown = {key: title for key, title in COSTS.items() if any(row["cost"] and row["cost"].get(key) for row in result["rows"])}
    basis, rows = cost_of_baseline(result) or {}, []
    for row in result["rows"] if shown else ():
        rows.append([row["name"]])
        for key in shown:
            text, compared = "-", basis.get(key)
            if row["cost"] is not None:
                count = row["cost"][key]
                text = f"{count:.3g}" if key == "flops" else f"{count:,.0f}"
                text += f" ({count / compared - 1:+.1%})" if compared and count != compared else ""
            rows[-1].append(text)
    return ["row", *shown.values()], rows


def has_paper(result: Result, column: Line) -> bool:
    """Whether this column has any value from the paper."""
    return any(row["cells"][column["key"]]["published"] for row in result["rows"])


def has_difference(result: Result) -> bool:
    """Whether there is a baseline and a row to compare with it."""
    return result["baseline"] is not None and len(result["rows"]) > 1


def remarks(result: Result) -> list[str]:
    """The remarks below the table, after its own notes: seeds, scale, sources, code, power."""
    notes = [seed_note(result)]
    if result["scale"] != "paper" and any(has_paper(result, c) for c in result["columns"]):
        sizes = f"The paper's values belong to models and data of the paper's size, ours to scale {result['scale']}"
        notes.append(f"{sizes}: compare directions, not levels.")
    notes += [f"[{i}] {note}" for i, note in enumerate(paper_notes(result), 1)]
    notes += [f"{row['name']}: {row['note']}" for row in result["rows"] if row["note"]]
    absent: dict[str, list[str]] = {}
    for row in (row for row in result["rows"] if row["lacks"]):
        absent.setdefault(row["lacks"], []).append(row["name"])
    notes += [f"Not run here for lack of {lacks}: {', '.join(names)}." for lacks, names in absent.items()]
    return [*notes, *_code_remarks(result), *_power_remarks(result)]


def seed_note(result: Result) -> str:
    """The conclusions that this number of seeds allows."""
    n = len(result["seeds"])
    if n == 1:
        return "One seed makes no ranking and has no interval: run the same command with `--seeds 3`; complete runs are not repeated."
    note = f"{n} seeds: mean {PLUS_MINUS} half of the 95 % interval (Student t)."
    if has_difference(result):
        note += (
            f" {DELTA} is the difference to {result['baseline']}, seed by seed, with its own interval; one interval in twenty "
            "excludes 0 by chance."
        )
    return note if n > 2 else f"{note} Two seeds make very wide intervals; run the same command with `--seeds 3`."


def paper_notes(result: Result) -> list[str]:
    """The sources of published values that are not in a table of the paper, each once."""
    cells = (row["cells"][column["key"]]["published"] for row in result["rows"] for column in result["columns"])
    return list(dict.fromkeys(found["note"] for found in cells if found and found["note"]))


def failures(result: Result) -> list[dict[str, Any]]:
    """Runs that failed: row, seed, reason, folder."""
    failed = [(_run_name(row, run), run) for row in result["rows"] for run in row["runs"] if run["state"] == FAILED]
    return [{"row": name} | {key: run[key] for key in ("seed", "reason", "folder")} for name, run in failed]


def missing(result: Result) -> Iterator[str]:
    """Runs that failed, each with its reason, and the number of runs that are not complete yet."""
    for found in failures(result):
        yield f"{found['row']}, seed {found['seed']} failed: {found['reason']} (log: `{found['folder']}/failure.log`)"
    runs = [run for row in result["rows"] for run in row["runs"]]
    left = sum(run["state"] not in (COMPLETE, FAILED) for run in runs)
    if left:
        yield f"Runs not complete yet: {left} of {len(runs)}; the same command continues."


def _code_remarks(result: Result) -> Iterator[str]:
    if len(result["code"]) < 2:
        return
    names = {run["folder"]: f"{_run_name(row, run)} (seed {run['seed']})" for row in result["rows"] for run in row["runs"]}
    parts = []
    for code in result["code"]:
        runs = [names[folder] for folder in code["runs"]]
        more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
        commit = f"commit {code['commit'][:9]}" if code["commit"] else "no git checkout"
        parts.append(f"{commit}{' with uncommitted changes' * bool(code['dirty'])}: {', '.join(runs[:4])}{more}")
    yield f"The runs were not all made by the same code; rows with{STAR} differ from {_basis(result)}. " + "; ".join(parts) + "."


def _power_remarks(result: Result) -> Iterator[str]:
    found = []
    for column in result["columns"]:
        needs = []
        for row in result["rows"]:
            cell = row["cells"][column["key"]]
            published, ours = cell["published"] or {}, cell["difference"] or {"n": 0}
            if published.get("difference") is not None and ours["n"] > 1:
                needs.append(f"{row['name']} {cell['seeds_needed'] or 'over 1000'}")
        found += [f"{column['title']}: {', '.join(needs)}"] if needs else []
    if found:
        effect = "an effect of the paper's size with a power of 80 %, given the spread between the seeds here"
        yield f"Seeds needed to detect {effect}: {'; '.join(found)}."


def head_and_body(result: Result, heading: str = "{}") -> tuple[list[str], list[list[str]]]:
    """Column titles, and rows of cells. A separate row names each group, formatted by `heading`."""
    head, body, group = ["row"], [], ""
    for column in result["columns"]:
        head += [column["title"]]
        head += [f"{DELTA} {result['baseline']}"] if has_difference(result) else []
        head += ["paper"] if has_paper(result, column) else []
    for row in result["rows"]:
        if row["group"] and row["group"] != group:
            body.append([heading.format(row["group"]), *[""] * (len(head) - 1)])
        group = row["group"]
        cells = [label(row, result)]
        for column in result["columns"]:
            texts = cell(row, column, result)
            cells.append(texts["ours"])
            if has_difference(result):
                cells.append("baseline" if row["name"] == result["baseline"] else texts["difference"] or "-")
            if has_paper(result, column):
                cells.append(texts["paper"] + f" ({texts['paper_difference']})" * bool(texts["paper_difference"]))
        body.append(cells)
    return head, body


def markdown(result: Result) -> str:
    """The table as GitHub Markdown with costs and remarks, aligned so that the source is readable too."""
    lines = [f"# {result['name']} at scale {result['scale']}", "", result["summary"] + ".", ""]
    if result["changes"]:
        lines += ["With " + ", ".join(f"{k} = {v}" for k, v in result["changes"].items()) + ".", ""]
    for head, rows in (head_and_body(result, "**{}**"), costs(result)):
        titles, *cells = ([text.replace("|", "\\|") for text in texts] for texts in (head, *rows))
        lines += [tabulate(cells, titles, "github", disable_numparse=True), ""] if rows else []
    return "\n".join([*lines, *(f"- {note}" for note in [*result["notes"], *remarks(result), *missing(result)])]) + "\n"


def csv_text(result: Result) -> str:
    """One line for each row and column, with the numbers of the cells and every seed's value."""
    lines = [_numbers(row, column, result) for row in result["rows"] for column in result["columns"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0] if lines else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _numbers(row: Line, column: Line, result: Result) -> dict[str, Any]:
    found = row["cells"][column["key"]]
    published = found["published"] or {}
    line = {"row": row["name"], "group": row["group"], "column": column["title"]}
    line |= {"path": column["key"], "better": column["better"]}
    n, mean, low, high = _bounds(found["ours"])
    line |= {"n": n, "mean": mean, "low": low, "high": high}
    n, mean, low, high = _bounds(found["difference"])
    line |= {"difference": mean, "difference_low": low, "difference_high": high, "difference_n": n}
    line["paper"] = published.get("value")
    line |= {f"paper_{key}": published.get(key) for key in ("difference", "note")}
    return line | {f"seed_{seed}": value for seed, value in zip(result["seeds"], found["values"], strict=True)}


def _bounds(summary: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """n, mean, and both ends of the interval."""
    if summary is None:
        return 0, None, None, None
    n, mean, half = (summary[key] for key in ("n", "mean", "half"))
    return (n, mean, None, None) if half is None else (n, mean, mean - half, mean + half)


def latex(result: Result) -> str:
    """The table as LaTeX for a paper: a tabular with booktabs rules."""
    head, rows = head_and_body(result)
    text = tabulate(rows, head, "latex_booktabs", disable_numparse=True, colalign=["left", *["right"] * (len(head) - 1)])
    for sign, command in ((PLUS_MINUS, r"$\pm$"), (DELTA, r"$\Delta$"), (MINUS, "$-$")):
        text = text.replace(sign, command)
    title = f"{result['name']} at scale {result['scale']}, {len(result['seeds'])} seeds"
    return f"% {title}; needs \\usepackage{{booktabs}}\n{text}\n"
