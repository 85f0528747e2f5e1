"""The largest buffers of a compiled program, read off the compiler's dump, which is written for a program that does not fit too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FLAGS = "--xla_dump_hlo_module_re=jit_step"  # the train step alone
_ALLOCATION = re.compile(r"^allocation (\d+): size \d+(.*)")
_VALUE = re.compile(r"^ value: <\d+ ([^\s{]+)(?:\{[\d,]*\})? @0> \(size=(\d+),offset=(\d+)\): (\S+)")  # @0: HBM
_ROW = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")


def largest_buffers(dump: Path, count: int = 3) -> list[dict[str, Any]]:
    """[{bytes, shape, name, operation, source}] of the last program in a dump, the largest first; arguments and results are not among them.

    Values that share their place count once, as the largest of them.
    """
    files = sorted(dump.glob("*after_optimizations-buffer-assignment.txt"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    places: dict[tuple[str, str], tuple[int, str, str]] = {}
    allocation, temporary = "", False
    for line in files[-1].read_text().splitlines():
        if head := _ALLOCATION.match(line):
            allocation, temporary = head.group(1), "parameter" not in head.group(2) and "live-out" not in head.group(2)
        elif temporary and (value := _VALUE.match(line)):
            name, size, offset, shape = value.groups()
            places[allocation, offset] = max(places.get((allocation, offset), (0, "", "")), (int(size), name, shape))
    largest = sorted(places.values(), reverse=True)[:count]
    program = files[-1].with_name(files[-1].name.replace("-buffer-assignment", "")).read_text()
    return [{"bytes": size, "shape": shape, "name": name, **_origin(program, name)} for size, name, shape in largest]


def _origin(program: str, name: str) -> dict[str, str | None]:
    """The JAX operation and the source line that an instruction of an optimised program comes from, as far as it tells."""
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
