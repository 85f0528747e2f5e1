"""Parquet files, one row group in memory at a time."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from metajax.core.errors import UserError, nearest, require
from metajax.core.reading import first_line, reading
from metajax.data.documents import BadRecord
from metajax.data.sources import Request, source
from metajax.data.sources.files import Files, unreadable
from metajax.data.sources.values import cells, flat, leaves


@source("parquet")
def open_parquet(request: Request) -> Parquet:
    """parquet:PATH, where PATH may be a glob."""
    return Parquet(request.spec, request.files(), request.root, request.columns)


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    with reading(path, unreadable(path, "Parquet file")):
        file = epath.Path(path).open("rb") if "://" in path else pa.OSFile(path)
        with file, pq.ParquetFile(file, page_checksum_verification=True) as reader:
            yield reader


class Parquet(Files):
    """Parquet files of flat or nested columns."""

    kind = "parquet"

    def _count(self, path: str) -> int:
        with _opened(path) as reader:
            names, rows = leaves(reader.schema_arrow), reader.metadata.num_rows
        for option, name in (("text", self.columns.text), ("origin", self.columns.origin)):
            require(
                not name or name in names,
                f"{path}: no column {name!r} ({option}){nearest(name, names)}; columns: {', '.join(names)}",
            )
        return rows

    def _rows(self, path: str, records: range) -> Iterator[tuple[str, Mapping[str, Any] | BadRecord]]:
        with _opened(path) as reader:
            metadata, columns = reader.metadata, list(dict.fromkeys(leaves(reader.schema_arrow).values()))
            sizes = (metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
            starts = list(itertools.accumulate(sizes, initial=0))
            held, table = None, None
            for record in records:
                group = bisect.bisect_right(starts, record) - 1
                if group != held:
                    held, table = group, _table(reader, path, group, columns)
                where = f"{path}, record {record}"
                yield where, table if isinstance(table, BadRecord) else cells(table, record - starts[group])


def _table(reader: pq.ParquetFile, path: str, group: int, columns: list[str]) -> pa.Table | BadRecord:
    try:
        with reading(path, lambda reason: BadRecord(f"{path}, row group {group}: cannot be decoded ({reason})")):
            return flat(reader.read_row_group(group, columns=columns))
    except pa.ArrowNotImplementedError as error:
        raise UserError(f"{path}: {first_line(error)}; write it again in a form that pyarrow reads") from None
    except BadRecord as error:
        return error
