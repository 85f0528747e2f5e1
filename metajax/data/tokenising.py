"""Making the tokenised corpus: part by part, by processes here or elsewhere (`Make`), taking up what an earlier start has left.

A part is a range of records, the same whoever makes it, and is written whole or not at all. The cache that the parts are
put together to is the same byte for byte however it was made. Compressed files are read from their beginning for every part of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from metajax.atomic import whole_folder
from metajax.config import require
from metajax.data.cache import TokenCache, digest, read_documents
from metajax.data.documents import Document, Source, origin_bucket
from metajax.data.tokenizers import Tokenizer
from metajax.progress import progress
from metajax.workers import process_pool

CHUNK = 512  # records tokenised at a time
PART = 1 << 16  # records of a part
FACTS = "part.json"
SCHEMA = pa.schema([("metadata", pa.string())])
Advance = Callable[[int], None]
Facts = dict[str, Any]
ARRAYS = {"lengths": np.int32, "bytes": np.int32, "origins": np.int16}
Make = Callable[["Job", Sequence[int]], Iterator[int]]  # makes these parts of a job and gives the number of each that is there


def in_processes(job: Job, parts: Sequence[int], workers: int = 1) -> Iterator[int]:
    """`Make` by that many processes of this machine, 1: by this one."""
    if workers == 1:
        yield from map(job.make, parts)
        return
    with process_pool(workers) as pool:
        yield from pool.map(job.make, parts)  # after an error what is under way becomes whole; the rest is left to the next start


def build_token_cache(
    source: Source, tokenizer: Tokenizer, *, cache_dir: Path, on_bad_record: str, make: Make = in_processes, part: int = PART
) -> TokenCache:
    """The tokenised form of `source`, made now with a progress bar or opened when it is there.

    Args:
      make: who makes the parts of a corpus of several. part: records of a part.

    Raises:
      BadRecord: a corrupt record with on_bad_record "stop".
      UserError: no document is left.
    """
    key = digest(source.fingerprint(), tokenizer.fingerprint(), on_bad_record)
    folder = cache_dir / "tokens" / f"{source.spec.partition(':')[0]}-{key}"
    if not folder.exists():
        job = Job(source, tokenizer, on_bad_record, folder.with_name(f"{folder.name}.parts-{part}"), part)
        with progress(f"tokenising {source.spec}", total=len(source)) as advance:
            if len(job.ranges) == 1:
                with whole_folder(folder) as work:
                    _finish(job, work, [job.write(0, work, advance)])
            else:
                job.run(make, advance)
                with whole_folder(folder) as work:
                    _finish(job, work, _join(job, work))
    return TokenCache(folder)


@dataclass(frozen=True)
class Job:
    """What every process that makes parts has to know."""

    source: Source
    tokenizer: Tokenizer
    on_bad_record: str
    home: Path
    part: int

    @property
    def ranges(self) -> list[range]:
        """The records of every part."""
        return [range(at, min(at + self.part, len(self.source))) for at in range(0, len(self.source), self.part)]

    def folder(self, number: int) -> Path:
        return self.home / f"{number:05d}"

    def run(self, make: Make, advance: Advance) -> None:
        """Make the parts that are missing."""
        ranges = self.ranges
        missing = [n for n in range(len(ranges)) if not self.folder(n).exists()]
        advance(len(self.source) - sum(len(ranges[n]) for n in missing))
        for n in make(self, missing) if missing else ():
            advance(len(ranges[n]))

    def make(self, number: int) -> int:
        """A part, whole or not at all, unless it is there; its number comes back."""
        if not (self.folder(number) / FACTS).exists():
            with whole_folder(self.folder(number), FACTS) as work:
                (work / FACTS).write_text(json.dumps(self.write(number, work, lambda records: None)))
        return number

    def write(self, number: int, folder: Path, advance: Advance) -> Facts:
        """Tokens, the arrays of the cache and the metadata of a part's documents; returns what the manifest needs of it."""
        dtype = _dtype(self.tokenizer)
        found: dict[str, list[int]] = {name: [] for name in ARRAYS}
        bad, sha, fields = 0, hashlib.sha256(), set()
        writer = ArrayRecordWriter(str(folder / "tokens.array_record"), "group_size:1")
        table = pq.ParquetWriter(folder / "metadata.parquet", SCHEMA)
        for documents, failed in _chunks(read_documents(self.source, self.on_bad_record, self.ranges[number])):
            bad += failed
            metadata = [json.dumps(d.metadata, sort_keys=True) for d in documents]
            encoded = self.tokenizer.encode_batch([d.text for d in documents])
            for document, ids, text in zip(documents, encoded, metadata, strict=True):
                record = np.asarray(ids, dtype).tobytes()
                writer.write(record)
                sha.update(len(record).to_bytes(8, "little") + record + text.encode())
                found["lengths"].append(len(ids))
                found["bytes"].append(len(document.text.encode()))
                found["origins"].append(origin_bucket(document.origin))
                fields.update(document.metadata)
            table.write_table(pa.table({"metadata": metadata}, schema=SCHEMA))
            advance(len(documents) + failed)
        writer.close()
        table.close()
        for name, kind in ARRAYS.items():
            np.save(folder / f"{name}.npy", np.array(found[name], kind))
        sizes = {name: sum(found[name]) for name in ("lengths", "bytes")}
        return {"bad": bad, "sha256": sha.hexdigest(), "fields": sorted(fields), "documents": len(found["lengths"]), **sizes}


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocabulary.size <= 1 << 16 else "<u4")


