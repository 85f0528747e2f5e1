"""Run or resume every row of a table for every seed, parents first, and write the table after each run.

A table may be stopped at any time. Its runs are ordinary runs, and the table is made from their files each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metajax.config import AnyConfig
from metajax.core.atomic import write_text
from metajax.core.progress import say, warn
from metajax.core.workers import Inline
from metajax.registry import Row, Table
from metajax.runs.directory import FAILURE_LOG, Gone, Place, default_workdir
from metajax.runs.files import find_readable, write_json
from metajax.runs.parents import absent_fields, apply_changes, inherited, resolve_parents
from metajax.tables.choice import choose_rows
from metajax.tables.formats import csv_text, latex, markdown
from metajax.tables.results import COMPLETE, PlannedRun, gather, last_failure, record_failure, record_retry
from metajax.vision.analyses import check_analyses

RunOne = Callable[[AnyConfig, Path, Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class TablePlan:
    """A table with all additions of a command, resolved, so that mistakes are reported before the first run."""

    table: Table
    scale: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]  # seeds to run
    changes: Mapping[str, Any]
    root: Path  # root of the run directories

    @property
    def folder(self) -> Path:
        """ROOT/NAME/SCALE; for changes or fewer rows the sibling folder SCALE-core or SCALE-HASH8."""
        home = self.root / self.table.name
        for words, suffix in ((None, ""), ("core", "-core")):
            if not self.changes and self.rows == choose_rows(self.table, words):
                return home / f"{self.scale}{suffix}"
        variant = json.dumps([{k: str(v) for k, v in self.changes.items()}, [row.name for row in self.rows]], sort_keys=True)
        return home / f"{self.scale}-{hashlib.sha256(variant.encode()).hexdigest()[:8]}"

    def run_of(self, row: Row, seed: int, part: str) -> tuple[PlannedRun, tuple[PlannedRun, ...]]:
        """The run of a row's part, and the runs that it starts from, oldest first."""
        config = replace(apply_changes(self.table.config(row, self.scale, part), self.changes), seed=seed)
        config, older = resolve_parents(config, self.changes, self.root)
        folders = [default_workdir(parent, self.root) for parent in older]
        parents = tuple(PlannedRun(parent, folders[i], tuple(folders[:i])) for i, parent in enumerate(older))
        return PlannedRun(config, default_workdir(config, self.root), tuple(folders), part), parents

    def _lines(self) -> list[tuple[Row, str]]:
        """Every row whose fields exist in this scale's corpus, with each of its parts."""
        present = [row for row in self.rows if not self.table.lacks(row, self.scale)]
        return [(row, part) for row in present for part in self.table.parts_of(row, self.scale)]

    def runs(self) -> list[PlannedRun]:
        """All runs, each once, after those that it starts from; all rows of one seed before the next seed."""
        found: dict[Path, PlannedRun] = {}
        for seed in self.seeds:
            for row, part in self._lines():
                run, parents = self.run_of(row, seed, part)
                for one in (*parents, run):
                    found.setdefault(one.workdir, one)
        return list(found.values())

    def result(self) -> dict[str, Any]:
        """The table from the files on disk. Seeds of earlier commands are shown if one of their runs is complete."""
        earlier = (find_readable(self.folder / "table.json") or {"seeds": []})["seeds"]
        asked = sorted({*self.seeds, *earlier})
        found = {(row.name, part): [self.run_of(row, seed, part)[0] for seed in asked] for row, part in self._lines()}
        made = {run.config.seed for runs in found.values() for run in runs if (run.workdir / "report.json").exists()}
        seeds = [seed for seed in asked if seed in made or seed in self.seeds]
        rows: dict[str, dict[str, list[PlannedRun]]] = {row.name: {} for row in self.rows}
        for (name, part), runs in found.items():
            rows[name][part] = [run for run in runs if run.config.seed in seeds]
        return gather(self.table, self.scale, seeds, self.changes, self.root, rows)

    def write(self) -> dict[str, Any]:
        """Write table.json, table.md, table.csv, table.tex and report.html, and return the result."""
        from metajax.tables.page import write_table_page

        result = self.result()
        write_json(self.folder / "table.json", result)
        for name, text in (("table.md", markdown), ("table.csv", csv_text), ("table.tex", latex)):
            write_text(self.folder / name, text(result))
        write_table_page(self.folder, result, self.root)
        return result


