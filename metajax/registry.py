"""Named experiments and tables. A table is a base for each scale and a list of rows: name, changed fields, published values."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

from metajax.config import AnyConfig, Init, Scale
from metajax.core.errors import UserError, nearest, require
from metajax.core.fields import override
from metajax.core.progress import PROGRAM, warn

SCALES: tuple[str, ...] = get_args(Scale)
Base = Callable[[str], AnyConfig]


@dataclass(frozen=True)
class Published:
    """A number as a paper states it, in the column's unit; None if the paper does not state it."""

    value: float | None
    note: str = ""  # its source if that is not a table of the paper: a figure, a review, a secondary source


@dataclass(frozen=True)
class ByScale:
    """A value for each scale, in the changes and the `fill` of rows and tables: ByScale(cpu=32, gpu=128, paper=512)."""

    cpu: Any = ...
    gpu: Any = ...
    paper: Any = ...

    def __str__(self) -> str:
        return ", ".join(f"{scale} {getattr(self, scale)}" for scale in SCALES if getattr(self, scale) is not ...)


def at_scale(values: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """The mapping with every ByScale replaced by its value at that scale; entries without a value at that scale are left out."""
    found = {name: getattr(value, scale) if isinstance(value, ByScale) else value for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not ...}


@dataclass(frozen=True)
class Row:
    """One line of a table: the fields that differ from the base, and the paper's values."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, float | Published | None] = field(default_factory=dict)  # by Column.key; None: not stated
    core: bool = True
    note: str = ""  # one line below the table
    group: str = ""  # consecutive rows with the same group are shown under it as their heading
    of: str = ""  # an experiment, or NAME/PART, whose config and runs this row uses instead of its own
    # Values of {names} in the columns' paths, for rows that read the same run in different ways.
    fill: Mapping[str, str | ByScale] = field(default_factory=dict)
    parts: tuple[str, ...] = ()  # the table's parts that this row has; empty: all of them
    lacks: str | ByScale = ""  # what a run would need but is not available, such as closed weights; the row is shown but not run

    def paper(self, key: str) -> Published | None:
        """The paper's value in that column; None if this row has no entry for it."""
        if key not in self.published:
            return None
        stated = self.published[key]
        return stated if isinstance(stated, Published) else Published(stated)


@dataclass(frozen=True)
class Column:
    """A number of `report.json` by dotted path (a.0: first item of a list), or the difference of two. `title` names its unit."""

    title: str
    path: str
    digits: int = 3
    better: Literal["lower", "higher", ""] = "lower"  # "": neither
    factor: float = 1.0  # factor on a run's number before it is shown, such as 100 for a share in per cent
    minus: str = ""  # a second path, whose number is subtracted from the first one's
    harmonic: str = ""  # a second path; the column shows the harmonic mean of both numbers
    part: str = ""  # the table's part whose run has the number; "*": the mean over the parts, separately for each path
    # Shows the share of steps after which the curve at `path` is first better by `match` than the end of the baseline's curve.
    match: float | None = None
    scales: tuple[str, ...] = SCALES  # scales at which it is shown

    def __post_init__(self) -> None:
        known = ("lower", "higher", "")
        require(self.better in known, f"column {self.title}: better is 'lower', 'higher' or '', not {self.better!r}")
        require(not (self.minus and self.harmonic), f"column {self.title}: a difference or a harmonic mean, not both")

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all numbers that the column is computed from."""
        return tuple(path for path in (self.path, self.minus, self.harmonic) if path)

    @property
    def blanks(self) -> set[str]:
        """Names in braces in the paths; UserError if one is not a word."""
        found = {name for path in self.paths for _, name, _, _ in Formatter().parse(path) if name is not None}
        is_word = all(name.isidentifier() for name in found)
        require(is_word, f"column {self.title}: a blank in {self.path} is a word, such as {{length}}")
        return found

    @property
    def key(self) -> str:
        """Key of the column in `Row.published` and table.json: PATH, PATH - MINUS, PATH | HARMONIC, PATH to MATCH, PART: PATH."""
        path = self.path + (f" - {self.minus}" if self.minus else "") + (f" | {self.harmonic}" if self.harmonic else "")
        path = path if self.match is None else f"{path} to {self.match:+g}"
        return f"{self.part}: {path}" if self.part else path


@dataclass(frozen=True)
class Table:
    """A table of a paper, or our own: rows derived from one base by changing fields.

    A table with parts has a run for each row and part (a task, a length): base, then the row's changes, then the part's.
    """

    name: str
    summary: str
    base: Base
    rows: tuple[Row, ...]
    columns: Sequence[Column]
    baseline: str | None  # the row that the others are compared with; None: no baseline
    minutes: Mapping[str, float]  # expected minutes of one run, at every scale that the table has
    paper: str = ""
    notes: Sequence[str] = ()
    parts: Mapping[str, Mapping[str, Any] | ByScale] = field(default_factory=dict)  # name -> its changes, at scales that have it
    fill: Mapping[str, str | ByScale] = field(default_factory=dict)  # {names} in the columns' paths; a row's own come first
    analyses: Sequence[str] = ()  # analyses made for every run that does not have them yet; columns read `analyses.NAME...`
    # Rows of the paper's table or figure, including those that are missing here; 0: the table has no model in a paper.
    paper_rows: int = 0

    def __post_init__(self) -> None:
        here, names, keys = f"table {self.name}", [row.name for row in self.rows], [column.key for column in self.columns]
        for what, words in (("rows", names), ("columns", keys)):
            require(len(words) == len(set(words)), f"{here}: two of its {what} have the same name")
        require(self.baseline in (None, *names), f"{here}: the baseline {self.baseline!r} is not one of its rows")
        for part in (*(c.part for c in self.columns if c.part or self.parts), *(p for row in self.rows for p in row.parts)):
            require(part in (*self.parts, "*"), f"{here} has no part {part!r}{nearest(part, self.parts)}")
        for row in self.rows:
            filled = {scale: self.filled(row, scale).keys() for scale in self.scales}
            for column, scale in itertools.product(self.columns, self.scales):
                unknown = column.blanks - filled[scale]
                where = f"{here}, row {row.name}, scale {scale}"
                require(not unknown, f"{where}: fill does not say what {unknown} stands for in {column.path}")
            for key in row.published:
                known = f"the published value {key!r} belongs to no column{nearest(key, keys)}"
                require(key in keys, f"{here}, row {row.name}: {known}")

    @property
    def scales(self) -> tuple[str, ...]:
        """Scales at which the table can be run, smallest first."""
        return tuple(scale for scale in SCALES if scale in self.minutes)

    def filled(self, row: Row, scale: str) -> dict[str, str]:
        """The values of {names} in the columns' paths, for this row."""
        return at_scale({**self.fill, **row.fill}, scale)

    def parts_at(self, scale: str) -> dict[str, Mapping[str, Any]]:
        """The parts that exist at a scale."""
        _require_scale(self, scale)
        return at_scale(self.parts, scale)

    def parts_of(self, row: Row, scale: str) -> tuple[str, ...]:
        """The parts for which a row has a run at a scale; ("",) in a table without parts."""
        there = self.parts_at(scale)
        return tuple(part for part in row.parts or there if part in there) or ("",)

    def columns_at(self, scale: str) -> tuple[Column, ...]:
        """The columns that are shown at a scale and whose part exists there."""
        return tuple(c for c in self.columns if scale in c.scales and c.part in ("", "*", *self.parts_at(scale)))

    def lacks(self, row: Row, scale: str) -> str:
        """What a row would need but is not available at this scale, or ""."""
        return at_scale({"what": row.lacks}, scale).get("what", "")

    def runs_at(self, scale: str) -> bool:
        """Whether any row can be run at a scale."""
        return scale in self.scales and not all(self.lacks(row, scale) for row in self.rows)

    @property
    def paper_rows_here(self) -> int:
        """Number of rows that have the paper's value (or the mark `not stated`) and can be run at paper scale."""
        return sum(bool(row.published) and not self.lacks(row, "paper") for row in self.rows) if "paper" in self.scales else 0

    @property
    def paper_rows_in_print(self) -> int:
        """Number of rows that have the paper's value but cannot be run."""
        return sum(bool(row.published) for row in self.rows) - self.paper_rows_here if "paper" in self.scales else 0

    @property
    def coverage(self) -> str:
        """Such as `12 of 13 rows (1 more in print alone)`; "" if there is no paper's table to compare with."""
        more = f" ({self.paper_rows_in_print} more in print alone)" if self.paper_rows_in_print > 0 else ""
        return f"{self.paper_rows_here} of {self.paper_rows} rows{more}" if self.paper_rows else ""

    @property
    def example(self) -> str:
        """Name of an experiment of this table: the baseline, or else the first row."""
        row = next((row for row in self.rows if row.name == self.baseline), self.rows[0])
        return _joined(*([row.of] if row.of else [self.name, row.name]), self.parts_of(row, self.scales[0])[0])

    def run_name(self, row: Row, part: str) -> str:
        """Name of the experiment whose runs a row, or a part of it, has."""
        if not row.of:
            return _joined(self.name, row.name, part)
        of = _joined(row.of, part)
        return of if of in _known else row.of

    @cached_property
    def _bases_start_from(self) -> dict[str, str]:
        return {scale: self.base(scale).init.run for scale in self.scales}

    def starts_from(self, row: Row, scale: str, part: str = "") -> str:
        """The run or experiment that `init.from` names for a row, or ""; found without building the row's config."""
        changes = at_scale(row.changes, scale) | ({} if row.of else at_scale(self.parts_at(scale).get(part, {}), scale))
        if "init.from" in changes:
            return Init(changes["init.from"]).run
        if "init" in changes:
            return changes["init"].run
        return find_experiment(self.run_name(row, part)).starts_from(scale) if row.of else self._bases_start_from[scale]

    def config(self, row: Row, scale: str, part: str = "") -> AnyConfig:
        """The config of one row (or one part of it) at a scale."""
        parts, lacks = self.parts_at(scale), self.lacks(row, scale)
        require(not part or part in parts, f"{self.name} has no {part} at scale {scale}; it has {', '.join(parts)}")
        require(not lacks, f"{self.name}/{row.name} cannot be run at scale {scale}: it lacks {lacks}")
        changes = at_scale(row.changes, scale)
        if row.of:
            return override(find_experiment(self.run_name(row, part)).build(scale), changes)
        config = override(override(self.base(scale), changes), at_scale(parts.get(part, {}), scale))
        return replace(config, name=_joined(self.name, row.name, part), scale=scale)


@dataclass(frozen=True)
class Experiment:
    """One named run; every row of a table is also an experiment."""

    name: str
    summary: str
    paper: str
    build: Base
    minutes: Mapping[str, float]  # expected, at every scale that the experiment has
    table: Table | None = None
    row: Row | None = None
    part: str = ""  # of the table

    @property
    def scales(self) -> tuple[str, ...]:
        """Scales at which the experiment can be run, smallest first."""
        return tuple(scale for scale in SCALES if scale in self.minutes)

    def starts_from(self, scale: str) -> str:
        """The run or experiment that `init.from` names at a scale, or ""."""
        if self.table is None or self.row is None:
            return self.build(scale).init.run
        return self.table.starts_from(self.row, scale, self.part)


def _joined(*words: str) -> str:
    return "/".join(word for word in words if word)


_known: dict[str, Experiment | Table] = {}
_files: dict[str, str] = {}  # {name of an experiment or table: the module that registered it}
_loaded: dict[str, None] = {}  # packages of experiments, in order
_broken: dict[str, tuple[str, str]] = {}  # {module that could not be imported: its file, and the error with its place}
vocabularies: dict[str, int] = {}  # number of ids of tokenizers whose files the user supplies; plans need no more


def table(name: str, *, rows: Sequence[Row], **fields: Any) -> Callable[[Base], Table]:
    """Register a `Table` with these fields on the function that gives its base for a scale.

    Its rows become experiments NAME/ROW, or NAME/ROW/PART. A row that is `of` another experiment registers none; its runs have
    that experiment's name.
    """
    module = _caller()

    def register(base: Base) -> Table:
        made = Table(name=name, base=base, rows=tuple(rows), **fields)
        _add(made, module)
        for row in (row for row in made.rows if not row.of):
            parts = {scale: made.parts_of(row, scale) for scale in made.scales if not made.lacks(row, scale)}
            for part in dict.fromkeys(itertools.chain(*parts.values())):
                minutes = {scale: made.minutes[scale] for scale in parts if part in parts[scale]}
                build = partial(made.config, row, part=part)
                _add(Experiment(_joined(name, row.name, part), made.summary, made.paper, build, minutes, made, row, part), module)
        return made

    return register


def experiment(name: str, *, summary: str, minutes: Mapping[str, float], paper: str = "") -> Callable[[Base], Experiment]:
    """Register a single experiment on the function that gives its config for a scale."""
    module = _caller()

    def register(build: Base) -> Experiment:
        def named(scale: str) -> AnyConfig:
            _require_scale(made, scale)
            return replace(build(scale), name=name, scale=scale)

        made = Experiment(name, summary, paper, named, minutes)
        _add(made, module)
        return made

    return register


def _caller() -> str:
    """The module that calls `table` or `experiment`."""
    return sys._getframe(2).f_globals.get("__name__", "")


def _add(made: Experiment | Table, module: str) -> None:
    first = f"{made.name!r} is registered twice, first in {_files.get(made.name)}"
    require(made.name not in _known, f"{first}; experiments and tables share one name space")
    _known[made.name], _files[made.name] = made, module


def _require_scale(of: Experiment | Table, scale: str) -> None:
    require(scale in SCALES, f"unknown scale {scale!r}{nearest(scale, SCALES)}; scales: {', '.join(SCALES)}")
    require(scale in of.scales, f"{of.name} has no {scale!r} scale; it has {', '.join(of.scales)}")


def loaded() -> tuple[str, ...]:
    """The packages of experiments that `load` has imported, for passing to new processes."""
    return tuple(_loaded)


def load(*packages: str) -> None:
    """Import every module of packages of experiments (none named: `experiments`), which registers what they define.

    A module that cannot be imported is left out with everything it registered; one line names it and the reason.
    """
    for package in packages or ("experiments",):
        _loaded[package] = None
        found = _imported(package)
        for info in pkgutil.iter_modules(found.__path__) if found else ():
            _imported(f"{package}.{info.name}")
    for made, reason in [(made, _without_base(made)) for made in tables().values()]:
        if reason:
            warn(f"left out table {made.name}, whose base cannot be made: {reason}; name another base")
            _forget(lambda one, made=made: made in (one, getattr(one, "table", None)))


def _forget(drops: Callable[[Experiment | Table], bool]) -> None:
    for name in [name for name, made in _known.items() if drops(made)]:
        del _known[name]


def _imported(module: str) -> Any:
    _broken.pop(module, None)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        spec = importlib.util.find_spec(module)
        file = (spec and spec.origin) or module
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line, reason = lines[-1] if lines else None, str(error)
        if isinstance(error, SyntaxError) and error.filename == file:
            line, reason = error.lineno, error.msg
        reason = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        _broken[module] = (file, f"{os.path.relpath(file)}{f', line {line}' if line else ''}: {reason}")
        warn(f"left out {_broken[module][1]}")
        _forget(lambda made: _files[made.name] == module)
        return None


def left_out(name: str) -> str:
    """A clause that names the files that could not be imported, preferably those that mention `name`; "" if there are none."""
    word, errors = name.partition("/")[0], dict(_broken.values())
    found = [file for file in errors if os.path.isfile(file) and word in Path(file).read_text(errors="replace")]
    return f"; it may be in what was left out: {'; '.join(errors[file] for file in found or errors)}" if errors else ""


@dataclass(frozen=True)
class base:
    """A function from a scale to the base of a table or the config of an experiment, which may be registered later."""

    of: str

    def __call__(self, scale: str) -> AnyConfig:
        found = find(self.of)
        return (found.base if isinstance(found, Table) else found.build)(scale)


def _without_base(table: Table) -> str:
    """Why the base of a table cannot be made; "" if it can."""
    chain, here = [], table
    while here is not None and isinstance(here.base, base):
        chain.append(here.name)
        found = _known.get(here.base.of)
        if found is None:
            return f"there is no {here.base.of!r}{nearest(here.base.of, _known)}"
        here = found if isinstance(found, Table) else found.table
        if here is not None and here.name in chain:
            return f"it comes from itself ({' -> '.join([*chain, here.name])})"
    return ""


def experiments() -> dict[str, Experiment]:
    """All experiments by name."""
    return {name: made for name, made in sorted(_known.items()) if isinstance(made, Experiment)}


def tables() -> dict[str, Table]:
    """All tables by name."""
    return {name: made for name, made in sorted(_known.items()) if isinstance(made, Table)}


def find(name: str) -> Experiment | Table:
    """The experiment or table of that name; UserError with the nearest match otherwise."""
    more = f"{nearest(name, _known)}{left_out(name)}; `{PROGRAM} list` shows all {len(_known)}" if name not in _known else ""
    require(name in _known, f"unknown experiment {name!r}{more}")
    return _known[name]


def find_experiment(name: str) -> Experiment:
    """The experiment of that name; UserError also if the name is a table's."""
    found = find(name)
    if isinstance(found, Table):
        row = f"; name one of its rows, such as {found.example}" if found.example in _known else ""
        raise UserError(f"{name} is a table{row}")
    return found
