"""Random-access readers of JSON lines, Parquet and ArrayRecord files, and the rules that turn a row into a Document.

Every reader can be pickled for reader processes: handles and decoded row groups are opened again on first use.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar
from urllib.parse import urlsplit

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from fsspec.core import url_to_fs

from metajax.config import UserError, nearest, require
from metajax.data.documents import BadRecord, Document

_HASHED_OF_FILE, _HASHED_OF_ALL = 64 << 20, 1 << 30  # bytes read to notice that files have changed
_DECODED_BYTES = 256 << 20  # decoded Parquet row groups kept by one reader


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text and the origin; '' as origin means the rule of `to_document`.

    join: a folder with files of labels, '' for none; on: the column whose value a document and its labels share.
    """

    text: str = "text"
    origin: str = ""
    join: str = field(default="", repr=False)  # the fingerprint of the files themselves is that of the fields shown
    on: str = field(default="id", repr=False)


def to_document(row: Mapping[str, Any], columns: Columns, where: str) -> Document:
    """A row as a Document; raises BadRecord, its message opened by `where` (file and record).

    Metadata is every other scalar column as a string; None, '' and nested values are left out. The origin is the
    column asked for, else a column named `origin`, else the host of `url`, else a digest of the text.
    """
    if columns.text not in row:
        names = ", ".join(row) or "none"
        raise BadRecord(f"{where}: no column {columns.text!r}{nearest(columns.text, row)}; columns: {names}")
    text = row[columns.text]
    text = _decode(text, f"{where}: column {columns.text!r}") if isinstance(text, bytes) else text
    if not isinstance(text, str):
        raise BadRecord(f"{where}: column {columns.text!r} is {type(text).__name__}, not text")
    _check_unicode(text, f"{where}: column {columns.text!r}")
    skipped = {columns.text, "origin"} - {columns.origin}
    strings = {k: as_string(v, f"{where}: column {k!r}") for k, v in row.items() if k not in skipped}
    metadata = {k: v for k, v in strings.items() if v}
    return Document(text, metadata, _origin(row, columns, metadata, text, where))


def _origin(row: Mapping[str, Any], columns: Columns, metadata: dict[str, str], text: str, where: str) -> str:
    if columns.origin:
        if columns.origin not in metadata:
            raise BadRecord(f"{where}: no value in column {columns.origin!r}, which origin= names")
        return metadata[columns.origin]
    named = as_string(row.get("origin"), f"{where}: column 'origin'")
    return named or _host(metadata.get("url", "")) or hashlib.sha1(text.encode()).hexdigest()


def _host(url: str) -> str:
    """The host of an address with or without a scheme, '' when there is none."""
    try:
        return urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:  # unbalanced brackets of an IPv6 host: an address that names no site
        return ""


def _decode(value: bytes, where: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where} is not UTF-8 at byte {error.start}") from None


def _check_unicode(text: str, where: str) -> None:
    """Raise BadRecord for half of a surrogate pair, which JSON can spell but no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{where} holds half of a surrogate pair at character {error.start}") from None


def as_string(value: Any, where: str) -> str:
    """A scalar as metadata; '' for None and for nested values."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, (Mapping, Sequence, np.ndarray)) and not isinstance(value, (str, bytes))):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = _decode(value, where) if isinstance(value, bytes) else str(value)
    _check_unicode(text, where)
    return text


