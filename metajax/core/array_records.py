"""Random access to records of ArrayRecord files. Any number of files; only a few are open at a time."""

from __future__ import annotations

import bisect
import itertools
import uuid
from collections.abc import Iterable

from array_record.python.array_record_module import ArrayRecordReader

from metajax.core.errors import UserError
from metajax.core.reading import handle, reading


def open_reader(path: str) -> ArrayRecordReader:
    """A reader of one file. Raises RuntimeError with the reason if the file cannot be opened or is not an ArrayRecord file."""
    reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
    if not reader.ok():  # a file that cannot be opened, or is no ArrayRecord file, silently has 0 records
        reader.read([0])  # raises with the reason, except for a file that was cut
        raise RuntimeError("cut short")
    return reader


class ArrayRecords:
    """Random access to the records of files in order. It pickles. Raises UserError if a file cannot be read.

    parts: (path, first record, number of records) of each file; None as the number means all that follow.
    """

    def __init__(self, parts: Iterable[tuple[str, int, int | None]]):
        self._key = uuid.uuid4().hex
        self.parts = [
            (path, skip, self._reader(path).num_records() - skip if take is None else take) for path, skip, take in parts
        ]
        self.starts = list(itertools.accumulate((take for _, _, take in self.parts), initial=0))

    def _reader(self, path: str) -> ArrayRecordReader:
        with reading(path, lambda reason: UserError(f"{path}: not a readable ArrayRecord file ({reason}); write it again")):
            return handle(open_reader, path, self._key)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> bytes:
        """Record i, 0 <= i < len. Raises IndexError beyond that, and RuntimeError if the record is damaged."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        part = bisect.bisect_right(self.starts, i) - 1
        path, skip, _ = self.parts[part]
        return self._reader(path).read([skip + int(i) - self.starts[part]])[0]
