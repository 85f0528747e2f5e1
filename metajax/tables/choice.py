"""Which rows of a table a command runs, and how long that takes. This builds no configs of rows, because `list` asks for all tables."""

from __future__ import annotations

from metajax import registry
from metajax.core.errors import nearest, require
from metajax.registry import Row, Table


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


def expected_minutes(table: Table, scale: str, words: str | None = None) -> float:
    """Minutes of one seed: every run once, with the runs that rows start from, as declared by their experiments."""
    known, found = registry.experiments(), {}
    for row in choose_rows(table, words):
        for part in () if table.lacks(row, scale) else table.parts_of(row, scale):
            name, changes = table.run_name(row, part), registry.at_scale(row.changes, scale)
            found[name, str(changes) if row.of and changes else ""] = known.get(name, table).minutes.get(scale, 0.0)
            parent = table.starts_from(row, scale, part)
            while parent in known and (parent, "") not in found:
                found[parent, ""] = known[parent].minutes.get(scale, 0.0)
                parent = known[parent].starts_from(scale)
    return sum(found.values())
