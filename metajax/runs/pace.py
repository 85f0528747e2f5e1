"""What a run counts while it trains: seconds of its start, what it read and computed, how fast."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

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
        """The first step is done: its seconds, the total, and as `other` what no phase covers."""
        total, self.seconds["first_step"] = time.monotonic() - self.started, first_step
        self.seconds |= {"other": total - sum(self.seconds.values()), "total": total}


@dataclass
class LeftOut:
    """Steps that `runtime.on_bad_step=skip` has left out; saved with every checkpoint, so that a restart goes on counting."""

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


@dataclass
class Counts:
    """What a process has read and computed; the sum over all is saved with every checkpoint, so that it is exact across restarts."""

    slots: int = 0
    loss_tokens: int = 0
    body: int = 0
    metadata: int = 0
    meta_tokens: int = 0
    padding: int = 0
    flops: float = 0.0

    def add(self, batch: dict[str, np.ndarray], flops: float) -> None:
        self.slots += batch["tokens"].size
        self.loss_tokens += int((batch["loss_weights"] > 0).sum())
        self.body += int(batch["is_body"].sum())
        self.metadata += int(batch["is_metadata"].sum())
        self.meta_tokens += int((batch["meta_slots"] < batch["tokens"].shape[1]).sum()) if "meta_slots" in batch else 0
        self.padding += int((batch["segment_ids"] == 0).sum())
        self.flops += flops

    def of_all(self) -> Counts:
        """The sum over all processes."""
        parts = [json.loads(text) for text in gather(json.dumps(vars(self)))]
        return Counts(**{name: sum(part[name] for part in parts) for name in parts[0]})


@dataclass
class Pace:
    """Speed since it was last read; saving and evaluating stand outside."""

    since: float = field(default_factory=time.monotonic)
    hosts: int = 1  # that read as many rows as this one
    steps: int = 0
    slots: int = 0
    flops: float = 0.0

    def add(self, slots: int, flops: float) -> None:
        self.steps, self.slots, self.flops = self.steps + 1, self.slots + slots, self.flops + flops

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def read(self, peak: float | None) -> tuple[dict[str, float], float]:
        """({tokens_per_second, and mfu where the chips' peak is known}, seconds a step), and start anew."""
        seconds = time.monotonic() - self.since
        speed = {"tokens_per_second": self.slots * self.hosts / seconds}
        if peak is not None:
            speed["mfu"] = self.flops * self.hosts / seconds / peak
        a_step = seconds / self.steps
        self.since, self.steps, self.slots, self.flops = time.monotonic(), 0, 0, 0.0
        return speed, a_step
