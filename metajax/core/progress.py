"""Everything that metajax prints: results on stdout; messages, warnings and progress bars on stderr.

Untrusted text, such as documents, names, paths and model outputs, may hold characters that move the cursor, retitle the window
or reverse the text. None of them reaches a terminal: each is shown as an escape such as \\x1b.
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
PLAIN_SECONDS = 10.0  # between progress lines if stderr is no terminal
LONGEST = 4000  # characters of an error message; of a longer one the middle is left out
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode control and format characters, lone surrogates, line and paragraph separators


def shown(text: str, keep: str = "\n\t") -> str:
    """The text with every control or invisible character, except those in `keep`, as an escape."""
    if text.isprintable():
        return text
    escaped = lambda c: c if c in keep or unicodedata.category(c) not in _UNSEEN else c.encode("unicode_escape").decode()  # noqa: E731
    return "".join(map(escaped, text))


def plain(text: str, style: str = "") -> Text:
    """Untrusted text for tables and consoles: no markup, and control characters as escapes."""
    return Text(shown(text), style)


class Terminal(Console):
    """A console that interprets no markup or emoji in text, and shows control characters as escapes."""

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
    """While a command runs, it can print any text in any encoding, and continues after a reader such as `head` has ended."""
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
            except OSError:  # already reported by the command, or the reader has ended
                _leave(stream)


def _leave(stream: Any) -> None:
    """Discard all further output of a stream."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def echo(text: str = "", end: str = "\n", stream: Any = None) -> None:
    """Print text, neither wrapped nor coloured, on stdout or another stream."""
    stream = stream or sys.stdout
    try:
        print(shown(text), end=end, file=stream, flush=True)
    except BrokenPipeError:
        _leave(stream)


def fail(message: object) -> None:
    """Print the error that ends a command, in one line."""
    text = shown(f"error: {message}", keep="\t")
    echo(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}", stream=sys.stderr)


def say(message: str) -> None:
    """Print a message for the user on stderr."""
    console.print(shown(message, keep="\t"), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    console.print(shown(f"warning: {message}", keep="\t"), style="yellow", soft_wrap=True)


@contextlib.contextmanager
def progress(description: str, total: int, plain_lines: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` units; yields advance(units). Without a terminal, `plain_lines` prints a line now and then."""
    if console.is_terminal:
        words = TextColumn("{task.description}", markup=False)
        numbers = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(words, BarColumn(), *numbers, console=console) as bar:
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
