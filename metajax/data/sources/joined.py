"""Joins columns of other files to documents by id, for example labels that a classifier has written for the shards of a corpus.

Every corpus file has its own Parquet file of labels, at the same path below another folder. So only one shard's labels are
in memory at a time, however large the corpus is.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.parquet as pq
from etils import epath

from metajax.core.errors import nearest, require
from metajax.core.reading import reading
from metajax.data.cache import read_documents
from metajax.data.documents import BadRecord, Document, Source
from metajax.data.sources.files import JOINED, Files, Request, file_entry, file_stamps, split, unreadable
from metajax.data.sources.values import as_string, cells, flat

Labels = dict[str, dict[str, str]]  # id -> its row
_FRACTION = re.compile(r"-?[0-9]+\.[0-9]+")
_ENDINGS = r"(\.(jsonl?|parquet|array_?record))?(\.(gz|bz2|zst))?$"


class Joined(Source):
    """A corpus of files whose documents also have the label columns of the row with their id, if there is one.

    Ids are equal if their texts or their values are equal: 3, 3.0 and "3" are one id. The tally counts documents with labels.

    Raises UserError if a label file is missing or unreadable, lacks the id column, or has an id twice. A document without an id,
    or with a column that the labels have too, is a bad record.
    """

    def __init__(self, corpus: Files, request: Request):
        """A corpus file's path after the glob-free start of the request's path is that of its labels in `join`."""
        self.corpus, self.spec, self.on, self.tally = corpus, corpus.spec, request.columns.on, corpus.tally
        is_one = corpus.paths == [os.path.join(corpus.root, request.path)]
        fixed = "/".join(itertools.takewhile(lambda part: is_one or not glob.has_magic(part), request.path.split("/")[:-1]))
        start, folder = os.path.join(corpus.root, fixed, ""), os.path.join(corpus.root, request.columns.join)
        names = [re.sub(_ENDINGS, ".parquet", path.removeprefix(start), count=1) for path in corpus.paths]
        self.labels = [os.path.join(folder, name) for name in names]
        for path, labels in zip(corpus.paths, self.labels, strict=True):
            require(epath.Path(labels).exists(), f"{labels}: no such file; {self.spec!r} looks for the labels of {path} there")

    def __len__(self) -> int:
        return len(self.corpus)

    def where(self, record: int) -> str:
        return self.corpus.where(record)

    def read(self, records: range) -> Iterator[Document | BadRecord]:
        documents = self.corpus.read(records)
        for file, part in split(records, self.corpus.starts):
            labels_of = _labels(self.labels[file], self.on)
            for record, document in zip(part, documents, strict=False):
                where = f"{self.corpus.paths[file]}, record {record}"
                yield document if isinstance(document, BadRecord) else self._joined(document, labels_of, where)

    def _joined(self, document: Document, labels_of: Callable[[str], dict[str, str] | None], where: str) -> Document | BadRecord:
        if self.on not in document.metadata:
            return BadRecord(f"{where}: no value in column {self.on!r}, by which labels are joined")
        labels = labels_of(document.metadata[self.on])
        self.tally[JOINED] += labels is not None
        both = sorted((labels or {}).keys() & document.metadata.keys())
        if both:
            return BadRecord(f"{where}: column {both[0]!r} is in the labels, too; rename it there")
        return Document(document.text, document.metadata | (labels or {}), document.origin)

    def fingerprint(self) -> str:
        """sha256 over the corpus' fingerprint and each label file's size, modification time and content hash."""
        stamps = file_stamps(self.labels)
        return hashlib.sha256(f"{self.corpus.fingerprint()} {self.on} {stamps}".encode()).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """The corpus' manifest plus the label files; the sha256 of each file is computed now."""
        joined = {"on": self.on, "files": [file_entry(path) for path in self.labels], "ids": self.ids()}
        return self.corpus.manifest() | {"fingerprint": self.fingerprint(), "joined": joined}

    def ids(self) -> str:
        """A sentence with an example id of the documents and one of the labels."""
        keys = (found.metadata.get(self.on) for _, found in read_documents(self.corpus, "skip") if found is not None)
        return f"documents have {self.on} = {next(keys, None)!r}, labels {next(iter(_read(self.labels[0], self.on)), None)!r}"


def _labels(path: str, on: str) -> Callable[[str], dict[str, str] | None]:
    """A function from an id to its row in a label file; None if there is no row."""
    rows = _read(path, on)
    counts = Counter(map(_value, rows))
    by_value = {_value(key): row for key, row in rows.items() if counts[_value(key)] == 1}
    return lambda key: rows[key] if key in rows else by_value.get(_value(key))


def _value(key: str) -> str:
    """A text that is the same for equal numbers. A whole float is written with all digits, not the shortest that round-trip."""
    if not _FRACTION.fullmatch(key):
        return key
    return str(int(float(key))) if key.endswith(".0") and len(key) < 300 else key.rstrip("0").rstrip(".")


def _read(path: str, on: str) -> Labels:
    with reading(path, unreadable(path, "Parquet file")), epath.Path(path).open("rb") as file:
        table = flat(pq.read_table(file))
    names = table.column_names
    require(on in names, f"{path}: no column {on!r} to join by{nearest(on, names)}; columns: {', '.join(names)}")
    rows, count = {}, 0
    for n in range(table.num_rows):
        strings = {name: _text(value) for name, value in cells(table, n).items()}
        if key := strings.pop(on):
            rows[key] = {name: text for name, text in strings.items() if text}
            count += 1
    require(len(rows) == count, f"{path}: an id occurs twice in column {on!r}; keep one row of each")
    return rows


def _text(value: Any) -> str:
    try:
        return as_string(value)
    except UnicodeError:  # left out, as in `to_document`
        return ""
