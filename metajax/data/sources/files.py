"""Corpora of files: the base class of all file formats, and the rules that turn a row into a Document."""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import os
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from fsspec.core import url_to_fs

from metajax.core import json_lines
from metajax.core.errors import UserError, nearest, require
from metajax.core.reading import reading
from metajax.data.addresses import parts
from metajax.data.documents import BadRecord, Document, Source
from metajax.data.sources.values import as_string, as_text, flatten

_HASHED_OF_FILE, _HASHED_OF_ALL = 64 << 20, 1 << 30  # bytes read to notice that files have changed
ADDRESSES = ("url", "uri", "warc-target-uri", "source_url")  # columns of a document's address, also nested, in any letter case
NO_ORIGIN, NO_TEXT, JOINED = "no origin", "no text: ", "joined"  # what a source's tally counts
Row = tuple[str, Mapping[str, Any] | bytes | BadRecord]  # file and record, for messages; columns, JSON, or an error


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

    def check(self, names: Sequence[str], where: str, word: str) -> None:
        """Raise UserError unless `names` has the columns of the text and the origin. word: what the format calls a column."""
        for option, name in (("text", self.text), ("origin", self.origin)):
            known = not name or name in names
            require(known, f"{where}: no {word} {name!r} ({option}){nearest(name, names)}; {word}s: {', '.join(names)}")


@dataclass(frozen=True)
class Request:
    """A parsed spec and the folders of this machine. PATH is relative to `data_dir`, or without it to the working directory."""

    spec: str
    kind: str
    path: str
    columns: Columns
    has_options: bool = False
    cache_dir: Path = Path("cache")
    data_dir: Path | None = None

    @property
    def root(self) -> str:
        """The folder that PATH is relative to, with a trailing slash."""
        return os.fspath(self.data_dir or os.getcwd()).rstrip("/") + "/"

    def files(self) -> list[str]:
        """The files of PATH, which may be a glob; raises UserError if there are none."""
        self.require_path(f"{self.kind}:PATH")
        return find_files(self.spec, self.path, self.root)

    def require_path(self, form: str) -> None:
        """Raise UserError if the path is missing; `form` shows how to write one."""
        require(bool(self.path), f"data source {self.spec!r}: a path is missing; write {form}")

    def refuse_options(self) -> None:
        """Raise UserError if there are options, for a kind with fixed columns."""
        message = f"data source {self.spec!r}: {self.kind} has columns of its own; leave out what follows the ?"
        require(not self.has_options, message)


class Files(Source):
    """Records of one or more files, numbered across the files in the given order; raises UserError if there are none.

    tally: the counts of `to_document`, over all documents read so far in this process.
    """

    def __init__(self, request: Request):
        self.spec, self.kind, self.root, self.columns = request.spec, request.kind, request.root, request.columns
        self.paths = request.files()

    @abstractmethod
    def _count(self, path: str) -> int:
        """Number of records of a file."""

    @abstractmethod
    def _rows(self, path: str, records: range) -> Iterator[Row]:
        """These records of a file."""

    @cached_property
    def starts(self) -> list[int]:
        """The first record of every file, and the number of all records."""
        starts = list(itertools.accumulate(map(self._count, self.paths), initial=0))
        require(starts[-1] > 0, f"{', '.join(self.paths)}: no records; {self.kind} data needs at least one")
        return starts

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, records: range) -> Iterator[Document | BadRecord]:
        for file, part in split(records, self.starts):
            yield from to_documents(self._rows(self.paths[file], part), self.columns, self.tally)

    def where(self, record: int) -> str:
        [(file, part)] = split(range(record, record + 1), self.starts)
        [(where, _)] = self._rows(self.paths[file], part)
        return where

    def fingerprint(self) -> str:
        """sha256 over the columns and each file's path below the data directory, size, modification time and content hash."""
        names = [path.removeprefix(self.root) for path in self.paths]
        return fingerprint(f"{self.kind} {self.columns}", names, self.paths)

    def manifest(self) -> dict[str, Any]:
        """Kind, spec, records and files; the sha256 of each file is computed now."""
        return super().manifest() | {"files": [file_entry(path) for path in self.paths]}


def split(records: range, starts: Sequence[int]) -> Iterator[tuple[int, range]]:
    """(number of a part, range of its records) in order, for parts with these first records; the last entry is the end."""
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        part = records[bisect.bisect_left(records, start) : bisect.bisect_left(records, end)]
        if part:
            yield number, range(part.start - start, part.stop - start, part.step)


