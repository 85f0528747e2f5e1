"""Random-access readers of JSON lines, Parquet and ArrayRecord files, and the rules that turn a row into a Document.

Every reader can be pickled for reader processes: handles and decoded row groups are opened again on first use.
"""

from __future__ import annotations

import bisect
import codecs
import hashlib
import itertools
import os
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from fsspec.core import url_to_fs

from metajax.core import json_lines
from metajax.core.array_records import ArrayRecords
from metajax.core.errors import UserError, nearest, require
from metajax.core.reading import first_line, handle, reading
from metajax.data.addresses import parts
from metajax.data.documents import BadRecord, Document
from metajax.data.sources.values import as_string, as_text, cells, flat, flatten, leaves, why

_HASHED_OF_FILE, _HASHED_OF_ALL = 64 << 20, 1 << 30  # bytes read to notice that files have changed
_DECODED_BYTES = 256 << 20  # decoded Parquet row groups kept by one reader
ADDRESSES = ("url", "uri", "warc-target-uri", "source_url")  # columns of a document's address, nested ones too, in any case
NO_ORIGIN, NO_TEXT, JOINED = "no origin", "no text: ", "joined"  # what a source's tally counts


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text and the origin; '' as origin means the rule of `to_document`. A dotted name is that of a nested column.

    join: a folder with files of labels, '' for none; on: the column whose value a document and its labels share. markers: control tokens
    that the columns spell are read as such, as in a chat with its turn markers.
    """

    text: str = "text"
    origin: str = ""
    join: str = field(default="", repr=False)  # the fingerprint of the files themselves is that of the fields shown
    on: str = field(default="id", repr=False)
    rules: int = field(default=2, init=False)  # part of every fingerprint: raise it when rows become other documents than before
    markers: bool = field(default=False, repr=False)  # of the tokens, not of the files


def to_document(row: Mapping[str, Any], columns: Columns, where: str, tally: Counter[str] | None = None) -> Document:
    """A row as a Document; raises BadRecord, its message opened by `where` (file and record).

    Metadata is every other column as a string, those of nested objects by dotted names; what is missing, lists, and what cannot be text are
    left out. The origin is the column asked for, else a column named `origin`, else the host of the first column of an address, else a digest
    of the text. Of an origin that is an address its host counts.

    tally: counts the documents without an origin (NO_ORIGIN), and by column what could not be text (NO_TEXT and its name).
    """
    row, tally = flatten(row), Counter() if tally is None else tally
    if columns.text not in row:
        names = ", ".join(row) or "none"
        raise BadRecord(f"{where}: no column {columns.text!r}{nearest(columns.text, row)}; columns: {names}")
    text = row[columns.text]
    if not isinstance(text, (str, bytes)):
        raise BadRecord(f"{where}: column {columns.text!r} is {type(text).__name__}, not text")
    strings = {}
    for name, value in row.items():
        try:
            strings[name] = as_text(value) if name == columns.text else as_string(value)
        except UnicodeError as error:
            if name in (columns.text, columns.origin):
                raise BadRecord(f"{where}: column {name!r} {why(error)}") from None
            tally[NO_TEXT + name] += 1
    text = strings[columns.text]
    skipped = {columns.text, "origin"} - {columns.origin}
    metadata = {name: string for name, string in strings.items() if string and name not in skipped}
    if columns.origin and columns.origin not in metadata:
        raise BadRecord(f"{where}: no value in column {columns.origin!r}, which origin= names")
    origin = _origin(strings, columns.origin or "origin", metadata)
    tally[NO_ORIGIN] += not origin
    return Document(text, metadata, origin or hashlib.sha1(text.encode()).hexdigest())


def _origin(strings: Mapping[str, str], column: str, metadata: Mapping[str, str]) -> str:
    """The value of a column or the host of an address, '' where there is neither."""
    if named := strings.get(column, ""):
        return (named.lower().startswith(("http://", "https://")) and host(named)) or named
    addresses = sorted((rank, name) for name in metadata if (rank := _address_rank(name)) is not None)
    return next(filter(None, (host(metadata[name]) for _, name in addresses)), "")


@lru_cache(maxsize=1 << 12)
def _address_rank(name: str) -> tuple[int, int] | None:
    """Where a column stands among those that hold a document's address, by its name; None for others."""
    last = name.rpartition(".")[2].casefold()
    return (name.count("."), ADDRESSES.index(last)) if last in ADDRESSES else None


