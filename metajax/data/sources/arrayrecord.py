"""ArrayRecord files whose records are UTF-8 JSON objects."""

from __future__ import annotations

from collections.abc import Iterator

from metajax.core.array_records import ArrayRecords
from metajax.data.sources import source
from metajax.data.sources.files import Files, Request, Row, attempt


@source("arrayrecord")
class ArrayRecord(Files):
    """arrayrecord:PATH, where PATH may be a glob: files of JSON objects."""

    def __init__(self, request: Request):
        super().__init__(request)
        self._files = {path: ArrayRecords([(path, 0, None)]) for path in self.paths}

    def _count(self, path: str) -> int:
        return len(self._files[path])

    def _rows(self, path: str, records: range) -> Iterator[Row]:
        for record in records:
            where = f"{path}, record {record}"
            yield where, attempt(self._files[path].__getitem__, record, path, f"{where}: cannot be read")
