"""All that metajax prints: results on standard output, lines, warnings and progress for people on stderr.

Text of others, such as documents, names, paths and what a model says, may hold characters that move the cursor, retitle the window or
turn the text around. Nothing of the kind reaches a terminal: it is shown as an escape such as \\x1b.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

CALLED = Path(sys.argv[0])
PROGRAM = "metajax" if CALLED.name == "metajax" or CALLED.parts[-2:] == ("metajax", "__main__.py") else "python run.py"
PLAIN_SECONDS = 10.0  # between lines where there is no terminal
LONGEST = 4000  # letters of a line that says what is wrong; a longer one lacks its middle
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's control and format characters, lone surrogates, other ends of lines


def shown(text: str, keep: str = "\n\t") -> str:
    """The text with every control or invisible character as an escape, but for those of `keep`."""
    if text.isprintable():
        return text
    escaped = lambda c: c if c in keep or unicodedata.category(c) not in _UNSEEN else c.encode("unicode_escape").decode()  # noqa: E731
    return "".join(map(escaped, text))


def plain(text: str, style: str = "") -> Text:
    """Text of others for tables and consoles: no markup, nothing that a terminal obeys."""
    return Text(shown(text), style)


class Terminal(Console):
    """A console that takes no text for markup or emoji, and shows what a terminal would obey."""

    def __init__(self, **keywords: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **keywords)

    def render_str(self, text: str, **keywords: Any) -> Text:
        return super().render_str(shown(text), **keywords)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        _leave(self.file)


console = Terminal(stderr=True)


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """For the life of a command: it can print any text in any encoding, and goes on when a reader such as `head` has left."""
    sys.excepthook = lambda *error: echo("".join(traceback.format_exception(*error)), end="", stream=sys.stderr)
    threading.excepthook = lambda found: sys.excepthook(found.exc_type, found.exc_value, found.exc_traceback)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as Python runs
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # the command has said so, or nobody reads
                _leave(stream)


def _leave(stream: Any) -> None:
    """Send what is still to come on a stream nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def echo(text: str = "", end: str = "\n", stream: Any = None) -> None:
    """Text as it is, neither wrapped nor coloured, on standard output or another stream."""
    stream = stream or sys.stdout
    try:
        print(shown(text), end=end, file=stream, flush=True)
    except BrokenPipeError:
        _leave(stream)


def fail(message: object) -> None:
    """The line about what ends a command."""
    text = shown(f"error: {message}", keep="\t")
    echo(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}", stream=sys.stderr)


def say(message: str) -> None:
    """A line for the person at the terminal."""
    console.print(shown(message, keep="\t"), soft_wrap=True)


def warn(message: str) -> None:
    """A warning that the run survives."""
    console.print(shown(f"warning: {message}", keep="\t"), style="yellow", soft_wrap=True)


@contextlib.contextmanager
def progress(description: str, total: int, plain_lines: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar over `total` units; yields advance(units). `plain_lines` are the lines that stand in for it elsewhere."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(shown(description, keep=""), total=total)
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
            say(f"{description}: {done}/{total} in {now - started:.0f} s")

    yield advance
