"""From a source's spec, KIND[:PATH][?text=COLUMN&origin=COLUMN&join=FOLDER&on=COLUMN&markers=true], to a Source."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from etils import epath

from metajax.core.array_records import ArrayRecords
from metajax.core.errors import UserError, nearest, require
from metajax.core.json_lines import is_compressed
from metajax.core.reading import reading
from metajax.data.cache import read_documents
from metajax.data.documents import BadRecord, Document, Source, place
from metajax.data.sources.compressed import CompressedLines
from metajax.data.sources.files import (
    JOINED,
    NO_ORIGIN,
    ArrayRecord,
    Columns,
    Files,
    JsonLines,
    Parquet,
    file_entry,
    file_stamps,
    to_document,
)
from metajax.data.sources.joined import Joined

_READERS: Mapping[str, type[Files]] = {"jsonl": JsonLines, "parquet": Parquet, "arrayrecord": ArrayRecord}
KINDS = ("pydocs", "debindex", "generated", *_READERS, "tfds")
_OPTIONS = ("text", "origin", "join", "on", "markers")


def open_source(spec: str, *, cache_dir: Path, data_dir: Path | None) -> Source:
    """The documents that a spec names; UserError for an unknown kind or option, a missing file or an empty corpus.

    PATH is relative to `data_dir`, else to the working directory, and may be a glob for jsonl, parquet and
    arrayrecord. For tfds it is NAME[/CONFIG][:VERSION][@SPLIT]; for pydocs a list of modules joined by +, for
    generated a number of documents.
    """
    kind, path, columns = parse_spec(spec)
    if kind == "pydocs":
        from metajax.data.sources.pydocs import open_pydocs

        return open_pydocs(spec, path, cache_dir)
    if kind == "debindex":
        from metajax.data.sources.debindex import open_debindex

        return open_debindex(spec, cache_dir)
    if kind == "generated":
        from metajax.data.sources.generated import Generated

        return Generated(spec, path)
    if kind == "tfds":
        return TfdsText(spec, path, data_dir, columns)
    root = os.fspath(data_dir) if data_dir is not None else os.getcwd()
    files = find_files(spec, path, root)
    reader = CompressedLines if kind == "jsonl" and any(map(is_compressed, files)) else _READERS[kind]
    root = root.rstrip("/") + "/"
    corpus = reader(spec, files, root, columns)
    if not columns.join:
        return corpus
    is_one = files == [os.path.join(root, path)]
    fixed = "/".join(itertools.takewhile(lambda part: is_one or not glob.has_magic(part), path.split("/")[:-1]))
    return Joined(corpus, os.path.join(root, fixed, ""), os.path.join(root, columns.join), columns.on)


def parse_spec(spec: str) -> tuple[str, str, Columns]:
    """(kind, path, columns) of a spec; UserError for an unknown kind or option, or where a path is missing or unwanted."""
    head, _, query = spec.partition("?")
    kind, _, path = head.partition(":")
    require(kind in KINDS, f"data source {spec!r}: unknown kind {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        require(
            name in _OPTIONS,
            f"data source {spec!r}: unknown option {name!r}{nearest(name, _OPTIONS)}; known: {', '.join(_OPTIONS)}",
        )
        require(bool(value), f"data source {spec!r}: option {name!r} is empty")
    if kind in ("pydocs", "debindex", "generated"):
        require(not query, f"data source {spec!r}: {kind} has columns of its own; leave out ?{query}")
        require(kind != "debindex" or not path, f"data source {spec!r}: debindex takes no path; write just debindex")
    else:
        wanted = "tfds:NAME[/CONFIG][:VERSION][@SPLIT]" if kind == "tfds" else f"{kind}:PATH"
        require(bool(path), f"data source {spec!r}: a path is missing; write {wanted}")
        require(
            kind != "tfds" or not options.get("join"), f"data source {spec!r}: join= is for files; tfds has a set's columns alone"
        )
    said = options.pop("markers", "false").lower()
    require(said in ("true", "false"), f"data source {spec!r}: markers={said} is neither true nor false")
    return kind, path, Columns(**options, markers=said == "true")


def place_of(manifest: Mapping[str, Any], on_bad_record: str, cache_dir: Path, data_dir: Path | None, document: int) -> str:
    """File and record of a document of a token cache, as messages name them; documents are numbered by the good records alone."""
    source = open_source(manifest["source"]["spec"], cache_dir=cache_dir, data_dir=data_dir)
    bad = set(manifest.get("unencodable", ()))
    good = (n for n, found in read_documents(source, on_bad_record) if found is not None and n not in bad)
    return place(source, next(itertools.islice(good, document, None)))


def find_files(spec: str, path: str, root: str) -> list[str]:
    """The file at `path`, or the sorted files of a glob, below `root` unless absolute; UserError when there is none.

    Only `path` is a pattern, and only where no file has that name.
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


