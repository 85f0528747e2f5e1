"""A sample of all tables within a time: a row of each in turn, then another of each, to see that everything runs to its numbers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    empty: tuple[str, ...]  # columns that it should fill and does not


def budget_seconds(text: str) -> float:
    """Seconds of 90s, 60m or 2h; UserError for anything else."""
    number, unit = text[:-1], text[-1:]
    require(unit in UNITS, f"--budget {text}: expected a time such as 60m or 2h")
    return UNITS[unit] * convert(number, Budget, f"--budget {text}: expected a time such as 60m or 2h; its number")


def sample(tables: Iterable[Table], scale: str, seconds: float, seed: int, root: Path, run_one: RunOne) -> list[Sampled]:
    """Make lines of the tables that have `scale` until no further one is expected to end in time; another seed chooses others.

    The first line of each table is made before the second of any. What is complete already costs nothing.
    """
    tables = [table for table in tables if scale in table.scales]
    require(bool(tables), f"no table has scale {scale!r}{nearest(scale, registry.SCALES)}")
    ends, made = time.monotonic() + seconds, []
    for table, row, part in _order(tables, scale, seed):
        if time.monotonic() >= ends:
            break
        plan = plan_table(table, scale, [seed], {}, root, [row])
        run, parents = plan.run_of(row, seed, part)
        chain = [one for one in (*parents, run) if not (one.workdir / "report.json").exists()]
        minutes = sum(registry.experiments().get(one.config.name, table).minutes.get(scale, 0.0) for one in chain)
        left = (ends - time.monotonic()) / 60
        if minutes > left:
            continue
        say(f"{table.name}/{row.name}{part and '/' + part}, about {minutes:.1f} of {left:.0f} minutes left")
        began, failures, reason = time.monotonic(), {}, None
        for one in (*parents, run):
            reason, _ = attempt(one, run_one, table.analyses if one is run else (), failures)
            if reason is not None:
                failures[one.workdir] = reason
        cells = plan.write()["rows"][0]["cells"]
        empty = [c.title for c in table.columns_at(scale) if c.part == part and cells[c.key]["values"] == [None]]
        spent = (time.monotonic() - began) / 60
        made.append(Sampled(table.name, row.name, part, spent, reason, () if reason else tuple(empty)))
    write_json(root / "sample" / f"{scale}.json", [asdict(one) for one in made])
    return made


def _order(tables: Sequence[Table], scale: str, seed: int) -> Iterator[tuple[Table, Row, str]]:
    chance = random.Random(seed)
    lines: Mapping[str, list[tuple[Row, str]]] = {
        table.name: [(row, part) for row in table.rows if not table.lacks(row, scale) for part in table.parts_of(row, scale)]
        for table in tables
    }
    for name in lines:
        chance.shuffle(lines[name])
    shuffled = chance.sample(tables, len(tables))
    for i in range(max(map(len, lines.values()))):
        for table in shuffled:
            if i < len(lines[table.name]):
                yield table, *lines[table.name][i]


def summary(made: Sequence[Sampled]) -> list[dict[str, Any]]:
    """For each table that was reached: its lines, those that failed, and columns without a number."""
    found: dict[str, dict[str, Any]] = {}
    for one in made:
        line = found.setdefault(one.table, {"table": one.table, "lines": 0, "minutes": 0.0, "failed": [], "empty": []})
        line["lines"] += 1
        line["minutes"] += one.minutes
        line["failed"] += [f"{one.row}{one.part and '/' + one.part}: {one.reason}"] if one.reason else []
        line["empty"] = sorted({*line["empty"], *one.empty})
    return list(found.values())