def _join(job: Job, folder: Path) -> list[Facts]:
    """One cache of all parts, which stay where they are; tokens are linked, or copied where the file system has no links."""
    facts = [json.loads((job.folder(n) / FACTS).read_text()) for n in range(len(job.ranges))]
    parts = [job.folder(n) for n, of_part in enumerate(facts) if of_part["documents"]]
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", np.concatenate([np.load(part / f"{name}.npy") for part in parts or [job.folder(0)]]))
    with pq.ParquetWriter(folder / "metadata.parquet", SCHEMA) as table:
        for n, part in enumerate(parts):
            try:
                os.link(part / "tokens.array_record", folder / f"tokens-{n:05d}.array_record")
            except OSError:
                shutil.copyfile(part / "tokens.array_record", folder / f"tokens-{n:05d}.array_record")
            for batch in pq.ParquetFile(part / "metadata.parquet").iter_batches():
                table.write_batch(batch)
    return facts


def _finish(job: Job, folder: Path, facts: list[Facts]) -> None:
    """The manifest; UserError when no document is left."""
    bad, used = sum(of_part["bad"] for of_part in facts), [of_part for of_part in facts if of_part["documents"]]
    require(bool(used), f"{job.source.spec} holds no usable document ({bad} bad records skipped)")
    hashes = [of_part["sha256"] for of_part in used]
    manifest = {
        "source": job.source.manifest(),
        "tokenizer": {"spec": job.tokenizer.spec, "fingerprint": job.tokenizer.fingerprint()},
        "documents": sum(of_part["documents"] for of_part in used),
        "tokens": sum(of_part["lengths"] for of_part in used),
        "bytes": sum(of_part["bytes"] for of_part in used),
        "bad_records_skipped": bad,
        "metadata_fields": sorted({field for of_part in used for field in of_part["fields"]}),
        "dtype": _dtype(job.tokenizer).str,
        "sha256": hashes[0] if len(facts) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _chunks(documents: Iterator[tuple[int, Document | None]]) -> Iterator[tuple[list[Document], int]]:
    """The documents of CHUNK records, with the number of bad records among them."""
    while group := list(itertools.islice(documents, CHUNK)):
        found = [document for _, document in group if document is not None]
        yield found, len(group) - len(found)
