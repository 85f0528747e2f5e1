"""Goodput: how a run spent its wall time over all its starts, in RUN/time.json.

Steps whose results were saved are productive. Start-up, compiling, waiting for data, saving, evaluating and steps that a kill
undid are counted separately. Time between two starts is not counted, nor is time that a kill left unwritten.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metajax.core.progress import warn
from metajax.runs.directory import RunDirectory
from metajax.runs.files import recall, write_json

APART = ("compile", "data_wait", "checkpoint", "evaluation")
SAVES = 16  # saves remembered for one start


class Goodput:
    """The time account of one start, added to those of earlier starts.

    `path` is time.json of the run (None: this process does not write it), and `age` the seconds since the command began. `run`
    gets a warning about lost records of earlier starts, and its folder is checked before each write.
    """

    def __init__(self, path: Path | None, age: float = 0.0, run: RunDirectory | None = None):
        self._path, self._began, self._run = path, time.monotonic() - age, run
        self._warn = run.warn if run is not None else warn
        found = recall(path, self._warn, "a new one is begun") if path is not None else None
        self._earlier: list[dict[str, Any]] = (found or {"starts": []})["starts"]
        self.apart = dict.fromkeys(APART, 0.0)  # seconds of this start that are not steps
        self._startup = 0.0
        self._from, self._saves = 0, []

    def begin_steps(self, step: int) -> None:
        """End the start-up and continue from `step`; steps of earlier starts after it are lost."""
        self._startup = time.monotonic() - self._began - sum(self.apart.values())
        self._from = step
        if step and not self._earlier and self._path is not None:
            self._warn(f"{self._path} is missing or was damaged: goodput leaves out the starts before")
        for start in reversed(self._earlier):
            kept = dict(start["saves"]).get(step)
            start["lost"] = start["steps"] - (kept or 0.0)
            if kept is not None or start["from"] <= step:
                break

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Count the time inside the block as `kind`, one of `APART`, and not as a step."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.apart[kind] += time.monotonic() - began

    def saved(self, step: int) -> None:
        """Record that steps up to this one are saved."""
        self._saves = [*self._saves, (step, self._entry()["steps"])][-SAVES:]

    def write(self) -> None:
        """Update the file."""
        if self._run is not None:
            self._run.require_there()
        if self._path is not None:
            write_json(self._path, {"starts": [*self._earlier, self._entry()]})

    def _entry(self) -> dict[str, Any]:
        spent = {"startup": self._startup, **self.apart}
        steps = max(0.0, time.monotonic() - self._began - sum(spent.values()))
        return {"from": self._from, "saves": self._saves, "steps": steps, "lost": 0.0, **spent}

    def shares(self) -> dict[str, float]:
        """Shares of the wall time of all starts: productive, lost, startup and the kinds of `APART`; they sum to 1."""
        starts = [*self._earlier, self._entry()]
        seconds = {kind: sum(start[kind] for start in starts) for kind in ("lost", "startup", *APART)}
        seconds["productive"] = sum(start["steps"] - start["lost"] for start in starts)
        total = sum(seconds.values())
        return {kind: value / total for kind, value in seconds.items()} | {"seconds": total, "starts": len(starts)}