def told(spec: str, documents: int, tally: Mapping[str, int], ids: str | None = None) -> list[str]:
    """What a person should know of the documents of a source, a line each. ids: those of documents and labels, where labels are joined."""
    lines, of = [], f"of {documents:,} documents"
    if tally.get(NO_ORIGIN):
        lines.append(
            f"{spec}: {tally[NO_ORIGIN]:,} {of} have no origin: no value in a column `origin` or `url`. Each counts as a site of its own, so that "
            "pages of one site may be on both sides of the split; name the column of the site or its address with ?origin=COLUMN"
        )
    joined = tally.get(JOINED, 0)
    if ids is not None and joined < documents:
        lines.append(f"{spec}: {joined:,} {of} ({joined / documents:.1%}) have labels from join={'' if joined else '; ' + ids}")
    return lines


def leaves_of(features: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the features of a set, dotted where they are nested."""
    names: list[str] = []
    for name, feature in features.items():
        names += leaves_of(feature, f"{prefix}{name}.") if hasattr(feature, "items") else [prefix + name]
    return names


class TfdsText:
    """A text set of TensorFlow Datasets, prepared in a random-access format and read without TensorFlow."""

    def __init__(self, spec: str, path: str, data_dir: Path | None, columns: Columns):
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from tensorflow_datasets.core.data_sources.base import file_instructions

        name, _, split = path.partition("@")
        self.spec, self.name, self.split, self.columns = spec, name, split or "train", columns
        folder = f" below {data_dir}" if data_dir is not None else ""
        remedy = f"prepare it with tfds.builder({name!r}).download_and_prepare(file_format='array_record')"
        try:
            builder = tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir), try_gcs=False)
        except tfds.core.DatasetNotFoundError:
            raise UserError(f"{spec}: no TFDS set {name!r} is prepared{folder} or known; {remedy}") from None
        except ValueError as error:  # an unknown config or version, or a name that is none
            raise UserError(f"{spec}: {str(error).splitlines()[0]} {remedy}") from None
        self._folder = os.fspath(builder.data_dir)
        require(epath.Path(self._folder, "dataset_info.json").exists(), f"{spec}: {self._folder} holds no prepared set; {remedy}")
        splits = list(builder.info.splits)
        base = re.split(r"[\[+]", self.split)[0]
        require(base in splits, f"{spec}: unknown split {base!r}{nearest(base, splits)}; splits: {', '.join(splits)}")
        features = leaves_of(builder.info.features)
        for option, column in (("text", columns.text), ("origin", columns.origin)):
            require(
                not column or column in features,
                f"{spec}: no feature {column!r} ({option}){nearest(column, features)}; features: {', '.join(features)}",
            )
        try:
            self._records = builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise UserError(f"{spec}: {self._folder} is in a format without random access; {remedy}") from None
        except ValueError as error:  # a slice that cannot be read
            raise UserError(f"{spec}: {str(error).splitlines()[0]}") from None
        if isinstance(self._records.data_source, ArrayRecordDataSource):  # it would keep every shard open
            parts = file_instructions(builder.info, self.split)
            self._records.data_source = ArrayRecords((os.fspath(part.filename), part.skip, part.take) for part in parts)
        self._shards = [os.fspath(p) for p in builder.info.splits[base].filepaths]
        self._version, self.tally = str(builder.info.full_name), Counter()
        require(len(self._records) > 0, f"{spec}: no records in split {self.split!r}; name another split")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.spec}")
        where = f"{self._folder} ({self.split}), record {i}"
        with reading(where, lambda reason: BadRecord(f"{where}: cannot be read ({reason})")):
            row = self._records[int(i)]
        return to_document(row, self.columns, where, self.tally)

    def fingerprint(self) -> str:
        """sha256 over name, version, split, columns and each shard's name, size, modification time and hash of its content."""
        digest = hashlib.sha256(f"tfds {self._version} {self.split} {self.columns}\n".encode())
        for path, stamp in zip(self._shards, file_stamps(self._shards), strict=True):
            digest.update(f"{os.path.basename(path)} {stamp}\n".encode())
        return digest.hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Kind, version, split, records and the shards; sha256 of each file is computed now."""
        described = [os.path.join(self._folder, name) for name in ("dataset_info.json", "features.json")]
        return {
            "kind": "tfds",
            "spec": self.spec,
            "versions": {"tfds": self._version},
            "split": self.split,
            "records": len(self),
            "fingerprint": self.fingerprint(),
            "files": [file_entry(path) for path in (*described, *self._shards)],
        }
