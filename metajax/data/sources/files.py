"""Corpora of files: the base class of all file formats, and the rules that turn a row into a Document."""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import os
import re
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
from etils import epath
from fsspec.core import url_to_fs

from metajax.core import json_lines
from metajax.core.errors import UserError, nearest, require
from metajax.data.addresses import parts
from metajax.data.documents import BadRecord, Document, Source
from metajax.data.sources.values import as_string, as_text, flatten, why

_HASHED_OF_FILE, _HASHED_OF_ALL = 64 << 20, 1 << 30  # bytes read to notice that files have changed
ADDRESSES = ("url", "uri", "warc-target-uri", "source_url")  # columns of a document's address, also nested, in any letter case
NO_ORIGIN, NO_TEXT, JOINED = "no origin", "no text: ", "joined"  # what a source's tally counts


@dataclass(frozen=True)
class Columns:
    """The columns of the text and the origin; '' as origin means the rule of `to_document`. A dotted name is a nested column.

    join: a folder with label files, '' for none; on: the id column that documents and labels share. markers: whether control
    tokens spelled in the text are read as control tokens, as for the turn markers of a chat.
    """

    text: str = "text"
    origin: str = ""
    join: str = field(default="", repr=False)  # repr=False: not part of the files' fingerprint
    on: str = field(default="id", repr=False)
    rules: int = field(default=2, init=False)  # part of every fingerprint: raise it when rows give other documents
    markers: bool = field(default=False, repr=False)  # changes the tokens, not the files


def to_document(row: Mapping[str, Any], columns: Columns, where: str, tally: Counter[str] | None = None) -> Document:
    """A row as a Document; raises BadRecord with a message that starts with `where` (file and record).

    Metadata is every other column as a string, nested ones by dotted names. Missing values, lists and values that cannot be text
    are left out. The origin is the requested column, else a column named `origin`, else the host of the first address column,
    else a digest of the text. If the origin is an address, its host is used.

    tally: counts documents without an origin (NO_ORIGIN) and, by column, values that cannot be text (NO_TEXT and its name).
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
    """The value of a column, or the host of an address; '' if there is neither."""
    if named := strings.get(column, ""):
        return (named.lower().startswith(("http://", "https://")) and host(named)) or named
    addresses = sorted((rank, name) for name in metadata if (rank := _address_rank(name)) is not None)
    return next(filter(None, (host(metadata[name]) for _, name in addresses)), "")


@lru_cache(maxsize=1 << 12)
def _address_rank(name: str) -> tuple[int, int] | None:
    """The priority of a column that holds a document's address, by its name; None for other columns."""
    last = name.rpartition(".")[2].casefold()
    return (name.count("."), ADDRESSES.index(last)) if last in ADDRESSES else None


