"""What to do where a plan does not fit, and how large a batch would: tried with the compiler, never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from metajax.config import Config, override

_BUFFER = re.compile(r"^\s*\d+\. Size: ([\d.]+)([KMG]?)\s*\n(.*?)(?=^\s*=+|^\s*\d+\. Size|\Z)", re.MULTILINE | re.DOTALL)
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_MOST = 2**20  # rows; no batch is larger


def largest_buffers(error: str, count: int = 3) -> list[dict[str, Any]]:
    """The largest allocations that the TPU compiler names when a program does not fit: bytes, shape, operation, source line."""
    found = []
    for size, unit, rest in _BUFFER.findall(error)[:count]:
        fields = {name: re.search(pattern, rest) for name, pattern in _FIELDS.items()}
        found.append({"bytes": float(size) * _UNIT[unit]} | {name: match and match.group(1) for name, match in fields.items()})
    return found


_FIELDS = {
    "shape": r"Shape: (\S+)",
    "operation": r'op_name="([^"]*)"',
    "file": r'source_file="([^"]*)"',
    "line": r"source_line=(\d+)",
}


def candidates(config: Config, shards: int) -> Iterator[dict[str, Any]]:
    """Changes that need less memory and leave the gradient as it is, those that cost least time first."""
    kept = {"none": ["dots", "full"], "dots": ["full"], "full": []}[config.runtime.remat]
    for remat in kept:
        yield {"runtime.remat": remat}
    pieces = 2 * config.training.accumulate
    while config.data.batch_rows % (pieces * shards) == 0:
        yield {"runtime.remat": "full", "training.accumulate": pieces}
        pieces *= 2


def advise(config: Config, shards: int, plan: Callable[[Config], Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first of `candidates` whose plan fits, as {changes, total}; None where none does."""
    for changes in candidates(config, shards):
        found = plan(override(config, changes))
        if found["fits"]:
            return {"changes": changes, "total": found["memory"]["total"]}
    return None


def largest_batch(unit: int, start: int, fits: Callable[[int], bool]) -> int:
    """The most rows of a batch that fit, a multiple of `unit`, by doubling from about `start` and then bisection; 0: not even `unit`."""
    good, bad, trial = 0, None, max(1, start // unit)
    while bad is None or bad - good > 1:
        if fits(trial * unit):
            good = trial
        else:
            bad = trial
        trial = 2 * good if bad is None else (good + bad) // 2
        if bad is None and trial * unit > _MOST:
            break
    return good * unit
