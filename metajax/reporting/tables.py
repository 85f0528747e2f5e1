"""Tables: run or resume every row for every seed, then gather the rows' reports side by side."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metajax.config import Config, nearest, override, require
from metajax.progress import say
from metajax.registry import Row, Table
from metajax.reporting.html import write_table_report
from metajax.reporting.records import default_workdir, write_json

RunOne = Callable[[Config, Path], dict[str, Any]]


def choose_rows(table: Table, words: str | None) -> tuple[Row, ...]:
    """All rows, the core ones ("core"), or those named in a comma-separated list."""
    if words is None:
        return table.rows
    if words == "core":
        return tuple(row for row in table.rows if row.core)
    by_name = {row.name: row for row in table.rows}
    for word in words.split(","):
        require(word in by_name, f"table {table.name} has no row {word!r}{nearest(word, by_name)}; rows: {', '.join(by_name)}")
    return tuple(by_name[word] for word in words.split(","))


def run_table(
    table: Table, scale: str, seeds: Sequence[int], changes: dict[str, Any], root: Path, run_one: RunOne, rows: Sequence[Row]
) -> dict[str, Any]:
    """Run every (row, seed) that is not complete, write table.json, table.md and report.html, and return the result.

    Args:
      changes: dotted overrides applied to every row.
      root: of the run directories; the table goes to ROOT/NAME/SCALE, to SCALE-HASH beside it with changes or fewer rows.
      run_one: (config, workdir) -> the run's report.

    Seeds that an earlier table in the same place has are shown too: their runs are complete.
    """
    folder = _folder(table, scale, changes, root, rows)
    earlier = json.loads((folder / "table.json").read_text())["seeds"] if (folder / "table.json").exists() else []
    seeds = sorted({*seeds, *earlier})
    configs = {row.name: row_config(table, row, scale, changes) for row in rows}  # a mistake stops here, before any run
    runs: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    folders: dict[str, list[Path]] = {row.name: [] for row in rows}
    jobs = [(row, seed) for seed in seeds for row in rows]
    for number, (row, seed) in enumerate(jobs, 1):
        config = replace(configs[row.name], seed=seed)
        workdir = default_workdir(config, root)
        say(f"[{number}/{len(jobs)}] {config.name}, seed {seed}: {workdir}")
        runs[row.name].append(run_one(config, workdir))
        folders[row.name].append(workdir)
    result = {
        "folder": str(folder),
        "changes": {k: str(v) for k, v in changes.items()},
        "name": table.name,
        "scale": scale,
        "seeds": list(seeds),
        "summary": table.summary,
        "paper": table.paper,
        "notes": list(table.notes),
        "baseline": table.baseline,
        "columns": [{"title": c.title, "path": c.path, "digits": c.digits, "better": c.better} for c in table.columns],
        "rows": [
            {
                "name": row.name,
                "changes": {k: str(v) for k, v in row.changes.items()},
                "published": dict(row.published or {}),
                "parameters": runs[row.name][0]["parameters"]["total"],
                "counts": runs[row.name][0]["counts"],
                "values": {c.path: [_lookup(report, c.path) for report in runs[row.name]] for c in table.columns},
                "runs": [str(f) for f in folders[row.name]],
            }
            for row in rows
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", result)
    (folder / "table.md").write_text(markdown(result), encoding="utf-8")
    write_table_report(folder, result, head=headers(result), body=body(result), seed_note=seed_note(result))
    return result


def _folder(table: Table, scale: str, changes: dict[str, Any], root: Path, rows: Sequence[Row]) -> Path:
    if not changes and tuple(rows) == table.rows:
        return root / table.name / scale
    variant = json.dumps([{k: str(v) for k, v in changes.items()}, [row.name for row in rows]], sort_keys=True)
    return root / table.name / f"{scale}-{hashlib.sha256(variant.encode()).hexdigest()[:8]}"


def row_config(table: Table, row: Row, scale: str, changes: dict[str, Any]) -> Config:
    """The row with the table-wide changes; those of a sub-config that the row does without pass it by."""
    config = table.config(row, scale)
    absent = {field for field in changes if "." in field and getattr(config, field.partition(".")[0], config) is None}
    for field in sorted(absent):
        say(f"{config.name} has no {field.partition('.')[0]}: --set {field} passes it by")
    return override(config, {field: value for field, value in changes.items() if field not in absent})


def _lookup(report: dict[str, Any], path: str) -> float | None:
    value: Any = report
    for key in path.split("."):
        if key not in value:
            return None
        value = value[key]
    return None if value is None else float(value)


def cell(values: Sequence[float | None], digits: int) -> str:
    """Mean over seeds, with the range when there are several; a dash when the row has no such number."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def headers(result: dict[str, Any]) -> list[str]:
    """Column titles of the rendered table."""
    return ["row", *(c["title"] for c in result["columns"]), "parameters", "body tokens", "metadata tokens", "meta-tokens"]


def body(result: dict[str, Any]) -> list[list[str]]:
    """Rendered cells, one list a row."""
    return [
        [
            row["name"],
            *(cell(row["values"][c["path"]], c["digits"]) for c in result["columns"]),
            f"{row['parameters']:,}",
            *(f"{row['counts'][key]:,}" for key in ("body", "metadata", "meta_tokens")),
        ]
        for row in result["rows"]
    ]


def seed_note(result: dict[str, Any]) -> str:
    """What the number of seeds allows to be said."""
    n, command = len(result["seeds"]), f"`python run.py {result['name']} --scale {result['scale']} --seeds 3`"
    if n == 1:
        return f"One seed makes no ranking: run {command} for the spread between seeds; complete runs are not made again."
    note = f"{n} seeds: mean, and the range over seeds in brackets; every seed is shared by all rows."
    return note if n > 2 else f"{note} Three are the least for a ranking: run {command}; complete runs are not made again."


def markdown(result: dict[str, Any]) -> str:
    """The table as GitHub Markdown, with its notes."""
    head = headers(result)
    lines = [f"# {result['name']} at scale {result['scale']}", "", result["summary"] + ".", ""]
    if result["changes"]:
        lines += ["With " + ", ".join(f"{k} = {v}" for k, v in result["changes"].items()) + ".", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for cells in body(result)]
    lines += ["", *(f"- {note}" for note in [*result["notes"], seed_note(result)])]
    return "\n".join(lines) + "\n"
