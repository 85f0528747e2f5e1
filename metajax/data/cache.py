"""The tokenised corpus: every document's body ids once, keyed by source and tokenizer alone.

A cache folder holds
  tokens.array_record   one record a document: its body ids, little-endian uint16 or uint32; of large corpora tokens-00000... in order
  lengths.npy           int32 [D], body tokens
  bytes.npy             int32 [D], UTF-8 bytes of the text
  origins.npy           int16 [D], bucket of the origin: which side of the split
  metadata.parquet      one row a document: its metadata as a JSON object
  manifest.json         source and tokenizer, counts, sha256 of the tokens and the metadata, of several files over those of each
so one corpus serves every ablation; metadata ids are a side table for each template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow.parquet as pq

from metajax.atomic import whole_folder
from metajax.config import require
from metajax.data.annotators import annotators_version
from metajax.data.documents import BUCKETS, BadRecord, Document, Source
from metajax.data.metadata import render, template_columns, template_fields
from metajax.data.tokenizers import Tokenizer


def digest(*parts: Any) -> str:
    """Twelve hex digits naming a cache entry made from these JSON-ready parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_documents(source: Source, on_bad_record: str, records: range | None = None) -> Iterator[tuple[int, Document | None]]:
    """Every (record number, document) of `records`, or of all; a bad record stops with its error, or counts as None with "skip"."""
    for i in range(len(source)) if records is None else records:
        try:
            yield i, source[i]
        except BadRecord as error:
            bad_record(str(error), on_bad_record)
            yield i, None


def bad_record(reason: str, on_bad_record: str) -> None:
    """BadRecord, with the remedy, unless bad records are left out."""
    if on_bad_record == "stop":
        raise BadRecord(f"{reason}; --set data.on_bad_record=skip leaves such records out and counts them") from None


class TokenCache:
    """Memory-mapped access to a tokenised corpus. Pickles by path, for reader processes."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.lengths = np.load(self.folder / "lengths.npy", mmap_mode="r")
        self.bytes = np.load(self.folder / "bytes.npy", mmap_mode="r")
        self.origins = np.load(self.folder / "origins.npy", mmap_mode="r")
        self._dtype = np.dtype(self.manifest["dtype"])
        self._tokens = grain.sources.ArrayRecordDataSource(sorted(map(str, self.folder.glob("tokens*.array_record"))))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        """Body ids of a document, in the width they are stored in."""
        return np.frombuffer(self._tokens[document], self._dtype)

    def __reduce__(self):
        return TokenCache, (self.folder,)

    @property
    def key(self) -> str:
        """Identity of the content: sha256 over the token ids and the metadata of all documents."""
        return self.manifest["sha256"]

    @property
    def markers(self) -> bool:
        """Whether control tokens that the corpus spells were read as such."""
        return self.manifest["tokenizer"].get("markers", False)

    def documents(self, split: str, held_out: float, min_bytes: int = 0) -> np.ndarray:
        """Ids of the documents of at least `min_bytes` on one side of the split by origin ("train" or "held_out"), in corpus order."""
        is_held_out = np.asarray(self.origins) < round(held_out * BUCKETS)
        wanted = is_held_out if split == "held_out" else ~is_held_out
        return np.flatnonzero(wanted & (np.asarray(self.bytes) >= min_bytes))

    def metadata(self) -> Iterator[dict[str, str]]:
        """The metadata of every document, in order."""
        for batch in pq.ParquetFile(self.folder / "metadata.parquet").iter_batches():
            for text in batch.column(0).to_pylist():
                yield json.loads(text)


@dataclass(frozen=True)
class MetadataTable:
    """Every document's metadata string in one template as ids: ids int32 [N], offsets int64 [D + 1], present bool [D]."""

    ids: np.ndarray
    offsets: np.ndarray
    present: np.ndarray

    def __getitem__(self, document: int) -> np.ndarray | None:
        """The ids of a document's string, None where it lacks a field of the template."""
        return self.ids[self.offsets[document] : self.offsets[document + 1]] if self.present[document] else None

    def strings(self, documents: np.ndarray) -> np.ndarray:
        """int64 [D]: the same number for the same string, for the given documents; 0 for the others."""
        numbers: dict[bytes, int] = {}
        out = np.zeros(len(self.present), np.int64)
        for document in documents.tolist():
            own = np.asarray(self.ids[self.offsets[document] : self.offsets[document + 1]]).tobytes()
            out[document] = numbers.setdefault(own, len(numbers))
        return out


def build_metadata_table(cache: TokenCache, tokenizer: Tokenizer, template: str) -> MetadataTable:
    """The side table of a template beside the token cache, made once and memory-mapped; filters are applied here."""
    key = digest(template, tokenizer.fingerprint(), *annotators_version(template_fields(template)))
    folder = cache.folder / "metadata" / key
    if not folder.exists():
        columns: dict[str, list[str | None]] = {name: [] for name in template_columns(template)}
        for fields in cache.metadata():
            for name, column in columns.items():
                column.append(fields.get(name))
        texts = render(template, columns)
        spec = cache.manifest["source"]["spec"]
        require(
            any(text is not None for text in texts), f"metadata.template = {template!r}: no document of {spec} has all its fields"
        )
        encoded = (tokenizer.marked() if cache.markers else tokenizer).encode_each([text or "" for text in texts])
        bad = next((n for n, ids in enumerate(encoded) if isinstance(ids, BadRecord)), None)
        require(bad is None, f"{spec}, document {bad}, metadata.template = {template!r}: {encoded[bad or 0]}")
        with whole_folder(folder) as work:
            np.save(work / "ids.npy", np.concatenate([np.asarray(ids, np.int32) for ids in encoded]))
            np.save(work / "present.npy", np.array([text is not None for text in texts]))
            np.save(work / "offsets.npy", np.cumsum([0, *(len(ids) for ids in encoded)], dtype=np.int64))
    return MetadataTable(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "offsets", "present")))
