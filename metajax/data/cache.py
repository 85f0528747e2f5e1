"""The tokenised corpus: the body ids of every document, keyed only by source and tokenizer.

A cache folder holds
  tokens.array_record   one record per document: its body ids, little-endian uint16 or uint32; large corpora: tokens-00000...
  lengths.npy           int32 [D], body tokens
  bytes.npy             int32 [D], UTF-8 bytes of the text
  origins.npy           int16 [D], bucket of the origin, which decides the side of the split
  files.npy             int64 [F], documents in each file of tokens
  crc32.npy             uint32 [D], CRC-32 of the document's record, checked whenever it is read
  metadata.parquet      one row per document: its metadata as a JSON object
  manifest.json         source, tokenizer, counts, sha256 of tokens and metadata (of several parts: the sha256 of their hashes)
  hashes.json           sizes and hashes of all these files, see `metajax.core.sealed`
One corpus serves every ablation. Metadata ids are stored in a side table for each template.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from metajax.core.array_records import open_reader
from metajax.core.errors import UserError, require
from metajax.core.reading import handle, reading
from metajax.core.sealed import FORMAT, Blocks, Sealed, save_array, sealed_folder
from metajax.data.annotators import annotators_version
from metajax.data.documents import BUCKETS, BadRecord, Document, Source
from metajax.data.encoding import Tokenizer
from metajax.data.metadata import check_fields, render, template_columns, template_fields


def digest(*parts: Any) -> str:
    """Twelve hex digits that name a cache entry made from these JSON-ready parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_documents(source: Source, on_bad_record: str, records: range | None = None) -> Iterator[tuple[int, Document | None]]:
    """(record number, document) of each of `records`, or of all. A bad record raises its error, or is None with "skip"."""
    records = range(len(source)) if records is None else records
    for i, found in zip(records, source.read(records), strict=True):
        if isinstance(found, BadRecord):
            bad_record(str(found), on_bad_record)
            yield i, None
        else:
            yield i, found


def bad_record(reason: str, on_bad_record: str) -> None:
    """Raise BadRecord with the remedy, unless bad records are skipped."""
    if on_bad_record == "stop":
        raise BadRecord(f"{reason}; --set data.on_bad_record=skip leaves such records out and counts them") from None


ARRAYS = {"lengths": np.int32, "bytes": np.int32, "origins": np.int16, "crc32": np.uint32}


class TokenCache:
    """Memory-mapped access to a tokenised corpus. Pickles by path, for reader processes.

    Raises UserError that names the folder to delete if a file was changed. Tokens and metadata are checked when they are read.
    """

    def __init__(self, folder: Path):
        self.folder, self._sealed = Path(folder), Sealed(folder)
        self.manifest = json.loads(self._sealed.read("manifest.json"))
        self.key: str = self.manifest["sha256"]  # identity of the content: the token ids and the metadata of all documents
        self.lengths, self.bytes, self.origins, self._crc32 = (self._sealed.array(f"{name}.npy") for name in ARRAYS)
        self._dtype = np.dtype(self.manifest["dtype"])
        self._files = sorted(str(self.folder / name) for name in self._sealed.files if name.startswith("tokens"))
        self._starts = list(itertools.accumulate(self._sealed.array("files.npy").tolist(), initial=0))
        self._opened = uuid.uuid4().hex

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        """Body ids of a document, in the stored dtype."""
        file = bisect.bisect_right(self._starts, document) - 1
        path, name = self._files[file], os.path.basename(self._files[file])
        with reading(path, lambda reason: self._sealed.damaged(name)):
            record = handle(open_reader, path, self._opened).read([int(document) - self._starts[file]])[0]
        if zlib.crc32(record) != self._crc32[document]:
            raise self._sealed.damaged(name)
        return np.frombuffer(record, self._dtype)

    def __reduce__(self):
        return TokenCache, (self.folder,)

    def documents(self, split: str, share: float, min_bytes: int = 0) -> np.ndarray:
        """Ids of documents of at least `min_bytes` on one side of the split ("train" or "validation"), in corpus order."""
        is_validation = np.asarray(self.origins) < round(share * BUCKETS)
        return np.flatnonzero((is_validation == (split == "validation")) & (np.asarray(self.bytes) >= min_bytes))

    def metadata(self) -> Iterator[dict[str, str]]:
        """The metadata of every document, in order."""
        for batch in pq.ParquetFile(self._sealed.path("metadata.parquet")).iter_batches():
            for text in batch.column(0).to_pylist():
                yield json.loads(text)


@dataclass(frozen=True)
class MetadataTable:
    """The metadata string of every document in one template, as ids: ids int32 [N], offsets int64 [D + 1], present bool [D]."""

    ids: Blocks
    offsets: np.ndarray
    present: np.ndarray

    def ids_of(self, document: int) -> np.ndarray:
        """The ids of a document's string; none if it lacks a field of the template."""
        return self.ids[self.offsets[document] : self.offsets[document + 1]]

    def __getitem__(self, document: int) -> np.ndarray | None:
        """The ids of a document's string; None if it lacks a field of the template."""
        return self.ids_of(document) if self.present[document] else None

    def strings(self, documents: np.ndarray) -> np.ndarray:
        """int64 [D]: equal numbers for equal strings, for the given documents; 0 for the others."""
        numbers: dict[bytes, int] = {}
        out = np.zeros(len(self.present), np.int64)
        for document in documents.tolist():
            out[document] = numbers.setdefault(self.ids_of(document).tobytes(), len(numbers))
        return out


def build_metadata_table(cache: TokenCache, tokenizer: Tokenizer, template: str) -> MetadataTable:
    """The side table of a template, built once in the token cache's folder and memory-mapped. Filters are applied here.

    Raises UserError for a field that the corpus lacks, and for a string that the tokenizer cannot encode.
    """
    spec = cache.manifest["source"]["spec"]
    check_fields(template, set(cache.manifest["metadata_fields"]), spec)
    key = digest(FORMAT, cache.key, template, tokenizer.fingerprint(), *annotators_version(template_fields(template)))
    folder = cache.folder / "metadata" / key
    if not folder.exists():
        columns: dict[str, list[str | None]] = {name: [] for name in template_columns(template)}
        for fields in cache.metadata():
            for name, column in columns.items():
                column.append(fields.get(name))
        texts = render(template, columns)
        present = np.array([text is not None for text in texts])
        require(bool(present.any()), f"metadata.template = {template!r}: no document of {spec} has all its fields")
        reader = tokenizer.marked() if cache.manifest["tokenizer"].get("markers") else tokenizer
        encoded = []
        for document, ids in enumerate(reader.encode_each([text or "" for text in texts])):
            if isinstance(ids, BadRecord):
                raise UserError(f"{spec}, document {document}, metadata.template = {template!r}: {ids}")
            encoded.append(np.asarray(ids, np.int32))
        with sealed_folder(folder) as work:
            save_array(work / "ids.npy", np.concatenate(encoded))
            save_array(work / "present.npy", present)
            save_array(work / "offsets.npy", np.cumsum([0, *map(len, encoded)], dtype=np.int64))
    sealed = Sealed(folder)
    return MetadataTable(Blocks(sealed, "ids.npy"), sealed.array("offsets.npy"), sealed.array("present.npy"))
