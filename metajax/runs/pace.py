"""Counters of a run while it trains: seconds of its start, tokens and other counts, speed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from metajax.distributed.hosts import gather


@dataclass
class Phases:
    """Seconds of each phase from the command to the first step."""

    started: float  # time.monotonic() of the command
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

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


class Counts(dict[str, float]):
    """What a process has read and computed, by name. Checkpoints store the sum over processes, exact across restarts."""

    def add(self, read: Mapping[str, float]) -> None:
        for name, value in read.items():
            self[name] = self.get(name, 0) + value

    def of_all(self) -> Counts:
        """The sum over all processes."""
        total = Counts()
        for text in gather(json.dumps(self)):
            total.add(json.loads(text))
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
        self.read_here.add(read)

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
