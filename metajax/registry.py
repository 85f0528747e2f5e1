"""Named experiments and tables. A table is a base for each scale and a list of rows: name, what changes, published value."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from metajax.config import Config, Scale, UserError, nearest, override, require

SCALES: tuple[str, ...] = get_args(Scale)
Base = Callable[[str], Config]


@dataclass(frozen=True)
class Row:
    """One line of a table: the fields that differ from the base, and what the paper reports for it."""

    name: str
    changes: Mapping[str, Any]
    published: Mapping[str, float] | None = None
    core: bool = True


@dataclass(frozen=True)
class Column:
    """A number of `report.json` shown in a table, by dotted path; `title` says its unit."""

    title: str
    path: str
    digits: int = 3
    better: str = "lower"


@dataclass(frozen=True)
class Table:
    """A table of a paper, or of ours: rows derived from one base by replacement."""

    name: str
    summary: str
    paper: str
    base: Base
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    baseline: str
    minutes: Mapping[str, float]
    scales: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def config(self, row: Row, scale: str) -> Config:
        """The config of one row at a scale."""
        _require_scale(self.name, self.scales, scale)
        return replace(override(self.base(scale), row.changes), name=f"{self.name}/{row.name}", scale=scale)


@dataclass(frozen=True)
class Experiment:
    """One named run; a table's row is one too."""

    name: str
    summary: str
    paper: str
    build: Base
    minutes: Mapping[str, float]
    scales: tuple[str, ...]
    table: Table | None = None
    row: Row | None = None


_experiments: dict[str, Experiment] = {}
_tables: dict[str, Table] = {}


def table(
    name: str, *, summary: str, paper: str = "", rows: Sequence[Row], columns: Sequence[Column], baseline: str,
    minutes: Mapping[str, float], notes: Sequence[str] = (),
) -> Callable[[Base], Table]:  # fmt: skip
    """Register a table on the function that gives its base for a scale; its rows become experiments NAME/ROW.

    Args:
      minutes: expected minutes of one row, by scale; the scales it names are the scales there are.
    """

    def register(base: Base) -> Table:
        scales = tuple(s for s in SCALES if s in minutes)
        made = Table(name, summary, paper, base, tuple(rows), tuple(columns), baseline, minutes, scales, tuple(notes))
        require(baseline in {row.name for row in rows}, f"table {name}: the baseline {baseline!r} is not one of its rows")
        _add(_tables, name, made)
        for row in rows:
            build = lambda scale, row=row: made.config(row, scale)  # noqa: E731 - binds the row
            _add(
                _experiments,
                f"{name}/{row.name}",
                Experiment(f"{name}/{row.name}", summary, paper, build, minutes, scales, made, row),
            )
        return made

    return register


def experiment(name: str, *, summary: str, minutes: Mapping[str, float], paper: str = "") -> Callable[[Base], Experiment]:
    """Register a single experiment on the function that gives its config for a scale."""

    def register(build: Base) -> Experiment:
        def named(scale: str) -> Config:
            _require_scale(name, made.scales, scale)
            return replace(build(scale), name=name, scale=scale)

        made = Experiment(name, summary, paper, named, minutes, tuple(s for s in SCALES if s in minutes))
        _add(_experiments, name, made)
        return made

    return register


def _add(where: dict[str, Any], name: str, value: Any) -> None:
    require(
        name not in _experiments and name not in _tables,
        f"{name!r} is registered twice; experiments and tables share one name space",
    )
    where[name] = value


def _require_scale(name: str, scales: Sequence[str], scale: str) -> None:
    require(scale in SCALES, f"unknown scale {scale!r}{nearest(scale, SCALES)}; scales: {', '.join(SCALES)}")
    require(scale in scales, f"{name} has no {scale!r} scale; it has {', '.join(scales)}")


def load(package: str = "experiments") -> None:
    """Import every module of the experiments package, which registers what they define."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")


def experiments() -> dict[str, Experiment]:
    """All experiments by name."""
    return dict(sorted(_experiments.items()))


def tables() -> dict[str, Table]:
    """All tables by name."""
    return dict(sorted(_tables.items()))


def find(name: str) -> Experiment | Table:
    """The experiment or table of that name; UserError with the nearest match otherwise."""
    if name in _tables:
        return _tables[name]
    if name in _experiments:
        return _experiments[name]
    known = [*_tables, *_experiments]
    raise UserError(f"unknown experiment {name!r}{nearest(name, known)}; `python run.py list` shows all {len(known)}")
