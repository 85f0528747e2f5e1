"""A folder that must not be moved or deleted while a process works in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from metajax.core.errors import UserError


class Gone(UserError):
    """The folder that a process works in was moved or deleted; another run cannot recover from that."""


class Place:
    """A folder that is held open, so that a replacement of the same name is recognised."""

    def __init__(self, path: Path):
        self.path, self._held = path, os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self._held)

    def require_there(self) -> None:
        """Raise Gone if the folder was moved, deleted or replaced."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._held))
        except OSError:
            there = False
        if not there:
            raise Gone(f"{self.path} was moved, deleted or replaced during the run; put it back and give the same command again")

    @contextlib.contextmanager
    def while_there(self) -> Iterator[None]:
        """Raise Gone for a failure inside that happens because this folder, or another file that is read, no longer exists."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.require_there()
            if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
                which = error.filename2 or error.filename or self.path
                raise Gone(f"{which}: {error.strerror}; restore it, and give the same command again") from error
            raise
