"""Ends a run that hangs, for example in a collective whose other host is gone, or on storage that never answers."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from metajax.core.atomic import write_text
from metajax.core.errors import Stopped
from metajax.core.progress import fail

STARTS = 3  # in a row without a new save; the last one exits with an error
STORAGE_SECONDS = 10.0  # to write the stacks; storage may be the cause of the hang


class Watchdog:
    """Ends the process when `beat` has not been called for too long, and writes the stacks of all threads to `stacks` and stderr.

    The exit code asks for the same command again. At the third start in a row without a new save it is that of an error; a file beside
    `stacks` counts the starts. A separate thread watches, because a collective that hangs never returns to Python.

    Args:
      seconds: limit between two beats during the steps; 0: none.
      stacks: a file of this process alone.
      startup: limit before `begin_steps`, and between beats within `patient`; 0: none; None: as `seconds`.
    """

    def __init__(self, seconds: float, stacks: Path, startup: float | None = None):
        self._hang, self._stacks = (seconds, "no step, save or evaluation ended", "runtime.hang_seconds"), stacks
        self._startup = self._hang if startup is None else (startup, "the start did not end", "runtime.startup_seconds")
        self._watched, self._last, self._closed = self._startup, time.monotonic(), threading.Event()
        self._counted = _read(self._count)
        self.saved = self._counted["saved"]  # the step from which the next start would continue, as far as is known
        if seconds or startup:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def _count(self) -> Path:
        """Hidden, because it belongs to this machine and not to a run on a bucket."""
        return self._stacks.with_name(f".{self._stacks.stem}.json")

    def beat(self) -> None:
        """Report progress."""
        self._last = time.monotonic()

    def begin_steps(self) -> None:
        """The first step has ended; the limit of the steps applies from now on."""
        self.beat()
        self._watched = self._hang

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Apply the startup limit during an evaluation, whose first beat waits for compilation."""
        before = self._watched
        self._watched = (self._startup[0], "an evaluation made no progress", self._startup[2])
        try:
            yield
        finally:
            self.beat()
            self._watched = before

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while True:
            seconds = self._watched[0]
            left = self._last + seconds - time.monotonic() if seconds else 1.0
            if self._closed.wait(min(max(left, 0.01), 1.0)):  # notices a changed limit within a second
                return
            watched = self._watched
            if watched[0] and time.monotonic() - self._last >= watched[0]:
                self._end(*watched)

    def _end(self, seconds: float, what: str, field: str) -> None:
        starts = self._counted["starts"] + 1 if self.saved == self._counted["saved"] else 1
        message = f"{what} for {seconds:g} s ({field}); stacks: {self._stacks}"
        if starts >= STARTS:
            message += f"; {starts} starts in a row had no save after step {self.saved}: fix the cause, or raise {field}"
        fail(message)
        faulthandler.dump_traceback(sys.stderr)
        writing = threading.Thread(target=self._write, args=(starts,), daemon=True)
        writing.start()
        writing.join(STORAGE_SECONDS)
        os._exit(Stopped.EXIT_CODE if starts < STARTS else 2)  # a temporary failure asks for the same command again

    def _write(self, starts: int) -> None:
        write_text(self._count, json.dumps({"saved": self.saved, "starts": starts}))
        with open(self._stacks, "w") as file:
            faulthandler.dump_traceback(file)


def _read(path: Path) -> dict[str, int]:
    """{saved, starts} of earlier starts; zeros if there is no such file, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        return {name: int(found[name]) for name in ("saved", "starts")}
    return {"saved": 0, "starts": 0}
