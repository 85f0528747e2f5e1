"""A sample of all tables within a time budget: one row of each in turn, to check that rows run and fill their columns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from metajax import registry
from metajax.core.errors import nearest, require
from metajax.core.fields import Range, convert
from metajax.core.progress import say
from metajax.registry import Row, Table
from metajax.runs.files import write_json
from metajax.tables.run import RunOne, attempt, plan_table

Budget = Annotated[float, Range(above=0, most=1_000_000)]
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Sampled:
    """One line of a table, made with one seed."""

    table: str
    row: str
    part: str
    minutes: float
    reason: str | None  # why it failed
    empty: tuple[str, ...]  # columns that it should fill but does not


def budget_seconds(text: str) -> float:
    """Seconds of a text such as 90s, 60m or 2h; UserError for any other form."""
    problem = f"--budget {text}: expected a time such as 60m or 2h"
    require(text[-1:] in UNITS, problem)
    return UNITS[text[-1]] * convert(text[:-1], Budget, f"{problem}; its number")


def sample(tables: Iterable[Table], scale: str, seconds: float, seed: int, root: Path, run_one: RunOne) -> list[Sampled]:
    """Run lines of the tables that have `scale`, as long as the next is expected to end in time; the seed chooses the lines.

    Every table gets its first line before any gets its second. Complete runs take no time.
    """
    tables = [table for table in tables if scale in table.scales]
    require(bool(tables), f"no table has scale {scale!r}{nearest(scale, registry.SCALES)}")
    ends, made = time.monotonic() + seconds, []
    for table, row, part in _order(tables, scale, seed):
        plan = plan_table(table, scale, [seed], {}, root, [row])
        run, parents = plan.run_of(row, seed, part)
        chain, known = [*parents, run], registry.experiments()
        to_make = [one.config.name for one in chain if not (one.workdir / "report.json").exists()]
        minutes, left = sum(known.get(name, table).minutes.get(scale, 0.0) for name in to_make), (ends - time.monotonic()) / 60
        if left <= 0 or minutes > left:
            continue
        say(f"{table.name}/{row.name}{part and '/' + part}, about {minutes:.1f} of {left:.0f} minutes left")
        began, failures, reason = time.monotonic(), {}, None
        for one in chain:
            reason, _ = attempt(one, run_one, table.analyses if one is run else (), failures)
            failures |= {one.workdir: reason} if reason else {}
        cells = plan.write()["rows"][0]["cells"]
        empty = [c.title for c in table.columns_at(scale) if c.part == part and cells[c.key]["values"] == [None]]
        spent = (time.monotonic() - began) / 60
        made.append(Sampled(table.name, row.name, part, spent, reason, () if reason else tuple(empty)))
    write_json(root / "sample" / f"{scale}.json", [asdict(one) for one in made])
    return made


def _order(tables: Sequence[Table], scale: str, seed: int) -> list[tuple[Table, Row, str]]:
    chance, lines = random.Random(seed), []
    for table in chance.sample(tables, len(tables)):
        rows = [row for row in table.rows if not table.lacks(row, scale)]
        own = [(table, row, part) for row in rows for part in table.parts_of(row, scale)]
        lines.append(chance.sample(own, len(own)))
    return [line for turn in zip_longest(*lines) for line in turn if line]


def summary(made: Sequence[Sampled]) -> list[dict[str, Any]]:
    """For each table that was reached: its lines, those that failed, and columns without a number."""
    found = []
    for name in dict.fromkeys(one.table for one in made):
        own = [one for one in made if one.table == name]
        failed = [f"{one.row}{one.part and '/' + one.part}: {one.reason}" for one in own if one.reason]
        counts = {"lines": len(own), "minutes": sum(one.minutes for one in own)}
        found.append({"table": name} | counts | {"failed": failed, "empty": sorted({c for one in own for c in one.empty})})
    return found