def parse_json(line: bytes, columns: Columns, where: str) -> Document:
    """A UTF-8 JSON object as a Document; raises BadRecord."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, or a number of thousands of digits
        raise BadRecord(f"{where}: not JSON that can be read ({first_line(error)})") from None
    if not isinstance(row, dict):
        raise BadRecord(f"{where}: a JSON {type(row).__name__}, not an object with a {columns.text!r} field")
    return to_document(row, columns, where)


def file_entry(path: str) -> dict[str, Any]:
    """Path, bytes and sha256 of a file, for a manifest."""
    with epath.Path(path).open("rb") as file:
        digest = hashlib.sha256()
        size = 0
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"path": path, "bytes": size, "sha256": digest.hexdigest()}


def file_stamps(paths: Sequence[str]) -> list[str]:
    """Of each file its size, modification time (ns for local files) and a hash, to tell whether it has changed.

    The hash is of the whole content of small files and of blocks between the beginning and the end of large ones: at most 64 MiB
    of a file, 1 GiB of all, where these are not too many to take 64 KiB of each. A bucket keeps a hash of every object.
    """
    share = min(_HASHED_OF_FILE, max(_HASHED_OF_ALL // max(1, len(paths)), 1 << 16))
    return [file_stamp(path, share) for path in paths]


def file_stamp(path: str, share: int = _HASHED_OF_FILE) -> str:
    """`file_stamps` of one file, of which at most `share` bytes are read."""
    if "://" in path:
        system, name = url_to_fs(path)
        info = system.info(name)
        hashes = (str(info[key]) for key in ("crc32c", "md5Hash", "ETag", "etag") if info.get(key))
        return f"{info['size']} {epath.Path(path).stat().mtime} {next(hashes, '')}"
    stat, now = os.stat(path), time.time_ns()
    fresh = now if now - stat.st_ctime_ns < 1e9 else 0  # of two writes at once the system may keep one time
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, fresh)  # the same: not written since it was read
    return f"{stat.st_size} {stat.st_mtime_ns} {_sampled(path, share, state)}"


@lru_cache(1 << 16)
def _sampled(path: str, share: int, state: tuple[int, ...]) -> str:
    """sha256 of a local file, of one above `share` bytes of blocks at equal distances, the first and the last among them."""
    size = state[0]
    blocks = min(16, max(2, share >> 20))
    length = share // blocks if size > share else size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in np.linspace(0, size - length, blocks if size > share else 1).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


class Files:
    """Records numbered through one or more files, in the order given; raises UserError when there is none."""

    kind: ClassVar[str]

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self.spec, self.paths, self.root, self.columns = spec, tuple(paths), root, columns
        counts = [self._open(path) for path in self.paths]
        self._starts = list(itertools.accumulate(counts, initial=0))
        require(len(self) > 0, f"{', '.join(self.paths)}: no records; {self.kind} data needs at least one")

    def _open(self, path: str) -> int:
        """Open a file and return its number of records."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, i: int) -> tuple[int, int]:
        """(file, record in it) of record i; IndexError beyond the end."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.spec}")
        file = bisect.bisect_right(self._starts, i) - 1
        return file, int(i) - self._starts[file]

    def where(self, i: int) -> str:
        """File and record of record i, as messages name them."""
        file, row = self.locate(i)
        return f"{self.paths[file]}, record {row}"

    def fingerprint(self) -> str:
        """sha256 over columns and each file's path below the data directory, size, modification time and hash of its content."""
        digest = hashlib.sha256(f"{self.kind} {self.columns}\n".encode())
        for path, stamp in zip(self.paths, file_stamps(self.paths), strict=True):
            digest.update(f"{path.removeprefix(self.root)} {stamp}\n".encode())
        return digest.hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Kind, spec, records and files; the sha256 of each file is computed now."""
        return {
            "kind": self.kind,
            "spec": self.spec,
            "records": len(self),
            "fingerprint": self.fingerprint(),
            "files": [file_entry(path) for path in self.paths],
        }


class JsonLines(Files):
    """Uncompressed JSON lines, through an index of line offsets made once when the file is opened."""

    kind = "jsonl"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self._lines: list[tuple[np.ndarray, np.ndarray]] = []
        self._descriptors: dict[int, int] = {}
        super().__init__(spec, paths, root, columns)

    def _open(self, path: str) -> int:
        require(not path.lower().endswith(".xz"), f"{path}: .xz is not read; decompress it, or compress it as .zst or .gz")
        require("://" not in path, f"{path}: jsonl is read from local disks alone; copy it, or convert it to arrayrecord")
        self._lines.append(line_index(path))
        return len(self._lines[-1][0])

    def __getitem__(self, i: int) -> Document:
        file, row = self.locate(i)
        starts, lengths = self._lines[file]
        line = os.pread(self._descriptor(file), int(lengths[row]), int(starts[row]))
        try:
            return parse_json(line, self.columns, self.paths[file])
        except BadRecord as error:
            reason = str(error).removeprefix(f"{self.paths[file]}: ")
            raise BadRecord(f"{self.where(i)}: {reason}") from None

    def where(self, i: int) -> str:
        file, row = self.locate(i)
        return f"{self.paths[file]}, line {_line_number(self.paths[file], int(self._lines[file][0][row]))}"

    def _descriptor(self, file: int) -> int:
        if file not in self._descriptors:
            opened = os.open(self.paths[file], os.O_RDONLY)
            if self._descriptors.setdefault(file, opened) != opened:  # another thread was first
                os.close(opened)
        return self._descriptors[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def line_index(path: str, block_bytes: int = 1 << 24) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths in bytes (int64) of the lines that hold more than white space."""
    if os.path.getsize(path) == 0:  # an empty file cannot be mapped
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    data = np.memmap(path, np.uint8, "r")
    starts, lengths = [], []
    begin, size = 0, block_bytes
    while begin < len(data):
        block = data[begin : begin + size]
        ends = np.flatnonzero(block == ord("\n"))
        if begin + size >= len(data) and (not len(ends) or ends[-1] != len(block) - 1):
            ends = np.append(ends, len(block))  # the last line may lack its line feed
        if not len(ends):  # one line is longer than the block
            size *= 2
            continue
        firsts = np.concatenate([[0], ends[:-1] + 1])
        block = block[: ends[-1] + 1]  # what follows is the beginning of the next block's first line
        filled = np.bitwise_or.reduceat((block > ord(" ")).view(np.uint8), firsts).astype(bool)
        starts.append(begin + firsts[filled])
        lengths.append((ends - firsts)[filled])
        begin, size = begin + int(ends[-1]) + 1, block_bytes
    return np.concatenate(starts).astype(np.int64), np.concatenate(lengths).astype(np.int64)


