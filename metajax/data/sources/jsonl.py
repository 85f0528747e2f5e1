"""JSON lines, plain or compressed: one object per line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metajax.core.errors import require
from metajax.core.json_lines import is_compressed, line_marks, lines
from metajax.data.documents import BadRecord
from metajax.data.sources import Request, source
from metajax.data.sources.files import Columns, Files, parsed

EVERY = 1024  # records between two marks of a plain file; reading can start at a mark


@source("jsonl")
def open_jsonl(request: Request) -> JsonLines:
    """jsonl:PATH, where PATH may be a glob."""
    return JsonLines(request.spec, request.files(), request.root, request.columns)


class JsonLines(Files):
    """Files of JSON lines. Records are counted on the first `len`. Compressed files are always read from their beginning."""

    kind = "jsonl"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        super().__init__(spec, paths, root, columns)
        self._marks: dict[str, list[tuple[int, int]]] = {}
        for path in paths:
            require(not path.lower().endswith(".xz"), f"{path}: .xz is not read; decompress it, or compress it as .zst or .gz")

    def _count(self, path: str) -> int:
        count, self._marks[path] = line_marks(path, EVERY)
        return count

    def _rows(self, path: str, records: range) -> Iterator[tuple[str, Mapping[str, Any] | BadRecord]]:
        stream, at = iter(()), None
        for record in records:
            mark = 0 if is_compressed(path) else record // EVERY
            if at is None or mark * EVERY > at:
                stream, at = lines(path, *(self._marks[path][mark] if mark else ())), mark * EVERY
            number, line = next(itertools.islice(stream, record - at, None))
            at = record + 1
            yield parsed(line, f"{path}, line {number}", self.columns.text)
