"""JSON lines, plain or compressed: one object per line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from metajax.core.errors import require
from metajax.core.json_lines import is_compressed, line_marks, lines
from metajax.data.sources import source
from metajax.data.sources.files import Files, Request, Row

EVERY = 1024  # records between two marks of a plain file; reading can start at a mark


@source("jsonl")
class JsonLines(Files):
    """jsonl:PATH, where PATH may be a glob. Records are counted on the first `len`.

    Compressed files are always read from their beginning.
    """

    def __init__(self, request: Request):
        super().__init__(request)
        self._marks: dict[str, list[tuple[int, int]]] = {}
        for path in self.paths:
            require(not path.lower().endswith(".xz"), f"{path}: .xz is not read; decompress it, or compress it as .zst or .gz")

    def _count(self, path: str) -> int:
        count, self._marks[path] = line_marks(path, EVERY)
        return count

    def _rows(self, path: str, records: range) -> Iterator[Row]:
        mark = 0 if is_compressed(path) else records.start // EVERY
        stream = lines(path, *(self._marks[path][mark] if mark else ()))
        first = mark * EVERY
        for number, line in itertools.islice(stream, records.start - first, records.stop - first, records.step):
            yield f"{path}, line {number}", line
