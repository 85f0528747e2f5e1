"""What ends a run that hangs: a collective whose other host is gone, storage that never answers, a deadlock."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from metajax.fields import Stopped
from metajax.progress import fail


class Watchdog:
    """Ends the process when `beat` was not called for `seconds`, with the stacks of all threads in `stacks` and on stderr.

    A thread of its own, because a collective that hangs never returns to Python; 0 seconds: no watch.
    """

    def __init__(self, seconds: float, stacks: Path):
        self._seconds, self._stacks = seconds, stacks
        self._last, self._closed = time.monotonic(), threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The run is alive."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.01, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds:
                self._end()

    def _end(self) -> None:
        fail(f"no step, save or evaluation ended for {self._seconds:g} s (runtime.hang_seconds); stacks: {self._stacks}")
        faulthandler.dump_traceback(sys.stderr)
        with open(self._stacks, "w") as file:  # last, for the storage may be what hangs
            faulthandler.dump_traceback(file)
        os._exit(Stopped.EXIT_CODE)  # the same command takes up the run
