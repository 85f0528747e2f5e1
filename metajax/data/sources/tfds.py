"""Text datasets of TensorFlow Datasets, prepared as ArrayRecord files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from metajax.core.array_records import ArrayRecords
from metajax.core.errors import UserError, nearest, require
from metajax.core.reading import reading
from metajax.data.documents import BadRecord, Document, Source
from metajax.data.sources import Request, source
from metajax.data.sources.files import Columns, file_entry, file_stamps, to_document


def leaves_of(features: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the features of a dataset, dotted if nested."""
    names: list[str] = []
    for name, feature in features.items():
        names += leaves_of(feature, f"{prefix}{name}.") if hasattr(feature, "items") else [prefix + name]
    return names


@source("tfds")
def open_tfds(request: Request) -> TfdsText:
    """tfds:NAME[/CONFIG][:VERSION][@SPLIT]."""
    request.require_path("tfds:NAME[/CONFIG][:VERSION][@SPLIT]")
    require(not request.columns.join, f"data source {request.spec!r}: join= is for files; tfds has a set's columns alone")
    return TfdsText(request.spec, request.path, request.data_dir, request.columns)


class TfdsText(Source):
    """A text dataset of TensorFlow Datasets, prepared in a random-access format and read without TensorFlow."""

    def __init__(self, spec: str, path: str, data_dir: Path | None, columns: Columns):
        import tensorflow_datasets as tfds  # imported here: it is slow to import, and only this source needs it
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
        except ValueError as error:  # an unknown config or version, or an invalid name
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
        self._version = str(builder.info.full_name)
        require(len(self._records) > 0, f"{spec}: no records in split {self.split!r}; name another split")

    def __len__(self) -> int:
        return len(self._records)

    def read(self, records: range) -> Iterator[Document | BadRecord]:
        for i in records:
            where = f"{self._folder} ({self.split}), record {i}"
            try:
                with reading(where, lambda reason, where=where: BadRecord(f"{where}: cannot be read ({reason})")):
                    row = self._records[i]
                yield to_document(row, self.columns, where, self.tally)
            except BadRecord as error:
                yield error

    def fingerprint(self) -> str:
        """sha256 over name, version, split, columns and each shard's name, size, modification time and content hash."""
        digest = hashlib.sha256(f"tfds {self._version} {self.split} {self.columns}\n".encode())
        for path, stamp in zip(self._shards, file_stamps(self._shards), strict=True):
            digest.update(f"{os.path.basename(path)} {stamp}\n".encode())
        return digest.hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Kind, version, split, records and the shards; the sha256 of each file is computed now."""
        described = [os.path.join(self._folder, name) for name in ("dataset_info.json", "features.json")]
        return super().manifest() | {
            "versions": {"tfds": self._version},
            "split": self.split,
            "files": [file_entry(path) for path in (*described, *self._shards)],
        }
