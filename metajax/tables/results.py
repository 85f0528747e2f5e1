"""A table's result: the files of its runs combined with statistics and the paper's values. Nothing is run here."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metajax.config import AnyConfig
from metajax.core.atomic import write_text
from metajax.evaluation.statistics import Summary, Values, paired_difference, seeds_needed, summarize
from metajax.registry import Column, Row, Table, at_scale
from metajax.runs.directory import FAILURE_LOG
from metajax.runs.files import find_readable

PlannedRow = Mapping[str, Sequence["PlannedRun"]]  # part -> its run for each seed
COMPLETE, FAILED, UNFINISHED, NOT_RUN = "complete", "failed", "not finished", "not run yet"
Report = Mapping[str, Any] | None  # None if the run is not complete


@dataclass(frozen=True)
class PlannedRun:
    """One run of a table: a row with a seed, or a run that rows start from."""

    config: AnyConfig
    workdir: Path
    parents: tuple[Path, ...]  # workdirs that must be complete before it, oldest first
    part: str = ""  # part of the table


def gather(
    table: Table, scale: str, seeds: Sequence[int], changes: Mapping[str, Any], root: Path, rows: Mapping[str, PlannedRow]
) -> dict[str, Any]:
    """The table as plain data: every number of every seed, statistics, published values, costs, and the state of each run.

    Args:
      rows: row name -> its runs.

    Numbers are in the column's unit. Lists over seeds have None if a run is not complete or has no such number.
    """
    reports, runs = {}, {}
    for name, parts in rows.items():
        reports[name] = {part: [find_readable(run.workdir / "report.json") for run in of_part] for part, of_part in parts.items()}
        pairs = zip(itertools.chain(*parts.values()), itertools.chain(*reports[name].values()), strict=True)
        runs[name] = [_run_state(run, report, root, table.analyses) for run, report in pairs]
    chosen = [row for row in table.rows if row.name in rows]
    basis = next((row for row in chosen if row.name == table.baseline), None)
    columns, compared = table.columns_at(scale), reports[basis.name] if basis else {}
    values: dict[str, dict[str, Values]] = {row.name: {} for row in chosen}
    for row, column in itertools.product(chosen, columns):
        pairs = zip(*(_read_by(column, found, len(seeds)) for found in (reports[row.name], compared)), strict=True)
        fill = table.filled(row, scale)
        values[row.name][column.key] = [_number(of_seed, fill, column, baseline) for of_seed, baseline in pairs]
    names = {"name": table.name, "scale": scale, "seeds": list(seeds)}
    words = {"summary": table.summary, "paper": table.paper, "coverage": table.coverage, "notes": list(table.notes)}
    return {
        **names,
        **words,
        "changes": {k: str(v) for k, v in changes.items()},
        "baseline": basis.name if basis else None,
        "columns": [dataclasses.asdict(c) | {"key": c.key, "scales": list(c.scales)} for c in columns],
        "rows": [
            {
                **{key: getattr(row, key) for key in ("name", "group", "note")},
                "lacks": table.lacks(row, scale),
                "changes": {k: str(v) for k, v in at_scale(row.changes, scale).items()} | ({"of": row.of} if row.of else {}),
                "runs": runs[row.name],
                "cost": _cost(next(filter(None, itertools.chain(*reports[row.name].values())), None)),
                "cells": {c.key: _cell(c.key, row, basis, values) for c in columns},
            }
            for row in chosen
        ],
        "code": _code({run["folder"]: run["git"] for of_row in runs.values() for run in of_row if run["git"]}),
    }


def _cell(key: str, row: Row, basis: Row | None, values: Mapping[str, Mapping[str, Values]]) -> dict[str, Any]:
    """One number of the table: ours, its difference to the baseline, and the paper's value."""
    ours, paper = values[row.name][key], row.paper(key)
    difference = paper_difference = None
    if basis is not None and basis is not row:
        difference, theirs = paired_difference(ours, values[basis.name][key]), basis.paper(key)
        if paper and theirs and paper.value is not None and theirs.value is not None:
            paper_difference = paper.value - theirs.value
    needed = None
    if difference is not None and difference.deviation is not None and paper_difference:
        needed = seeds_needed(paper_difference, difference.deviation)
    return {
        "values": list(ours),
        "ours": _as_dict(summarize(ours)),
        "difference": _as_dict(difference),
        "published": dataclasses.asdict(paper) | {"difference": paper_difference} if paper else None,
        "seeds_needed": needed,  # for an effect as large as the paper's, with the spread seen here
    }


def _as_dict(summary: Summary | None) -> dict[str, Any] | None:
    return dataclasses.asdict(summary) | {"clear_of_zero": summary.clear_of_zero} if summary else None


