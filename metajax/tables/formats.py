"""A table's result as text: the cells that every form shows, the remarks below them, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metajax.tables.results import COMPLETE, FAILED, NOT_RUN, UNFINISHED

Result = Mapping[str, Any]
COSTS = (  # key of a row's cost, title
    ("parameters", "parameters"),
    ("flops_per_slot", "FLOPs a slot"),
    ("flops", "training FLOPs"),
    ("slots", "slots"),
    ("body", "body tokens"),
    ("metadata", "metadata tokens"),
    ("meta_tokens", "meta-tokens"),
)
CSV_HEAD = (
    "row", "group", "column", "path", "better", "n", "mean", "low", "high", "difference", "difference_low", "difference_high",
    "difference_n", "paper", "paper_difference", "paper_note",
)  # fmt: skip
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\N{MINUS SIGN}": "$-$"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}
STAR = " *"
DELTA, PLUS_MINUS = "\N{GREEK CAPITAL LETTER DELTA}", "\N{PLUS-MINUS SIGN}"


# ------------------------------------------------------------------------------------------------------- cells


def ours_text(row: Mapping[str, Any], column: Mapping[str, Any], seeds: int) -> str:
    """Mean and half width of the interval; the number of seeds where some are missing; else why there is no number."""
    summary = row["cells"][column["key"]]["ours"]
    return _interval(summary, column["digits"], seeds) if summary else state_of(row, column)


def difference_text(row: Mapping[str, Any], column: Mapping[str, Any], result: Result) -> str:
    """The paired difference to the baseline."""
    if row["name"] == result["baseline"]:
        return "baseline"
    summary = row["cells"][column["key"]]["difference"]
    return _interval(summary, column["digits"], len(result["seeds"]), "+") if summary else "-"


def paper_text(row: Mapping[str, Any], column: Mapping[str, Any], result: Result) -> str:
    """The paper's value, with the number of its remark; '' where the paper has no such row."""
    said = row["cells"][column["key"]]["published"]
    if said is None:
        return ""
    mark = f" [{paper_notes(result).index(said['note']) + 1}]" if said["note"] else ""
    return ("not stated" if said["value"] is None else str(said["value"])) + mark


