"""Lines and plain tables on the terminal. This imports little, because `list` starts with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table as Grid
from rich.text import Text

from metajax.core.progress import Terminal, plain, shown

console = Terminal()


def grid_of(titles: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Grid:
    """A plain table of single lines. Its first column and names of experiments never wrap, so that they can be copied."""
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(titles):
        grid.add_column(title, overflow="fold", no_wrap=i == 0 or title == "experiment")
    for cells in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(shown(cell, keep="")) for cell in cells))
    return grid


def print_grid(titles: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print a table of text."""
    console.print(grid_of(titles, rows))


def line_of(bold: str, rest: str = "", style: str = "bold") -> Text:
    return plain(bold, style).append(shown(rest), "not bold not dim")


def duration(minutes: float) -> str:
    for limit, unit in ((2 * 1440, "d"), (120, "h")):
        if minutes >= limit:
            return f"{minutes / (limit / 2):.3g} {unit}"
    return f"{minutes:.0f} min"
