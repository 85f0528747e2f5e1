"""Progress for people: rich bars on a terminal, a plain line now and then elsewhere. Written to stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CALLED = Path(sys.argv[0])
PROGRAM = "metajax" if CALLED.name == "metajax" or CALLED.parts[-2:] == ("metajax", "__main__.py") else "python run.py"
console = Console(stderr=True)
PLAIN_SECONDS = 10.0  # between lines where there is no terminal


@contextlib.contextmanager
def progress(description: str, total: int, plain_lines: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar over `total` units; yields advance(units). `plain_lines` are the lines that stand in for it elsewhere."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total)
            yield lambda units: bar.advance(task, units)
        return
    started = last = time.monotonic()
    done = 0

    def advance(units: int) -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if plain_lines and (now - last >= PLAIN_SECONDS or done == total):
            last = now
            print(f"{description}: {done}/{total} in {now - started:.0f} s", file=sys.stderr, flush=True)

    yield advance


def say(message: str) -> None:
    """A line for the person at the terminal."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """A warning that the run survives."""
    console.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