def paper_difference_text(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """The paper's difference to its own baseline; '' where that cannot be said."""
    said = row["cells"][column["key"]]["published"]
    if said is None or said["difference"] is None:
        return ""
    return f"{said['difference']:+.{len(str(said['value']).partition('.')[2])}f}"  # with as many digits as the paper gives


def _interval(summary: Mapping[str, Any], digits: int, seeds: int, sign: str = "") -> str:
    text = f"{summary['mean']:{sign}.{digits}f}"
    text += f" {PLUS_MINUS} {summary['half']:.{digits}f}" if summary["half"] is not None else ""
    return text if summary["n"] == seeds else f"{text} (n={summary['n']})"


def state_of(row: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """What a cell without a number says: what is the matter with the row or the runs that the column reads, or that there is no such number."""
    if row["lacks"]:
        return "not here"
    states = {run["state"] for run in row["runs"] if column["part"] in (run["part"], "*")}
    return next((state for state in (FAILED, UNFINISHED, NOT_RUN) if state in states), "-")


def label(row: Mapping[str, Any], result: Result) -> str:
    """The row's name, with a star where a run of it was made by other code than the first run of `_basis`."""
    codes = {r["name"]: [(run["git"]["commit"], run["git"]["dirty"]) for run in r["runs"] if run["git"]] for r in result["rows"]}
    basis = codes.get(_basis(result), [])
    return row["name"] + STAR * any(code != basis[0] for code in codes[row["name"]] if basis)


def _basis(result: Result) -> str:
    """The row whose code the others' is held against: the baseline, or the first that has runs; "" where none has."""
    made = [row["name"] for row in result["rows"] if any(run["git"] for run in row["runs"])]
    return result["baseline"] or next(iter(made), "")


def run_name(row: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The row, with the part whose run this is."""
    return f"{row['name']}/{run['part']}" if run["part"] else row["name"]


def cost_text(row: Mapping[str, Any], key: str, result: Result) -> str:
    """A cost, and how much more than the baseline's it is."""
    cost, basis = row["cost"], next((r["cost"] for r in result["rows"] if r["name"] == result["baseline"]), None)
    if cost is None:
        return "-"
    text = f"{cost[key]:.3g}" if key == "flops" else f"{cost[key]:,.0f}"
    if basis is None or not basis[key] or cost[key] == basis[key]:
        return text
    return f"{text} ({cost[key] / basis[key] - 1:+.1%})"


def shown_costs(result: Result) -> list[tuple[str, str]]:
    """The costs that any row has."""
    return [(key, title) for key, title in COSTS if any(row["cost"] and row["cost"].get(key) for row in result["rows"])]


def has_paper(result: Result, column: Mapping[str, Any]) -> bool:
    """Whether the paper says anything in this column."""
    return any(row["cells"][column["key"]]["published"] for row in result["rows"])


def has_difference(result: Result) -> bool:
    """Whether there is a baseline and a row to compare with it."""
    return result["baseline"] is not None and len(result["rows"]) > 1


# ------------------------------------------------------------------------------------------------------ remarks


def remarks(result: Result) -> list[str]:
    """What has to be said below the table beside its own notes: seeds, scale, sources, code, power."""
    said = [seed_note(result)]
    if result["scale"] != "paper" and any(has_paper(result, c) for c in result["columns"]):
        said.append(
            f"The paper's values belong to models and data of the paper's size, ours to scale {result['scale']}: compare directions, not levels."
        )
    said += [f"[{i}] {note}" for i, note in enumerate(paper_notes(result), 1)]
    said += [f"{row['name']}: {row['note']}" for row in result["rows"] if row["note"]]
    for lacks in dict.fromkeys(row["lacks"] for row in result["rows"] if row["lacks"]):
        said.append(
            f"Not here, for want of {lacks}: {', '.join(row['name'] for row in result['rows'] if row['lacks'] == lacks)}."
        )
    return [*said, *_code_remarks(result), *_power_remarks(result)]


def seed_note(result: Result) -> str:
    """What the number of seeds allows to be said."""
    n = len(result["seeds"])
    if n == 1:
        return "One seed makes no ranking and has no interval: run the same command with `--seeds 3`; complete runs are not made again."
    note = f"{n} seeds: mean {PLUS_MINUS} half of the 95 % interval (Student t)."
    if has_difference(result):
        note += (
            f" {DELTA} is the difference to {result['baseline']}, seed by seed, with its own interval; one interval in twenty "
            "leaves 0 out by chance alone."
        )
    return note if n > 2 else f"{note} Two seeds make very wide intervals; run the same command with `--seeds 3`."


def paper_notes(result: Result) -> list[str]:
    """Where published values were read when not in a table of the paper, each once."""
    cells = (row["cells"][column["key"]]["published"] for row in result["rows"] for column in result["columns"])
    return list(dict.fromkeys(said["note"] for said in cells if said and said["note"]))


def failures(result: Result) -> list[dict[str, Any]]:
    """Runs that failed: row, seed, reason, folder."""
    return [
        {"row": run_name(row, run), "seed": run["seed"], "reason": run["reason"], "folder": run["folder"]}
        for row in result["rows"] for run in row["runs"] if run["state"] == FAILED
    ]  # fmt: skip


def missing(result: Result) -> Iterator[str]:
    """Runs that failed, each with its reason, and how many are not complete yet."""
    for found in failures(result):
        yield f"{found['row']}, seed {found['seed']} failed: {found['reason']} (log: `{found['folder']}/failure.log`)"
    runs = [run for row in result["rows"] for run in row["runs"]]
    left = sum(run["state"] not in (COMPLETE, FAILED) for run in runs)
    if left:
        yield f"Runs not complete yet: {left} of {len(runs)}; the same command goes on."


def _code_remarks(result: Result) -> Iterator[str]:
    if len(result["code"]) < 2:
        return
    names = {run["folder"]: f"{run_name(row, run)} (seed {run['seed']})" for row in result["rows"] for run in row["runs"]}
    parts = []
    for code in result["code"]:
        runs = [names[folder] for folder in code["runs"]]
        more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
        commit = f"commit {code['commit'][:9]}" if code["commit"] else "no git checkout"
        parts.append(f"{commit}{' with uncommitted changes' if code['dirty'] else ''}: {', '.join(runs[:4])}{more}")
    yield f"The runs were not all made by the same code; rows with{STAR} differ from {_basis(result)}. " + "; ".join(parts) + "."


def _power_remarks(result: Result) -> Iterator[str]:
    found = []
    for column in result["columns"]:
        needs = []
        for row in result["rows"]:
            cell = row["cells"][column["key"]]
            if paper_difference_text(row, column) and cell["difference"] and cell["difference"]["n"] > 1:
                needs.append(f"{row['name']} {cell['seeds_needed'] or 'over 1000'}")
        found += [f"{column['title']}: {', '.join(needs)}"] if needs else []
    if found:
        yield (
            "Seeds needed to tell an effect of the paper's size from none, four times out of five, by the spread between the seeds here: "
            f"{'; '.join(found)}."
        )


# -------------------------------------------------------------------------------------------------------- forms


def head_and_body(result: Result) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Column titles, and the rows as (group, cells)."""
    head = ["row"]
    for column in result["columns"]:
        head += [column["title"]]
        head += [f"{DELTA} {result['baseline']}"] if has_difference(result) else []
        head += ["paper"] if has_paper(result, column) else []
    return head, [(row["group"], _cells(row, result)) for row in result["rows"]]


def _cells(row: Mapping[str, Any], result: Result) -> list[str]:
    cells = [label(row, result)]
    for column in result["columns"]:
        cells.append(ours_text(row, column, len(result["seeds"])))
        if has_difference(result):
            cells.append(difference_text(row, column, result))
        if has_paper(result, column):
            against = paper_difference_text(row, column)
            cells.append(paper_text(row, column, result) + (f" ({against})" if against else ""))
    return cells


def markdown(result: Result) -> str:
    """The table as GitHub Markdown, aligned to be read as it stands, with costs and remarks."""
    lines = [f"# {result['name']} at scale {result['scale']}", "", result["summary"] + ".", ""]
    if result["changes"]:
        lines += ["With " + ", ".join(f"{k} = {v}" for k, v in result["changes"].items()) + ".", ""]
    head, body = head_and_body(result)
    grid, group = [], ""
    for of_row, cells in body:
        if of_row and of_row != group:
            grid.append([f"**{of_row}**", *[""] * (len(head) - 1)])
        group = of_row
        grid.append(cells)
    lines += [*_markdown_grid(head, grid), ""]
    costs = shown_costs(result)
    if costs:
        grid = [[row["name"], *(cost_text(row, key, result) for key, _ in costs)] for row in result["rows"]]
        lines += [*_markdown_grid(["row", *(title for _, title in costs)], grid), ""]
    return "\n".join([*lines, *(f"- {note}" for note in [*result["notes"], *remarks(result), *missing(result)])]) + "\n"


def _markdown_grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|") for cell in cells] for cells in [head, *body]]
    widths = [max(3, *(len(cells[i]) for cells in safe)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |" for cells in safe]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def csv_text(result: Result) -> str:
    """One line for each row and column, with the numbers behind the cells and every seed's value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CSV_HEAD, *(f"seed_{seed}" for seed in result["seeds"])])
    for row in result["rows"]:
        for column in result["columns"]:
            cell = row["cells"][column["key"]]
            said = cell["published"] or {"value": None, "difference": None, "note": ""}
            ours, difference = (_bounds(cell[name]) for name in ("ours", "difference"))
            writer.writerow([
                row["name"], row["group"], column["title"], column["key"], column["better"], *ours, *difference[1:], difference[0],
                said["value"], said["difference"], said["note"], *cell["values"],
            ])  # fmt: skip
    return text.getvalue()


def _bounds(summary: Mapping[str, Any] | None) -> list[Any]:
    """n, mean, and both ends of the interval."""
    if summary is None:
        return [0, None, None, None]
    mean, half = summary["mean"], summary["half"]
    return [summary["n"], mean, *((None, None) if half is None else (mean - half, mean + half))]


def latex(result: Result) -> str:
    """The table for a paper: a tabular in booktabs' rules."""
    head, body = head_and_body(result)
    lines = [
        f"% {result['name']} at scale {result['scale']}, {len(result['seeds'])} seeds; needs \\usepackage{{booktabs}}",
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        "\\toprule",
        _latex_line(head),
        "\\midrule",
    ]
    group = ""
    for of_row, cells in body:
        if of_row and of_row != group:
            lines.append(f"\\multicolumn{{{len(head)}}}{{l}}{{\\emph{{{_tex(of_row)}}}}} \\\\")
        group = of_row
        lines.append(_latex_line(cells))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"


def _tex(text: str) -> str:
    escaped = "".join(LATEX.get(sign, sign) for sign in text)
    return escaped.replace(PLUS_MINUS, r"$\pm$").replace(DELTA, r"$\Delta$")
