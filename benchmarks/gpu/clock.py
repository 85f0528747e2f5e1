"""Timing rivals in turns in one process: median and range of the milliseconds of a call; failures are kept with the times."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

ROUNDS = 12  # rounds of turns
MOST_CALLS = 50  # most calls of a turn
COMPILERS = 8  # programs that XLA compiles in parallel
AGREE = 0.02  # relative distance of two bfloat16 results that counts as rounding


class Side(NamedTuple):
    """One rival in a case."""

    name: str
    call: Callable[[], Any]  # launches the work and returns its result
    wait: Callable[[Any], Any]  # waits until the result is computed
    # float32 result to compare with ours; None: the side computes something else.
    arrays: Callable[[Any], list[np.ndarray]] | None = None
    facts: dict[str, Any] = {}  # facts about the side besides its times  # noqa: RUF012


class Case:
    """Sides that do the same work, and the results of each."""

    def __init__(self, section: str, name: str, facts: dict[str, Any] | None = None):
        self.section, self.name = section, name
        self.facts: dict[str, Any] = facts or {}
        self.found: dict[str, dict[str, Any]] = {}

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """make(), or None if it fails; the error's text is then the side's result, and the command's exit code is 1."""
        try:
            return make()
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()[:2000]
            self.found[name] = {"failed": text}
            print(f"FAILED {self.section}, {self.name}, {name}: {text}", file=sys.stderr, flush=True)
            return None

    def race(self, makers: dict[str, Callable[[], Side]], turn_seconds: float = 0.03) -> None:
        """Make, warm up and time the sides in turns of this many seconds; the others are compared with the first side."""
        sides, ours = [], None
        for name, make in makers.items():
            side = self.attempt(name, make)
            warm = side and self.attempt(name, lambda side=side: warm_up(side, turn_seconds))
            if not warm:
                continue
            result, calls = warm
            self.found[name] = {"calls": calls, **side.facts}
            if side.arrays is not None:
                arrays = side.arrays(result)
                ours = arrays if ours is None else ours
                self.attempt(name, lambda name=name, arrays=arrays, ours=ours: self._compare(name, arrays, ours))
            sides.append((side, calls))
        sides = [(side, calls) for side, calls in sides if "failed" not in self.found[side.name]]
        taken = self.attempt("all", lambda: take_turns(sides)) or {}
        for name, times in taken.items():
            self.found[name] |= {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}

    def _compare(self, name: str, arrays: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> None:
        self.found[name]["distance"] = worst = max(distance(a, b) for a, b in zip(arrays, ours, strict=True))
        if not worst < AGREE:
            raise ValueError(f"differs from our result by {worst:.3g} of its norm; {AGREE} is rounding")

    def as_json(self) -> dict[str, Any]:
        return {"section": self.section, "name": self.name, "facts": self.facts, "sides": self.found}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape}")
    return float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel()))


def warm_up(side: Side, turn_seconds: float) -> tuple[Any, int]:
    """(result of a call, number of calls in a turn), after a call that may compile."""
    side.wait(side.call())
    began = time.perf_counter()
    result = side.call()
    side.wait(result)
    seconds = time.perf_counter() - began
    return result, min(max(math.ceil(turn_seconds / seconds), 1), MOST_CALLS)


def take_turns(sides: Sequence[tuple[Side, int]]) -> dict[str, list[float]]:
    """Milliseconds per call, one number for each of the ROUNDS."""
    taken: dict[str, list[float]] = {side.name: [] for side, _ in sides}
    for _ in range(ROUNDS):
        for side, calls in sides:
            began = time.perf_counter()
            for _ in range(calls):
                result = side.call()
            side.wait(result)
            taken[side.name].append(1e3 * (time.perf_counter() - began) / calls)
    return taken


def compiled(function: Callable, *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def compile_all(jobs: dict[Any, Callable[[], Any]]) -> dict[Any, Callable[[], Any]]:
    """Finish all jobs before timing starts. For each, return a function that gives its result or raises its error."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        futures = {key: pool.submit(job) for key, job in jobs.items()}
    return {key: future.result for key, future in futures.items()}