def host(url: str) -> str:
    """The host of an address with or without a scheme, '' when there is none."""
    found = parts(url)
    return found[1] if found else ""


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
    """Records numbered through one or more files, in the order given; raises UserError when there is none.

    tally: what `to_document` counts, of all documents read so far in this process.
    """

    kind: ClassVar[str]

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self.spec, self.paths, self.root, self.columns = spec, tuple(paths), root, columns
        self.tally: Counter[str] = Counter()
        self._key = uuid.uuid4().hex
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

    def parsed(self, line: bytes, i: int) -> Document:
        """Record i from its JSON; raises BadRecord."""
        try:
            row = json_lines.parse(line)
        except ValueError as error:
            raise BadRecord(f"{self.where(i)}: {error}") from None
        if not isinstance(row, dict):
            raise BadRecord(f"{self.where(i)}: a JSON {type(row).__name__}, not an object with a {self.columns.text!r} field")
        return self.document(row, i)

    def document(self, row: Mapping[str, Any], i: int) -> Document:
        """Record i from its row; raises BadRecord."""
        try:
            return to_document(row, self.columns, "", self.tally)
        except BadRecord as error:  # the place is looked for now, for a number of a line costs reading the file
            raise BadRecord(f"{self.where(i)}{error}") from None

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
        super().__init__(spec, paths, root, columns)

    def _open(self, path: str) -> int:
        require(not path.lower().endswith(".xz"), f"{path}: .xz is not read; decompress it, or compress it as .zst or .gz")
        require("://" not in path, f"{path}: jsonl is read from local disks alone; copy it, or convert it to arrayrecord")
        with reading(path, unreadable(path, "file of JSON lines")):
            self._lines.append(line_index(path))
        return len(self._lines[-1][0])

    def __getitem__(self, i: int) -> Document:
        file, row = self.locate(i)
        starts, lengths = self._lines[file]
        with reading(self.paths[file], unreadable(self.paths[file], "file of JSON lines")):
            line = handle(pa.OSFile, self.paths[file], self._key).read_at(int(lengths[row]), int(starts[row]))
        return self.parsed(line, i)

    def where(self, i: int) -> str:
        file, row = self.locate(i)
        return f"{self.paths[file]}, line {_line_number(self.paths[file], int(self._lines[file][0][row]))}"


_FILLED = np.array([byte not in json_lines.BLANK for byte in range(256)], np.uint8)


def line_index(path: str, block_bytes: int = 1 << 24) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths in bytes (int64) of the lines that hold more than white space."""
    if os.path.getsize(path) == 0:  # an empty file cannot be mapped
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    data = np.memmap(path, np.uint8, "r")
    starts, lengths = [], []
    begin, size = len(codecs.BOM_UTF8) * (bytes(data[:3]) == codecs.BOM_UTF8), block_bytes
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
        filled = np.bitwise_or.reduceat(_FILLED[block], firsts).astype(bool)
        starts.append(begin + firsts[filled])
        lengths.append((ends - firsts)[filled])
        begin, size = begin + int(ends[-1]) + 1, block_bytes
    return tuple(np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64) for found in (starts, lengths))


def _line_number(path: str, offset: int) -> int:
    """1-based number of the line that starts at `offset`."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 22))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _open_parquet(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(epath.Path(path).open("rb") if "://" in path else pa.OSFile(path), page_checksum_verification=True)


class Parquet(Files):
    """Parquet files; the row groups decoded last stay in memory, up to 256 MiB (write small row groups for random access)."""

    kind = "parquet"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self._groups: list[list[int]] = []  # cumulative rows of each file's row groups
        self._columns: list[list[str]] = []
        self._fresh()
        super().__init__(spec, paths, root, columns)

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._decoded: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def _reader(self, path: str) -> pq.ParquetFile:
        with reading(path, unreadable(path, "Parquet file")):
            return handle(_open_parquet, path, self._key)

    def _open(self, path: str) -> int:
        reader = self._reader(path)
        names = leaves(reader.schema_arrow)
        for option, name in (("text", self.columns.text), ("origin", self.columns.origin)):
            require(
                not name or name in names,
                f"{path}: no column {name!r} ({option}){nearest(name, names)}; columns: {', '.join(names)}",
            )
        metadata = reader.metadata
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._groups.append(list(itertools.accumulate(rows, initial=0)))
        self._columns.append(list(dict.fromkeys(names.values())))
        return metadata.num_rows

    def __getitem__(self, i: int) -> Document:
        file, row = self.locate(i)
        starts = self._groups[file]
        group = bisect.bisect_right(starts, row) - 1
        return self.document(cells(self._table(file, group), row - starts[group]), i)

    def _table(self, file: int, group: int) -> pa.Table:
        path = self.paths[file]
        with self._lock:
            if (file, group) in self._decoded:
                self._decoded.move_to_end((file, group))
                return self._decoded[file, group]
            reader = self._reader(path)
            with reading(path, lambda reason: BadRecord(f"{path}, row group {group}: cannot be decoded ({reason})")):
                try:
                    table = flat(reader.read_row_group(group, columns=self._columns[file]))
                except pa.ArrowNotImplementedError as error:
                    raise UserError(f"{path}: {first_line(error)}; write it again in a form that pyarrow reads") from None
            self._decoded[file, group] = table
            while len(self._decoded) > 1 and sum(t.nbytes for t in self._decoded.values()) > _DECODED_BYTES:
                self._decoded.popitem(last=False)
            return table

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_decoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()


class ArrayRecord(Files):
    """ArrayRecord files whose records are UTF-8 JSON objects."""

    kind = "arrayrecord"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self._records = ArrayRecords((path, 0, None) for path in paths)
        super().__init__(spec, paths, root, columns)

    def _open(self, path: str) -> int:
        return self._records.parts[self.paths.index(path)][2]

    def __getitem__(self, i: int) -> Document:
        file, _ = self.locate(i)
        with reading(self.paths[file], lambda reason: BadRecord(f"{self.where(i)}: cannot be read ({reason})")):
            record = self._records[i]
        return self.parsed(record, i)


def unreadable(path: str, kind: str) -> Callable[[str], UserError]:
    """For `reading`: the error of a file that is no `kind`."""
    return lambda reason: UserError(f"{path}: not a readable {kind} ({reason}); write it again")
