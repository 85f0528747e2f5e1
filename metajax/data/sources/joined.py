"""Columns of other files joined to documents by their id: labels that a classifier has written for the shards of a corpus.

Every file of the corpus has a Parquet file of labels of its own, at the same place below another folder, so that however large the corpus is, one shard's
labels are in memory at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from metajax.config import UserError, nearest, require
from metajax.data.documents import BadRecord, Document
from metajax.data.sources.files import Files, as_string, file_entry, file_stamps, first_line

Labels = dict[str, dict[str, str]]  # id -> its row
_ENDINGS = r"(\.(jsonl?|parquet|array_?record))?(\.(gz|bz2|zst))?$"


class Joined:
    """A corpus of files whose documents also have the columns of the label file's row with their id, where there is one.

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
        self._file, self._rows = -1, {}

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, i: int) -> Document:
        document = self.corpus[i]
        file, row = self.corpus.locate(i)
        where = f"{self.corpus.paths[file]}, record {row}"
        if self.on not in document.metadata:
            raise BadRecord(f"{where}: no value in column {self.on!r}, by which labels are joined")
        with self._lock:
            if file != self._file:
                self._file, self._rows = file, _read(self.labels[file], self.on)
            labels = self._rows.get(document.metadata[self.on], {})
        both = sorted(labels.keys() & document.metadata.keys())
        if both:
            raise BadRecord(f"{where}: column {both[0]!r} is in the labels, too; rename it there")
        return Document(document.text, document.metadata | labels, document.origin)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_file", "_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def fingerprint(self) -> str:
        """sha256 over the corpus' fingerprint and each label file's size, modification time and hash of its content."""
        stamps = file_stamps(self.labels)
        return hashlib.sha256(f"{self.corpus.fingerprint()} {self.on} {stamps}".encode()).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """The corpus' manifest with the files of labels; the sha256 of each file is computed now."""
        joined = {"on": self.on, "files": [file_entry(path) for path in self.labels]}
        return self.corpus.manifest() | {"fingerprint": self.fingerprint(), "joined": joined}


def _read(path: str, on: str) -> Labels:
    try:
        with epath.Path(path).open("rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)}); write it again") from None
    names = table.column_names
    require(on in names, f"{path}: no column {on!r} to join by{nearest(on, names)}; columns: {', '.join(names)}")
    rows = {}
    for row in table.to_pylist():
        strings = {name: as_string(value, f"{path}: column {name!r}") for name, value in row.items()}
        key = strings.pop(on)
        rows[key] = {name: text for name, text in strings.items() if text}
    require(len(rows) == table.num_rows, f"{path}: an id stands twice in column {on!r}; keep one row of each")
    return rows