def host(url: str) -> str:
    """The host of an address with or without a scheme; '' if there is none."""
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
    """Size, modification time (ns for local files) and a hash of each file, to detect changes.

    The hash covers the whole content of small files, and blocks from the beginning to the end of large ones. It reads at most
    64 MiB per file and 1 GiB in total, but at least 64 KiB per file. For a bucket it is the stored hash of the object.
    """
    share = min(_HASHED_OF_FILE, max(_HASHED_OF_ALL // max(1, len(paths)), 1 << 16))
    return [file_stamp(path, share) for path in paths]


def file_stamp(path: str, share: int = _HASHED_OF_FILE) -> str:
    """`file_stamps` of one file; reads at most `share` bytes of it."""
    if "://" in path:
        system, name = url_to_fs(path)
        info = system.info(name)
        hashes = (str(info[key]) for key in ("crc32c", "md5Hash", "ETag", "etag") if info.get(key))
        return f"{info['size']} {epath.Path(path).stat().mtime} {next(hashes, '')}"
    stat, now = os.stat(path), time.time_ns()
    fresh = now if now - stat.st_ctime_ns < 1e9 else 0  # two quick writes may have the same time
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, fresh)  # equal: not written since it was read
    return f"{stat.st_size} {stat.st_mtime_ns} {_sampled(path, share, state)}"


@lru_cache(1 << 16)
def _sampled(path: str, share: int, state: tuple[int, ...]) -> str:
    """sha256 of a local file. Above `share` bytes, it covers evenly spaced blocks, including the first and the last."""
    size = state[0]
    blocks = min(16, max(2, share >> 20))
    length = share // blocks if size > share else size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in np.linspace(0, size - length, blocks if size > share else 1).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


class Files(Source):
    """Records of one or more files, numbered across the files in the given order; raises UserError if there are none.

    tally: the counts of `to_document`, over all documents read so far in this process.
    """

    kind: ClassVar[str]

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self.spec, self.paths, self.root, self.columns = spec, tuple(paths), root, columns

    @abstractmethod
    def _count(self, path: str) -> int:
        """Number of records of a file."""

    @abstractmethod
    def _rows(self, path: str, records: range) -> Iterator[tuple[str, Mapping[str, Any] | BadRecord]]:
        """(file and record, for messages; the row or its error) of these records of a file."""

    @cached_property
    def _starts(self) -> list[int]:
        starts = list(itertools.accumulate(map(self._count, self.paths), initial=0))
        require(starts[-1] > 0, f"{', '.join(self.paths)}: no records; {self.kind} data needs at least one")
        return starts

    def __len__(self) -> int:
        return self._starts[-1]

    def by_file(self, records: range) -> Iterator[tuple[int, range]]:
        """(number of a file, range of its records) in order."""
        at = records.start
        while at < records.stop:
            file = bisect.bisect_right(self._starts, at) - 1
            start, end = self._starts[file], min(records.stop, self._starts[file + 1])
            part = range(at - start, end - start, records.step)
            yield file, part
            at += len(part) * records.step

    def read(self, records: range) -> Iterator[Document | BadRecord]:
        for file, part in self.by_file(records):
            for where, row in self._rows(self.paths[file], part):
                try:
                    yield row if isinstance(row, BadRecord) else to_document(row, self.columns, where, self.tally)
                except BadRecord as error:
                    yield error

    def where(self, record: int) -> str:
        [(file, part)] = self.by_file(range(record, record + 1))
        [(where, _)] = self._rows(self.paths[file], part)
        return where

    def fingerprint(self) -> str:
        """sha256 over the columns and each file's path below the data directory, size, modification time and content hash."""
        digest = hashlib.sha256(f"{self.kind} {self.columns}\n".encode())
        for path, stamp in zip(self.paths, file_stamps(self.paths), strict=True):
            digest.update(f"{path.removeprefix(self.root)} {stamp}\n".encode())
        return digest.hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Kind, spec, records and files; the sha256 of each file is computed now."""
        return super().manifest() | {"files": [file_entry(path) for path in self.paths]}


def parsed(line: bytes, where: str, text: str) -> tuple[str, Mapping[str, Any] | BadRecord]:
    """The item of `Files._rows` for a JSON record; `text` is the name of the text column."""
    try:
        row = json_lines.parse(line)
    except ValueError as error:
        return where, BadRecord(f"{where}: {error}")
    if not isinstance(row, dict):
        return where, BadRecord(f"{where}: a JSON {type(row).__name__}, not an object with a {text!r} field")
    return where, row


def find_files(spec: str, path: str, root: str) -> list[str]:
    """The file at `path`, or the sorted files of a glob, below `root` unless absolute; raises UserError if there are none.

    Only `path` is a pattern, and only if no file has that name.
    """
    whole = path if "://" in path else os.path.join(root, path)
    if not glob.has_magic(path) or epath.Path(whole).exists():
        found = [whole] if epath.Path(whole).is_file() else []
    elif "://" in whole:
        base, pattern = re.fullmatch(r"(.*?://[^/]*)/?(.*)", path).groups() if "://" in path else (glob.escape(root), path)
        found = [os.fspath(p) for p in epath.Path(base).glob(pattern)]
    else:
        found = [os.path.join(root, match) for match in glob.glob(path, root_dir=root, recursive=True)]
        found = [p for p in found if os.path.isfile(p)]
    require(bool(found), f"{whole}: no such file; {spec!r} looks below {root} (set the data directory, or give a full path)")
    return sorted(found)


def unreadable(path: str, kind: str) -> Callable[[str], UserError]:
    """For `reading`: makes the error for a file that is no `kind`."""
    return lambda reason: UserError(f"{path}: not a readable {kind} ({reason}); write it again")