def plan_table(
    table: Table, scale: str, seeds: Sequence[int], changes: Mapping[str, Any], root: Path, rows: Sequence[Row]
) -> TablePlan:
    """Resolve the table as a command asks for it.

    Args:
      changes: dotted overrides of every row and of the runs that rows start from (see `metajax.runs.parents.inherited`).

    Raises:
      UserError: an unknown analysis, a change that fits no row, a parent that does not exist, experiments that start from each other.
    """
    check_analyses(f"table {table.name}", table.analyses)
    plan = TablePlan(table, scale, tuple(rows), tuple(seeds), changes, root)
    for config in {run.config.name: run.config for run in plan.runs()}.values():
        for field in absent_fields(config, inherited(changes)):
            say(f"{config.name} does not read {field}; --set skips it there")
    return plan


def run_table(plan: TablePlan, run_one: RunOne, executor: Executor | None = None, at_once: int = 1) -> dict[str, Any]:
    """Run or resume every run of the plan and return the result; a run that fails is recorded, and the others continue.

    Args:
      run_one: (config, workdir, names of analyses) -> the run's report; returns at once if everything is there.
      executor: makes `at_once` runs at a time, each after the runs that it starts from; None: in this process, one by one.
    """
    plan.write()
    with contextlib.closing(Place(plan.root)) as root, root.while_there():
        return _run_all(plan, run_one, executor or Inline(), at_once, root)


def _run_all(plan: TablePlan, run_one: RunOne, executor: Executor, at_once: int, root: Place) -> dict[str, Any]:
    waiting, result = plan.runs(), plan.result()
    count, failures, running = len(waiting), {}, {}
    shown = {run["folder"] for row in result["rows"] for run in row["runs"]}
    while waiting or running:
        unfinished = {run.workdir for run in (*waiting, *running.values())}
        for run in [run for run in waiting if unfinished.isdisjoint(run.parents)][: at_once - len(running)]:
            is_row = run.workdir.relative_to(plan.root).as_posix() in shown
            purpose = "" if is_row else ", from which rows start"
            waiting.remove(run)
            say(f"[{count - len(waiting)}/{count}] {run.config.name}, seed {run.config.seed}{purpose}: {run.workdir}")
            running[executor.submit(attempt, run, run_one, plan.table.analyses if is_row else (), dict(failures))] = run
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            reason, changed = future.result()
            root.require_there()
            if reason is not None:
                failures[run.workdir] = reason
                warn(f"failed: {reason}; the log is {run.workdir / FAILURE_LOG}")
            if reason is not None or changed:
                result = plan.write()
    return result


def attempt(run: PlannedRun, run_one: RunOne, analyses: Sequence[str], failures: Mapping[Path, str]) -> tuple[str | None, bool]:
    """Make one run and return (why it failed, whether its report is new)."""
    parent = next((p for p in run.parents if p in failures), None)
    if parent is not None:
        reason = f"the run it starts from failed ({failures[parent]})"
        record_failure(run.workdir, reason, f"see {parent / FAILURE_LOG}")
        return reason, False
    if last_failure(run.workdir) is not None:
        record_retry(run.workdir)
    report = run.workdir / "report.json"
    before = report.stat().st_mtime_ns if report.exists() else None
    try:
        run_one(run.config, run.workdir, analyses)
    except Gone:
        raise
    except Exception as error:  # any error: the other rows do not depend on it, and the log has the traceback
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        record_failure(run.workdir, reason, traceback.format_exc())
        return reason, False
    return None, report.stat().st_mtime_ns != before


def has_runs(result: Mapping[str, Any]) -> bool:
    """Whether any run of the table is complete."""
    return any(run["state"] == COMPLETE for row in result["rows"] for run in row["runs"])
