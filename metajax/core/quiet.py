"""Silences libraries that both print and raise an error: otherwise a full disk floods the screen before the error line."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

SAVING = ("future", "async_checkpointer", "checkpoint_manager")  # Orbax modules that log an error which the next call raises


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Report a failed save only by the error that it raises, not also by Orbax's log and TensorStore's callbacks.

    After an error the silence stays, because other writes of the same save end later.
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
    """Whether a write ended after another one had failed, which closed the event loop that both shared."""
    return isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
