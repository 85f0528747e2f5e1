"""Columns of other files joined to documents by their id: labels that a classifier has written for the shards of a corpus.

Every file of the corpus has a Parquet file of labels of its own, at the same place below another folder, so that however large the corpus is, one shard's
labels are in memory at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
from etils import epath

from metajax.core.errors import nearest, require
from metajax.core.reading import reading
from metajax.data.cache import read_documents
from metajax.data.documents import BadRecord, Document
from metajax.data.sources.files import JOINED, Files, file_entry, file_stamps, unreadable
from metajax.data.sources.values import as_string, cells, flat

Labels = dict[str, dict[str, str]]  # id -> its row
_FRACTION = re.compile(r"-?[0-9]+\.[0-9]+")
_ENDINGS = r"(\.(jsonl?|parquet|array_?record))?(\.(gz|bz2|zst))?$"


class Joined:
    """A corpus of files whose documents also have the columns of the label file's row with their id, where there is one.

    Ids are the same when their text is, or else their value: 3, 3.0 and "3" are one id. The tally counts the documents that have labels.

    Raises UserError where a file of labels is missing or cannot be read, lacks the column of ids, or has an id twice; BadRecord where a document
    has no id, or a column that the labels have too.
    """

    def __init__(self, corpus: Files, start: str, folder: str, on: str):
        """start: the folder below which a corpus file and its labels, below `folder`, have the same name."""
        self.corpus, self.spec, self.on = corpus, corpus.spec, on
        names = [re.sub(_ENDINGS, ".parquet", path.removeprefix(start), count=1) for path in corpus.paths]
        self.labels = tuple(os.path.join(folder, name) for name in names)
        for path, labels in zip(corpus.paths, self.labels, strict=True):
            require(epath.Path(labels).exists(), f"{labels}: no such file; {self.spec!r} looks for the labels of {path} there")
        self._fresh()

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._file, self._rows, self._by_value = -1, {}, {}

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, i: int) -> Document:
        document = self.corpus[i]
        file, row = self.corpus.locate(i)
        where = f"{self.corpus.paths[file]}, record {row}"
        if self.on not in document.metadata:
            raise BadRecord(f"{where}: no value in column {self.on!r}, by which labels are joined")
        with self._lock:
            labels = self._labels(file, document.metadata[self.on])
        self.tally[JOINED] += labels is not None
        labels = labels or {}
        both = sorted(labels.keys() & document.metadata.keys())
        if both:
            raise BadRecord(f"{where}: column {both[0]!r} is in the labels, too; rename it there")
        return Document(document.text, document.metadata | labels, document.origin)

    def where(self, i: int) -> str:
        """File and record of record i, as messages name them."""
        return self.corpus.where(i)

    @property
    def tally(self) -> Counter[str]:
        """That of the corpus, with the documents that have labels."""
        return self.corpus.tally

    def _labels(self, file: int, key: str) -> dict[str, str] | None:
        """The row of an id, of the labels of that file; None where it has none."""
        if file != self._file:
            self._file, self._rows = file, _read(self.labels[file], self.on)
            values = Counter(map(_value, self._rows))
            self._by_value = {value: self._rows[k] for k in self._rows if values[value := _value(k)] == 1}
        return self._rows[key] if key in self._rows else self._by_value.get(_value(key))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_file", "_rows", "_by_value")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def fingerprint(self) -> str:
        """sha256 over the corpus' fingerprint and each label file's size, modification time and hash of its content."""
        stamps = file_stamps(self.labels)
        return hashlib.sha256(f"{self.corpus.fingerprint()} {self.on} {stamps}".encode()).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """The corpus' manifest with the files of labels; the sha256 of each file is computed now."""
        joined = {"on": self.on, "files": [file_entry(path) for path in self.labels], "ids": self.ids()}
        return self.corpus.manifest() | {"fingerprint": self.fingerprint(), "joined": joined}

    def ids(self) -> str:
        """An id of the documents and one of the labels, in words."""
        keys = (found.metadata.get(self.on) for _, found in read_documents(self.corpus, "skip") if found is not None)
        rows = _read(self.labels[0], self.on)
        return f"documents have {self.on} = {next(keys, None)!r}, labels {next(iter(rows), None)!r}"


def _value(key: str) -> str:
    """The same text for the same number; a whole float stands for all of its digits, not for the shortest that tell it from others."""
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
    require(len(rows) == count, f"{path}: an id stands twice in column {on!r}; keep one row of each")
    return rows


def _text(value: Any) -> str:
    try:
        return as_string(value)
    except UnicodeError:  # it cannot be text, as in `to_document`
        return ""
