"""ArrayRecord files whose records are UTF-8 JSON objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from metajax.core.array_records import ArrayRecords
from metajax.core.reading import reading
from metajax.data.documents import BadRecord
from metajax.data.sources import Request, source
from metajax.data.sources.files import Columns, Files, parsed


@source("arrayrecord")
def open_arrayrecord(request: Request) -> ArrayRecord:
    """arrayrecord:PATH, where PATH may be a glob."""
    return ArrayRecord(request.spec, request.files(), request.root, request.columns)


class ArrayRecord(Files):
    """ArrayRecord files of JSON objects."""

    kind = "arrayrecord"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        super().__init__(spec, paths, root, columns)
        self._files = {path: ArrayRecords([(path, 0, None)]) for path in paths}

    def _count(self, path: str) -> int:
        return len(self._files[path])

    def _rows(self, path: str, records: range) -> Iterator[tuple[str, Mapping[str, Any] | BadRecord]]:
        for record in records:
            where = f"{path}, record {record}"
            try:
                with reading(path, lambda reason, where=where: BadRecord(f"{where}: cannot be read ({reason})")):
                    line = self._files[path][record]
            except BadRecord as error:
                yield where, error
            else:
                yield parsed(line, where, self.columns.text)
