"""Errors that end a command, and how they are raised."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can correct. Its message is one plain line that names the remedy. The command exits with 2."""


class Stopped(BaseException):
    """A run ended early for an external reason, such as a preemption; the same command continues it.

    Derives from BaseException so that `except Exception` in a table does not record a preemption as a failed run.
    """

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, try again


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A '; did you mean X?' clause for an unknown word, or '' when nothing is close or the word is known."""
    choices = list(choices)
    match = [] if word in choices else difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
