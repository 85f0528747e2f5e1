"""Corpora that metajax builds itself: written once below the cache directory, then read like any Parquet file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metajax.core.errors import require
from metajax.core.sealed import Sealed, sealed_folder
from metajax.data.documents import Document
from metajax.data.sources.files import Columns, Request, file_entry
from metajax.data.sources.parquet import Parquet

_DOCUMENTS, _MANIFEST = "documents.parquet", "manifest.json"
_ROWS_IN_GROUP = 2048


class BuiltCorpus(Parquet):
    """A built corpus in its cache folder. Its fingerprint depends on the recipe and versions, not on file dates.

    Raises UserError if the folder was damaged after it was written.
    """

    def __init__(self, spec: str, folder: Path):
        sealed = Sealed(folder)
        self._manifest = json.loads(sealed.read(_MANIFEST))
        documents = str(sealed.path(_DOCUMENTS))
        super().__init__(Request(spec, "parquet", documents, Columns("text", "origin")))

    def fingerprint(self) -> str:
        """The recipe's fingerprint, from the manifest."""
        return self._manifest["fingerprint"]

    def manifest(self) -> dict[str, Any]:
        """The manifest of the corpus: versions, counts, sha256."""
        return {**self._manifest, "spec": self.spec}


def folder_of(kind: str, key: str, cache_dir: Path) -> Path:
    """The folder of a built corpus, which may not exist yet."""
    return Path(cache_dir) / "corpora" / f"{kind}-{key[:12]}"


def open_or_build(
    spec: str, kind: str, key: str, cache_dir: Path, build: Callable[[], tuple[list[Document], dict[str, Any]]]
) -> BuiltCorpus:
    """The corpus in cache_dir/corpora/KIND-KEY12. If it does not exist, `build() -> (documents, manifest)` makes it."""
    folder = folder_of(kind, key, cache_dir)
    if not folder.exists():
        documents, manifest = build()
        require(len(documents) > 0, f"{spec}: no documents with enough words; name other modules or sources")
        with sealed_folder(folder) as work:
            _write(work, documents, {"kind": kind, "fingerprint": key, **manifest})
    return BuiltCorpus(spec, folder)


def _write(work: Path, documents: Sequence[Document], manifest: dict[str, Any]) -> None:
    """Write documents.parquet and manifest.json, the latter with record count, words and sha256."""
    names = sorted({name for document in documents for name in document.metadata})
    columns = {"text": [d.text for d in documents], "origin": [d.origin for d in documents]}
    columns |= {name: [d.metadata.get(name) for d in documents] for name in names}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    path, content = work / _DOCUMENTS, hashlib.sha256()  # of the content: it does not depend on the library that wrote the file
    pq.write_table(table, path, row_group_size=_ROWS_IN_GROUP, compression="zstd", write_page_checksum=True)
    for d in documents:
        content.update(json.dumps([d.text, d.origin, d.metadata], sort_keys=True).encode())
    counts = {
        "records": len(documents),
        "words": sum(len(d.text.split()) for d in documents),
        "content_sha256": content.hexdigest(),
        "files": [{**file_entry(str(path)), "path": _DOCUMENTS}],
    }
    (work / _MANIFEST).write_text(json.dumps({**manifest, **counts}, indent=2) + "\n")
