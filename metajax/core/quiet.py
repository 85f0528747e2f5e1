"""What libraries print of an error that they raise as well: without this, a full disk fills the screen before the line that says so."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

SAVING = ("future", "async_checkpointer", "checkpoint_manager")  # modules of Orbax whose threads log what the next call raises


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """A save that fails is told by the error that it raises alone, not by Orbax's log and TensorStore's callbacks too.

    After an error it stays so, for what else was being written ends later.
    """
    absl, unraisable = logging.getLogger("absl"), sys.unraisablehook
    absl.addFilter(_is_news)
    sys.unraisablehook = lambda found: None if _of_closed_loop(found) else unraisable(found)
    yield
    absl.removeFilter(_is_news)
    sys.unraisablehook = unraisable


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.levelno >= logging.ERROR and record.module in SAVING and "orbax" in record.pathname)


def _of_closed_loop(found: Any) -> bool:
    """Whether a write ended after the first one failed, with which the event loop that waited for all of them was closed."""
    return isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
