"""Builds the tokenised corpus in parts, with local or remote processes (`Make`). Finished parts of an earlier start are kept.

A part is a range of records and is written completely or not at all. The cache joined from the parts is the same byte for
byte, whichever processes made them. A compressed file is read from its beginning for each of its parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from metajax.core.errors import require
from metajax.core.progress import progress
from metajax.core.sealed import FORMAT, HASHES, Sealed, save_array, sealed_folder
from metajax.core.workers import process_pool
from metajax.data.cache import ARRAYS, TokenCache, bad_record, digest, read_documents
from metajax.data.documents import BadRecord, Source, origin_bucket
from metajax.data.encoding import Tokenizer

CHUNK = 512  # records tokenised at a time
PART = 1 << 16  # records per part
FACTS = "part.json"
SCHEMA = pa.schema([("metadata", pa.string())])
Advance = Callable[[int], None]
Facts = dict[str, Any]
# Makes these parts of a job and yields the number of each when it is complete.
Make = Callable[["Job", Sequence[int]], Iterator[int]]


def in_processes(job: Job, parts: Sequence[int], workers: int = 1) -> Iterator[int]:
    """`Make` with that many processes of this machine; with 1, in this process."""
    if workers == 1:
        yield from map(job.make, parts)
        return
    with process_pool(workers) as pool:
        yield from pool.map(job.make, parts)  # after an error, started parts are completed and the next start makes the rest


def build_token_cache(
    source: Source, tokenizer: Tokenizer, *, cache_dir: Path, on_bad_record: str, make: Make = in_processes, part: int = PART
) -> TokenCache:
    """The tokenised form of `source`: opened if it exists, otherwise built with a progress bar.

    Args:
      make: makes the parts if the corpus has several. part: records per part.

    Raises:
      BadRecord: a record is corrupt and on_bad_record is "stop".
      UserError: no document is left, or a file of the source was changed in the meantime.
    """
    stamp = source.fingerprint()
    key = digest(FORMAT, stamp, tokenizer.text_key, on_bad_record)
    folder = cache_dir / "tokens" / f"{source.spec.partition(':')[0]}-{key}"
    if not folder.exists():
        job = Job(source, tokenizer, on_bad_record, folder.with_name(f"{folder.name}.parts-{part}"), part)
        with progress(f"tokenising {source.spec}", total=len(source)) as advance:
            if len(job.ranges) == 1:
                with sealed_folder(folder) as work:
                    _finish(job, work, [job.write(0, work, advance)], stamp)
            else:
                sizes = dict(enumerate(map(len, job.ranges)))
                missing = [n for n in sizes if not job.folder(n).exists()]
                advance(len(source) - sum(sizes[n] for n in missing))
                for n in make(job, missing) if missing else ():
                    advance(sizes[n])
                with sealed_folder(folder) as work:
                    _finish(job, work, _join(job, work), stamp)
    return TokenCache(folder)


@dataclass(frozen=True)
class Job:
    """The data that every process needs to make parts."""

    source: Source
    tokenizer: Tokenizer
    on_bad_record: str
    home: Path
    part: int

    @property
    def ranges(self) -> list[range]:
        """The records of every part."""
        return [range(at, min(at + self.part, len(self.source))) for at in range(0, len(self.source), self.part)]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.tokenizer.vocabulary.size <= 1 << 16 else "<u4")

    def folder(self, number: int) -> Path:
        return self.home / f"{number:05d}"

    def make(self, number: int) -> int:
        """Make a part, completely or not at all, unless it exists; returns its number."""
        if not (self.folder(number) / HASHES).exists():
            with sealed_folder(self.folder(number)) as work:
                (work / FACTS).write_text(json.dumps(self.write(number, work, lambda records: None)))
        return number

    def write(self, number: int, folder: Path, advance: Advance) -> Facts:
        """Write tokens, cache arrays and metadata of a part's documents; returns the part's facts for the manifest."""
        rows, unencodable, sha, fields, before = [], [], hashlib.sha256(), set(), Counter(self.source.tally)
        writer = ArrayRecordWriter(str(folder / "tokens.array_record"), "group_size:1")
        table = pq.ParquetWriter(folder / "metadata.parquet", SCHEMA)
        documents = read_documents(self.source, self.on_bad_record, self.ranges[number])
        while chunk := list(itertools.islice(documents, CHUNK)):
            read = [(record, document) for record, document in chunk if document is not None]
            encoded, metadata = self.tokenizer.encode_each([document.text for _, document in read]), []
            for (record, document), ids in zip(read, encoded, strict=True):
                if isinstance(ids, BadRecord):
                    bad_record(f"{self.source.where(record)}: {ids}", self.on_bad_record)
                    unencodable.append(record)
                    continue
                tokens, text = np.asarray(ids, self.dtype).tobytes(), json.dumps(document.metadata, sort_keys=True)
                writer.write(tokens)
                sha.update(len(tokens).to_bytes(8, "little") + tokens + text.encode())
                rows.append((len(ids), len(document.text.encode()), origin_bucket(document.origin), zlib.crc32(tokens)))
                metadata.append(text)
                fields.update(document.metadata)
            table.write_table(pa.table({"metadata": metadata}, schema=SCHEMA))
            advance(len(chunk))
        writer.close()
        table.close()
        columns = np.array(rows, np.int64).reshape(-1, len(ARRAYS)).T
        for values, (name, kind) in zip(columns, ARRAYS.items(), strict=True):
            save_array(folder / f"{name}.npy", values.astype(kind))
        facts = {"unencodable": unencodable, "sha256": sha.hexdigest(), "fields": sorted(fields)}
        sizes = {"documents": len(rows), "lengths": int(columns[0].sum()), "bytes": int(columns[1].sum())}
        return {"bad": len(self.ranges[number]) - len(rows), **sizes, **facts, "tally": self.source.tally - before}


def _join(job: Job, folder: Path) -> list[Facts]:
    """Join all parts into one cache; the parts stay. Token files are linked, or copied if the file system has no links."""
    every = [Sealed(job.folder(n)) for n in range(len(job.ranges))]
    facts = [json.loads(part.read(FACTS)) for part in every]
    parts = [part for part, of_part in zip(every, facts, strict=True) if of_part["documents"]]
    for name in ARRAYS:
        save_array(folder / f"{name}.npy", np.concatenate([part.array(f"{name}.npy") for part in parts or every[:1]]))
    with pq.ParquetWriter(folder / "metadata.parquet", SCHEMA) as table:
        for n, part in enumerate(parts):
            tokens, joined = part.path("tokens.array_record"), folder / f"tokens-{n:05d}.array_record"
            try:
                os.link(tokens, joined)
            except OSError:
                shutil.copyfile(tokens, joined)
            for batch in pq.ParquetFile(part.path("metadata.parquet")).iter_batches():
                table.write_batch(batch)
    return facts


def _finish(job: Job, folder: Path, facts: list[Facts], stamp: str) -> None:
    """Write the manifest; raises UserError if no document is left or the source's fingerprint is no longer `stamp`."""
    spec, tokenizer = job.source.spec, job.tokenizer
    require(job.source.fingerprint() == stamp, f"{spec} was changed while it was tokenised; give the same command again")
    total = {name: sum(of_part[name] for of_part in facts) for name in ("bad", "documents", "lengths", "bytes")}
    used = [of_part for of_part in facts if of_part["documents"]]
    require(bool(used), f"{spec} holds no usable document ({total['bad']} bad records skipped)")
    hashes = [of_part["sha256"] for of_part in used]
    manifest = {
        "source": job.source.manifest(),
        "tokenizer": {"spec": tokenizer.spec, "fingerprint": tokenizer.fingerprint(), "markers": tokenizer.markers},
        "documents": total["documents"],
        "tokens": total["lengths"],
        "bytes": total["bytes"],
        "bad_records_skipped": total["bad"],
        "tally": dict(sorted(sum((Counter(of_part["tally"]) for of_part in facts), Counter()).items())),
        "unencodable": [record for of_part in facts for record in of_part["unencodable"]],
        "metadata_fields": sorted({field for of_part in used for field in of_part["fields"]}),
        "dtype": job.dtype.str,
        "sha256": hashes[0] if len(facts) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
    }
    save_array(folder / "files.npy", np.array([of_part["documents"] for of_part in used]))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
