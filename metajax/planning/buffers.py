"""The largest buffers of a compiled program, read from the compiler's dump. The dump exists even if the program does not fit."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = "--xla_dump_hlo_module_re=train_step"  # only the train step
_ALLOCATION = re.compile(r"^allocation (\d+): size \d+(.*)")
_VALUE = re.compile(r"^ value: <\d+ ([^\s{]+)(\{[\d,]*\})? @0> \(size=(\d+),offset=(\d+)\): (\S+)")  # @0: HBM
_RANGE = re.compile(r"^    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$", re.MULTILINE)
_OPERATION = re.compile(r'^\s*(?:ROOT )?%(\S+) = .*?op_name="([^"]*)"', re.MULTILINE)
_ROW = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")


class Value(NamedTuple):
    """A buffer that is neither an argument nor a result. Buffers with the same place share memory."""

    size: int
    name: str
    index: str  # of the part of the instruction's result
    shape: str
    place: tuple[str, str]


def largest_buffers(dump: Path, count: int = 3) -> list[dict[str, Any]]:
    """[{bytes, shape, name, operation, source}] of the last program in a dump, largest first, without arguments and results.

    Values that share a place count once, as the largest of them.
    """
    places: dict[tuple[str, str], Value] = {}
    for value in _values(dump):
        places[value.place] = max(places.get(value.place, value), value)
    largest = sorted(places.values(), reverse=True)[:count]
    program = _last(dump, "") if largest else ""
    return [{"bytes": v.size, "shape": v.shape, "name": v.name, **_origin(program, v.name)} for v in largest]


def temporaries(dump: Path) -> dict[str, int]:
    """Bytes by kind at the peak memory of the last program in a dump: activations (of the forward pass or its recomputation),
    gradients (of activations and parameters), other. {} if the dump does not say."""
    ranges = {(name, index): (int(start), int(end)) for name, index, start, end in _RANGE.findall(_last(dump, "-live-range"))}
    live = [(*ranges[value.name, value.index], value) for value in _values(dump) if (value.name, value.index) in ranges]
    changes: Counter[int] = Counter()
    for start, end, value in live:
        changes[start] += value.size
        changes[end + 1] -= value.size
    steps = sorted(changes)
    totals = itertools.accumulate(changes[step] for step in steps)
    fullest = max(zip(totals, steps, strict=True), default=(0, 0))[1]
    operations = dict(_OPERATION.findall(_last(dump, "")))
    kinds = dict.fromkeys(("activations", "gradients", "other"), 0) if live else {}
    for start, end, value in live:
        if start <= fullest <= end:
            kinds[kind_of(operations.get(value.name, ""))] += value.size
    return kinds


def kind_of(operation: str) -> str:
    """The kind of a JAX operation's result, from the transforms in its name."""
    if "transpose(" in operation and "rematted_computation" not in operation:
        return "gradients"
    return "activations" if "jvp(" in operation else "other"


def _last(dump: Path, kind: str) -> str:
    """The text of the last program in the dump, or of its report `kind`; empty if there is none."""
    files = sorted(dump.glob(f"*after_optimizations{kind}.txt"), key=lambda path: path.stat().st_mtime)
    return files[-1].read_text() if files else ""


def _values(dump: Path) -> Iterator[Value]:
    allocation, temporary = "", False
    for line in _last(dump, "-buffer-assignment").splitlines():
        if head := _ALLOCATION.match(line):
            allocation, temporary = head.group(1), "parameter" not in head.group(2) and "live-out" not in head.group(2)
        elif temporary and (value := _VALUE.match(line)):
            name, index, size, offset, shape = value.groups()
            yield Value(int(size), name, index or "{}", shape, (allocation, offset))


def _origin(program: str, name: str) -> dict[str, str | None]:
    """The JAX operation and the source line of an instruction in an optimised program, as far as they are known."""
    line = re.search(rf"^\s*(?:ROOT )?%{re.escape(name)} = .*$", program, re.MULTILINE)
    operation = line and re.search(r'op_name="([^"]*)"', line.group())
    frame = line and re.search(r"stack_frame_id=(\d+)", line.group())
    return {"operation": operation.group(1) if operation else None, "source": _source(program, frame.group(1)) if frame else None}


def _source(program: str, frame: str) -> str:
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for block in program.split("\n\n"):
        title, *rows = block.splitlines() or [""]
        found = [row for text in rows if (row := _ROW.match(text))]
        if title in ("FileNames", "FileLocations", "StackFrames"):
            tables[title] = {r[1]: {"text": r[2] or ""} | dict(pair.split("=") for pair in (r[3] or "").split()) for r in found}
    location = tables["FileLocations"][tables["StackFrames"][frame]["file_location_id"]]
    return f"{tables['FileNames'][location['file_name_id']]['text']}:{location['line']}"
