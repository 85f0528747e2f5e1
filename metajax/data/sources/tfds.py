"""Text datasets of TensorFlow Datasets, prepared as ArrayRecord files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from metajax.core.array_records import ArrayRecords
from metajax.core.errors import UserError, first_line, nearest, require
from metajax.data.documents import BadRecord, Document, Source
from metajax.data.sources import source
from metajax.data.sources.files import Request, attempt, file_entry, fingerprint, to_documents
from metajax.data.sources.values import flatten


@source("tfds")
class TfdsText(Source):
    """tfds:NAME[/CONFIG][:VERSION][@SPLIT]: a text dataset prepared in a random-access format, read without TensorFlow."""

    def __init__(self, request: Request):
        import tensorflow_datasets as tfds  # imported here: it is slow to import, and only this source needs it
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from tensorflow_datasets.core.data_sources.base import file_instructions

        request.require_path("tfds:NAME[/CONFIG][:VERSION][@SPLIT]")
        require(not request.columns.join, f"data source {request.spec!r}: join= is for files; leave it out")
        name, _, split = request.path.partition("@")
        spec, data_dir, split = request.spec, request.data_dir, split or "train"
        self.spec, self.split, self.columns = spec, split, request.columns
        remedy = f"prepare it with tfds.builder({name!r}).download_and_prepare(file_format='array_record')"
        try:
            builder: Any = tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir), try_gcs=False)
        except tfds.core.DatasetNotFoundError:
            folder = f" below {data_dir}" if data_dir is not None else ""
            raise UserError(f"{spec}: no TFDS set {name!r} is prepared{folder} or known; {remedy}") from None
        except ValueError as error:  # an unknown config or version, or an invalid name
            raise UserError(f"{spec}: {first_line(error)} {remedy}") from None
        self._folder, info = os.fspath(builder.data_dir), builder.info
        require(epath.Path(self._folder, "dataset_info.json").exists(), f"{spec}: {self._folder} holds no prepared set; {remedy}")
        splits, base = list(info.splits), re.split(r"[\[+]", split)[0]
        require(base in splits, f"{spec}: unknown split {base!r}{nearest(base, splits)}; splits: {', '.join(splits)}")
        self.columns.check(list(flatten(info.features)), spec, "feature")
        try:
            self._records = builder.as_data_source(split=split)
        except NotImplementedError:
            raise UserError(f"{spec}: {self._folder} is in a format without random access; {remedy}") from None
        except ValueError as error:  # a slice that cannot be read
            raise UserError(f"{spec}: {first_line(error)}") from None
        if isinstance(self._records.data_source, ArrayRecordDataSource):  # it would keep every shard open
            parts = file_instructions(info, tfds.Split(split))
            self._records.data_source = ArrayRecords((os.fspath(part.filename), part.skip, part.take) for part in parts)
        self._shards = [os.fspath(path) for path in info.splits[base].filepaths]
        self._version = str(info.full_name)
        require(len(self._records) > 0, f"{spec}: no records in split {split!r}; name another split")

    def __len__(self) -> int:
        return len(self._records)

    def where(self, record: int) -> str:
        return f"{self._folder} ({self.split}), record {record}"

    def read(self, records: range) -> Iterator[Document | BadRecord]:
        places = ((i, self.where(i)) for i in records)
        rows = ((where, attempt(self._records.__getitem__, i, where, f"{where}: cannot be read")) for i, where in places)
        return to_documents(rows, self.columns, self.tally)

    def fingerprint(self) -> str:
        """sha256 over name, version, split, columns and each shard's name, size, modification time and content hash."""
        names = [os.path.basename(path) for path in self._shards]
        return fingerprint(f"tfds {self._version} {self.split} {self.columns}", names, self._shards)

    def manifest(self) -> dict[str, Any]:
        """Kind, version, split, records and the shards; the sha256 of each file is computed now."""
        described = [os.path.join(self._folder, name) for name in ("dataset_info.json", "features.json")]
        return super().manifest() | {
            "versions": {"tfds": self._version},
            "split": self.split,
            "files": [file_entry(path) for path in (*described, *self._shards)],
        }
