"""Parquet files, one row group in memory at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from metajax.core.reading import reading
from metajax.data.documents import BadRecord
from metajax.data.sources import source
from metajax.data.sources.files import Files, Row, attempt, split, unreadable
from metajax.data.sources.values import cells, flat


@source("parquet")
class Parquet(Files):
    """parquet:PATH, where PATH may be a glob: files of flat or nested columns."""

    def _count(self, path: str) -> int:
        with _opened(path) as reader:
            names, rows = flat(reader.schema_arrow.empty_table()).column_names, reader.metadata.num_rows
        self.columns.check(names, path, "column")
        return rows

    def _rows(self, path: str, records: range) -> Iterator[Row]:
        with _opened(path) as reader:
            columns = list(dict.fromkeys(field.name for field in reader.schema_arrow if _has_text(field.type)))
            sizes = [reader.metadata.row_group(group).num_rows for group in range(reader.num_row_groups)]
            starts = list(itertools.accumulate(sizes, initial=0))

            def table_of(group: int) -> pa.Table:
                return flat(reader.read_row_group(group, columns=columns))

            for group, part in split(records, starts):
                table = attempt(table_of, group, path, f"{path}, row group {group}: cannot be decoded")
                for row in part:
                    where = f"{path}, record {starts[group] + row}"
                    yield where, table if isinstance(table, BadRecord) else cells(table, row)


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    with reading(path, unreadable(path, "Parquet file")):
        file = epath.Path(path).open("rb") if "://" in path else pa.OSFile(path)
        with file, pq.ParquetFile(file, page_checksum_verification=True) as reader:
            yield reader


def _has_text(kind: pa.DataType) -> bool:
    """Whether a column is read: lists are not, structs are if one of their fields is."""
    return any(_has_text(field.type) for field in kind) if pa.types.is_struct(kind) else not pa.types.is_nested(kind)