def find_files(spec: str, path: str, root: str) -> list[str]:
    """The file at `path`, or the sorted files of a glob, below `root` unless absolute; raises UserError if there are none.

    Only `path` is a pattern, and only if no file has that name.
    """
    whole = path if "://" in path else os.path.join(root, path)
    if not glob.has_magic(path) or epath.Path(whole).exists():
        found = [whole] if epath.Path(whole).is_file() else []
    elif "://" in whole:
        base, pattern = glob.escape(root), path
        if "://" in path:
            pattern = path.partition("://")[2].partition("/")[2]
            base = path.removesuffix(f"/{pattern}")
        found = [os.fspath(p) for p in epath.Path(base).glob(pattern)]
    else:
        found = [os.path.join(root, match) for match in glob.glob(path, root_dir=root, recursive=True)]
        found = [p for p in found if os.path.isfile(p)]
    require(bool(found), f"{whole}: no such file; {spec!r} looks below {root} (set the data directory, or give a full path)")
    return sorted(found)


def unreadable(path: str, kind: str) -> Callable[[str], UserError]:
    """For `reading`: makes the error for a file that is no `kind`."""
    return lambda reason: UserError(f"{path}: not a readable {kind} ({reason}); write it again")


def attempt(read: Callable[..., Any], argument: Any, path: str, failed: str) -> Any:
    """read(argument), or a BadRecord that begins with `failed` if this part of the file is damaged."""
    try:
        with reading(path, lambda reason: BadRecord(f"{failed} ({reason})")):
            return read(argument)
    except BadRecord as error:
        return error


# ----------------------------------------------------------------------------------------------------- documents


def to_documents(rows: Iterable[Row], columns: Columns, tally: Counter[str]) -> Iterator[Document | BadRecord]:
    """The document of each row, or its error."""
    for where, row in rows:
        try:
            if isinstance(row, BadRecord):
                raise row
            yield to_document(_json_object(row, columns, where) if isinstance(row, bytes) else row, columns, where, tally)
        except BadRecord as error:
            yield error


def _json_object(line: bytes, columns: Columns, where: str) -> Mapping[str, Any]:
    try:
        row = json_lines.parse(line)
    except ValueError as error:
        raise BadRecord(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise BadRecord(f"{where}: a JSON {type(row).__name__}, not an object with a {columns.text!r} field")
    return row


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
    if not isinstance(row[columns.text], (str, bytes)):
        raise BadRecord(f"{where}: column {columns.text!r} is {type(row[columns.text]).__name__}, not text")
    strings = {}
    for name, value in row.items():
        try:
            strings[name] = as_text(value) if name == columns.text else as_string(value)
        except UnicodeError as error:
            if name in (columns.text, columns.origin):
                raise BadRecord(f"{where}: column {name!r} {error}") from None
            tally[NO_TEXT + name] += 1
    text = strings[columns.text]
    skipped = {columns.text, "origin"} - {columns.origin}
    metadata = {name: string for name, string in strings.items() if string and name not in skipped}
    if columns.origin and columns.origin not in metadata:
        raise BadRecord(f"{where}: no value in column {columns.origin!r}, which origin= names")
    origin = _origin(strings.get(columns.origin or "origin", ""), metadata)
    tally[NO_ORIGIN] += not origin
    return Document(text, metadata, origin or hashlib.sha1(text.encode()).hexdigest())


def _origin(named: str, metadata: Mapping[str, str]) -> str:
    """The named origin, its host if it is an address; without one the host of an address in the metadata, or ''."""
    if named:
        return (named.lower().startswith(("http://", "https://")) and _host(named)) or named
    addresses = sorted((rank, name) for name in metadata if (rank := _address_rank(name)) is not None)
    return next(filter(None, (_host(metadata[name]) for _, name in addresses)), "")


@lru_cache(maxsize=1 << 12)
def _address_rank(name: str) -> tuple[int, int] | None:
    """The priority of a column that holds a document's address, by its name; None for other columns."""
    last = name.rpartition(".")[2].casefold()
    return (name.count("."), ADDRESSES.index(last)) if last in ADDRESSES else None


def _host(url: str) -> str:
    found = parts(url)
    return found[1] if found else ""


# ------------------------------------------------------------------------------------------------------- content


def file_entry(path: str) -> dict[str, Any]:
    """Path, bytes and sha256 of a file, for a manifest."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return {"path": path, "bytes": file.tell(), "sha256": digest.hexdigest()}


def fingerprint(head: str, names: Sequence[str], paths: Sequence[str]) -> str:
    """sha256 over a line and each file's name and stamp."""
    lines = [f"{name} {stamp}" for name, stamp in zip(names, file_stamps(paths), strict=True)]
    return hashlib.sha256("".join(f"{line}\n" for line in (head, *lines)).encode()).hexdigest()


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
    blocks = min(16, max(2, share >> 20)) if size > share else 1
    length = share // blocks if size > share else size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in np.linspace(0, size - length, blocks).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()