def _read_by(column: Column, reports: Mapping[str, Sequence[Any]], seeds: int) -> list[list[Report]]:
    """The reports that a column reads for each seed: the report of its part, or of all parts."""
    if column.part == "*" and reports:
        return [list(of_seed) for of_seed in zip(*reports.values(), strict=True)]
    return [[report] for report in reports.get(column.part, [None] * seeds)]


def _number(reports: Sequence[Report], fill: Mapping[str, str], column: Column, baseline: Sequence[Report]) -> float | None:
    """A column's number for one seed: the mean of each path over the reports, both paths combined; None if one is missing."""
    if column.match is not None:
        curve, target = (_find(report, column.path, fill) for report in (reports[0], baseline[0]))
        share = share_to_match(curve, target[-1][1], column.match) if curve and target else None
        return None if share is None else column.factor * share
    means = []
    for path in column.paths:
        found = [_find(report, path, fill) for report in reports]
        if any(value is None or not math.isfinite(value) for value in found):
            return None
        means.append(sum(map(float, found)) / len(found))
    if column.harmonic:
        first, second = means
        return column.factor * (2 * first * second / (first + second) if first and second else 0.0)
    return column.factor * (means[0] - means[1] if column.minus else means[0])


def share_to_match(curve: Sequence[tuple[int, float]], target: float, margin: float) -> float | None:
    """The share of its steps after which a curve is first better than `target` by `margin`; None if never, or for a single point.

    curve: (step, value) in order, the last at the end of the run; linear in between. A falling curve must be below the target by
    the margin, a rising curve above it. The two ends of the curve decide whether it falls or rises.
    """
    if len(curve) < 2:
        return None
    sign = 1.0 if curve[-1][1] >= curve[0][1] else -1.0
    goal, end = sign * target + margin, curve[-1][0]
    for (step_before, before), (step, value) in itertools.pairwise([curve[0], *curve]):
        if sign * value >= goal:
            back = 0.0 if value == before else (sign * value - goal) / (sign * (value - before)) * (step - step_before)
            return (step - back) / end
    return None


def _find(report: Report, path: str, fill: Mapping[str, str]) -> Any:
    """The value at a path of keys and indices; None if the report or the value is missing."""
    value: Any = report
    for key in path.format_map(fill).split("."):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            return None
    return value


def _cost(report: Report) -> dict[str, float] | None:
    """The size and the budget of a run, from the first complete seed; seeds differ by only a few tokens."""
    if report is None:
        return None
    size = {"parameters": report["parameters"]["total"], "flops_per_position": sum(report["flops_per_token"].values())}
    return size | dict(report["counts"])


def _run_state(run: PlannedRun, report: Report, root: Path, analyses: Sequence[str]) -> dict[str, Any]:
    """The state of a run in a table; a complete run has the table's analyses too."""
    reason = last_failure(run.workdir)
    if report is not None and all(name in report["analyses"] for name in analyses):
        state, reason = COMPLETE, None
    elif reason is not None:
        state = FAILED
    else:
        state = UNFINISHED if (run.workdir / "config.json").exists() else NOT_RUN
    environment = find_readable(run.workdir / "environment.json") if report else None
    return {
        "seed": run.config.seed,
        "part": run.part,
        "folder": run.workdir.relative_to(root).as_posix(),
        "state": state,
        "reason": reason,
        "parent": run.config.init.from_ or None,
        "warnings": len(report["warnings"]) if report else 0,
        "git": environment and environment["git"],
    }


def _code(states: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The versions of the code that made the runs, with the runs of each; more than one means that rows differ in code."""
    made: dict[tuple[Any, Any], list[str]] = {}
    for folder, git in states.items():
        made.setdefault((git["commit"], git["dirty"]), []).append(folder)
    return [{"commit": commit, "dirty": dirty, "runs": folders} for (commit, dirty), folders in made.items()]


def record_failure(workdir: Path, reason: str, details: str) -> None:
    """Add a failure, with its traceback, to the log in the run's folder."""
    _record(workdir, f"failed: {reason}\n{details}")


def record_retry(workdir: Path) -> None:
    """Record in the log of a failed run that it is tried again."""
    _record(workdir, "tried again")


def _record(workdir: Path, words: str) -> None:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_text(workdir / FAILURE_LOG, f"{_log(workdir)}=== {time} {words}\n")


def last_failure(workdir: Path) -> str | None:
    """Why the last attempt of the run failed; None if it did not fail or is being tried again."""
    found = re.findall(r"^=== \S+ (failed: .*|tried again)$", _log(workdir), re.M)
    return found[-1].removeprefix("failed: ") if found and found[-1] != "tried again" else None


def _log(workdir: Path) -> str:
    path = workdir / FAILURE_LOG
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
