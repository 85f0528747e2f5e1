"""Printing the list of tables and experiments, and the plan of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.padding import Padding

from metajax import registry
from metajax.config import config_hash
from metajax.core.progress import PROGRAM, plain
from metajax.reporting.lines import console, duration, line_of, print_grid
from metajax.tables.choice import choose_rows, expected_minutes

if TYPE_CHECKING:
    from metajax.tables.run import TablePlan


def print_list(pattern: str) -> None:
    """Print tables with their rows, and single experiments, whose name contains `pattern`."""
    tables = [t for t in registry.tables().values() if pattern in t.name]
    single = [e for e in registry.experiments().values() if pattern in e.name and (e.table is None or e.table not in tables)]
    for table in tables:
        times = (f"{scale} {_table_time(table, scale)}" for scale in table.scales)
        _entry(table.name, f"three seeds: {', '.join(times)}", table.summary)
        _entry_line("rows", f"{table.name}/", [row.name for row in table.rows])
        if table.parts:
            _entry_line("each with", "/", table.parts)
        if table.coverage:
            _entry_line("paper:", "", [f"{table.coverage} of {table.paper}"])
    for experiment in single:
        changes = experiment.row.changes if experiment.row else {}
        what = ", ".join(f"{k} = {_short(v)}" for k, v in changes.items()) or experiment.summary
        times = (f"{scale} {duration(experiment.minutes[scale])}" for scale in experiment.scales)
        _entry(experiment.name, ", ".join(times), what)
    if not tables and not single:
        console.print(f"nothing named like {pattern!r}")
    _print_coverage(tables)
    console.print(f"\nrun: {PROGRAM} NAME    look first: {PROGRAM} show NAME    help: {PROGRAM} --help")


def _print_coverage(tables: Iterable[registry.Table]) -> None:
    """Print for each paper how many rows of its tables and figures are listed; a row in two tables counts twice."""
    here, in_print, printed = Counter(), Counter(), Counter()
    for table in (table for table in tables if table.coverage):
        paper = table.paper.partition(")")[0] + ")"
        here[paper] += table.paper_rows_here
        in_print[paper] += table.paper_rows_in_print
        printed[paper] += table.paper_rows
    if printed:
        console.print(line_of("\nrows of the papers' tables and figures", " available at paper scale"))
    for paper, count in printed.items():
        more = f", {in_print[paper]} more in print alone" * (in_print[paper] > 0)
        console.print(plain(f"    {paper}: {here[paper]} of {count} rows{more}"))


def _entry(name: str, times: str, what: str) -> None:
    console.print(line_of(name, f"  ({times})"))
    console.print(Padding(plain(what), (0, 0, 0, 4)))


def _entry_line(title: str, before: str, names: Iterable[str]) -> None:
    console.print(Padding(line_of(f"{title} {before}", "  ".join(names), "dim"), (0, 0, 0, 4)))


def _table_time(table: registry.Table, scale: str) -> str:
    """Expected time of a whole table with three seeds, and in brackets that of its core rows if they are fewer."""
    whole = duration(3 * expected_minutes(table, scale))
    if not table.runs_at(scale):
        return "nothing to run"
    if choose_rows(table, "core") == table.rows:
        return whole
    return f"{whole} (core {duration(3 * expected_minutes(table, scale, 'core'))})"


def _short(value: Any) -> str:
    is_config = hasattr(value, "__dataclass_fields__") and not isinstance(value, registry.ByScale)
    return type(value).__name__ if is_config else str(value).replace("\n", "\\n")


def print_table_plan(plan: TablePlan) -> None:
    """Print a table before it runs: for each row its changes, the run it starts from, the paper's values and the run hash."""
    table, scale, seed = plan.table, plan.scale, plan.seeds[0]
    console.print(line_of(table.name, f" at scale {scale}: {table.summary}"))
    if table.coverage:
        console.print(plain(f"{table.coverage} of {table.paper}"))
    grid = []
    for row in plan.rows:
        lacks = table.lacks(row, scale)
        of_row = [] if lacks else [plan.run_of(row, seed, part) for part in table.parts_of(row, scale)]
        changes = ", ".join(f"{k} = {_short(v)}" for k, v in registry.at_scale(row.changes, scale).items())
        differs = f"not run here for lack of {lacks}" if lacks else changes or (row.of and f"the runs of {row.of}") or "-"
        in_print = [(column.title, row.paper(column.key)) for column in table.columns_at(scale)]
        published = ", ".join(f"{title} {'not stated' if p.value is None else p.value}" for title, p in in_print if p)
        starts = dict.fromkeys(parents[-1].config.name if parents else run.config.init.from_ for run, parents in of_row)
        name = f"{row.name} (baseline)" if row.name == table.baseline else row.name
        hashes = ", ".join(config_hash(run.config) for run, _ in of_row)
        grid.append((name, differs, ", ".join(filter(None, starts)) or "-", published or "-", hashes or "-"))
    print_grid(("row", "what changes", "starts from", "the paper says", "hash"), grid)
    time = duration(expected_minutes(table, scale))
    console.print(f"{len(plan.runs())} runs a seed, about {time}; run it: {PROGRAM} {table.name}")
