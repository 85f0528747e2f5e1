"""Counters of a run while it trains: seconds of its start, tokens and other counts, speed, goodput."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metajax.core.progress import warn
from metajax.distributed.hosts import gather
from metajax.runs.directory import RunDirectory
from metajax.runs.files import recall, write_json

APART = ("compile", "data_wait", "checkpoint", "evaluation")
SAVES = 16  # saves remembered for one start


@contextlib.contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds inside the block to seconds[name]."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began


@dataclass
class Phases:
    """Seconds of each phase from the command to the first step."""

    started: float  # time.monotonic() of the command
    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, name: str) -> contextlib.AbstractContextManager[None]:
        return _clock(self.seconds, name)

    def finish(self, first_step: float) -> None:
        """End the first step and record its seconds, the total, and as `other` the time outside all phases."""
        total, self.seconds["first_step"] = time.monotonic() - self.started, first_step
        self.seconds |= {"other": total - sum(self.seconds.values()), "total": total}


@dataclass
class LeftOut:
    """Steps skipped by `runtime.on_bad_step=skip`. Every checkpoint stores them, so that a restart continues the count."""

    count: int = 0
    first: int = 0
    last: int = 0
    in_a_row: int = 0

    def add(self, step: int, kept: bool) -> None:
        if kept:
            self.in_a_row = 0
            return
        self.first, self.last = self.first or step, step
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1

    def __str__(self) -> str:
        more = f", and {self.count - 1} more up to step {self.last}" * (self.count > 1)
        return f"step {self.first} was left out{more}: loss or gradient not finite, or the gradient norm above runtime.max_grad_norm (runtime.on_bad_step=skip)"


class Counts(Counter[str]):
    """What a process has read and computed, by name. Checkpoints store the sum over processes, exact across restarts."""

    def of_all(self) -> Counts:
        """The sum over all processes."""
        total = Counts()
        for text in gather(json.dumps(self)):
            total.update(json.loads(text))
        return total


@dataclass
class Pace:
    """Speed since the last reading, without the time of saving and evaluating."""

    unit: str  # as in "tokens_per_second"
    counted: str  # name of the count in `Counts`
    since: float = field(default_factory=time.monotonic)
    hosts: int = 1  # number of hosts that read as many rows as this one
    steps: int = 0
    read_here: Counts = field(default_factory=Counts)

    def add(self, read: Mapping[str, float]) -> None:
        self.steps += 1
        self.read_here.update(read)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def read(self, peak: float | None) -> tuple[dict[str, float], float]:
        """({UNIT_per_second, and mfu if the chips' peak is known}, seconds a step), and restart the measurement."""
        seconds = time.monotonic() - self.since
        rate = {name: count * self.hosts / seconds for name, count in self.read_here.items()}
        speed = {f"{self.unit}_per_second": rate[self.counted]}
        if peak is not None:
            speed["mfu"] = rate["flops"] / peak
        a_step = seconds / self.steps
        self.since, self.steps, self.read_here = time.monotonic(), 0, Counts()
        return speed, a_step


class Goodput:
    """How a run spent its wall time over all its starts, in RUN/time.json: the account of this start and of earlier ones.

    Steps whose results were saved are productive. Start-up, compiling, waiting for data, saving, evaluating and steps that a kill
    undid are counted separately. Time between two starts is not counted, nor is time that a kill left unwritten.

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

    def spend(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """Count the time inside the block as `kind`, one of `APART`, and not as a step."""
        return _clock(self.apart, kind)

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