def _line_number(path: str, offset: int) -> int:
    """1-based number of the line that starts at `offset`."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 22))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


class Parquet(Files):
    """Parquet files; the row groups decoded last stay in memory, up to 256 MiB (write small row groups for random access)."""

    kind = "parquet"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self._groups: list[list[int]] = []  # cumulative rows of each file's row groups
        self._scalars: list[list[str]] = []
        self._fresh()
        super().__init__(spec, paths, root, columns)

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._decoded: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._readers: dict[str, pq.ParquetFile] = {}

    def _reader(self, path: str) -> pq.ParquetFile:
        if path not in self._readers:
            try:
                self._readers[path] = pq.ParquetFile(epath.Path(path).open("rb"), page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path}: not a readable Parquet file ({first_line(error)}); write it again") from None
        return self._readers[path]

    def _open(self, path: str) -> int:
        reader = self._reader(path)
        names = reader.schema_arrow.names
        for option, name in (("text", self.columns.text), ("origin", self.columns.origin)):
            require(
                not name or name in names,
                f"{path}: no column {name!r} ({option}){nearest(name, names)}; columns: {', '.join(names)}",
            )
        metadata = reader.metadata
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._groups.append(list(itertools.accumulate(rows, initial=0)))
        self._scalars.append([f.name for f in reader.schema_arrow if not pa.types.is_nested(f.type)])
        return metadata.num_rows

    def __getitem__(self, i: int) -> Document:
        file, row = self.locate(i)
        where = self.where(i)
        starts = self._groups[file]
        group = bisect.bisect_right(starts, row) - 1
        table = self._table(file, group)
        try:
            values = {
                name: column[row - starts[group]].as_py() for name, column in zip(table.column_names, table.columns, strict=True)
            }
        except UnicodeDecodeError as error:
            raise BadRecord(f"{where}: not UTF-8 at byte {error.start}") from None
        return to_document(values, self.columns, where)

    def _table(self, file: int, group: int) -> pa.Table:
        with self._lock:
            if (file, group) in self._decoded:
                self._decoded.move_to_end((file, group))
                return self._decoded[file, group]
            try:
                table = self._reader(self.paths[file]).read_row_group(group, columns=self._scalars[file])
            except (pa.ArrowException, OSError) as error:
                raise BadRecord(f"{self.paths[file]}, row group {group}: cannot be decoded ({first_line(error)})") from None
            for position, field in enumerate(table.schema):
                if pa.types.is_temporal(field.type):  # as text: Python's dates hold no nanoseconds
                    table = table.set_column(position, field.name, table.column(position).cast(pa.string()))
            self._decoded[file, group] = table
            while len(self._decoded) > 1 and sum(t.nbytes for t in self._decoded.values()) > _DECODED_BYTES:
                self._decoded.popitem(last=False)
            return table

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_decoded", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()


class ArrayRecord(Files):
    """ArrayRecord files whose records are UTF-8 JSON objects."""

    kind = "arrayrecord"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self._sources: list[grain.sources.ArrayRecordDataSource] = []
        super().__init__(spec, paths, root, columns)

    def _open(self, path: str) -> int:
        try:
            source = grain.sources.ArrayRecordDataSource([path])
            count = len(source)
        except RuntimeError as error:  # the reader's only kind of error
            raise UserError(f"{path}: not a readable ArrayRecord file ({first_line(error)}); write it again") from None
        self._sources.append(source)
        return count

    def __getitem__(self, i: int) -> Document:
        file, row = self.locate(i)
        where = self.where(i)
        try:
            record = self._sources[file][row]
        except RuntimeError as error:
            raise BadRecord(f"{where}: cannot be read ({first_line(error)})") from None
        return parse_json(record, self.columns, where)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or ["damaged or cut short"])[0]
