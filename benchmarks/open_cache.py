"""Time to open a checked cache: python -m benchmarks.open_cache [--documents 10000000] [--folder DIR]

The cache is synthetic: documents of 200 tokens in files of 65,536, with a metadata table of 20 ids per document. A folder that is
named is kept. Seconds are the least of three, with the files in the system's file cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from metajax.core.sealed import Blocks, Sealed, save_array, sealed_folder
from metajax.data.cache import MetadataTable, TokenCache
from metajax.data.tokenising import PART, SCHEMA

TOKENS, METADATA = 200, 20


def make(folder: Path, documents: int) -> None:
    """Make a cache in the format of `metajax.data.tokenising`, with all token files equal."""
    rng = np.random.default_rng(0)
    records = [rng.integers(0, 2048, TOKENS, np.uint16).tobytes() for _ in range(PART)]
    checks = np.array([zlib.crc32(record) for record in records], np.uint32)
    sizes = [min(PART, documents - at) for at in range(0, documents, PART)]
    with sealed_folder(folder) as work:
        for n, size in enumerate(sizes):
            path = work / f"tokens-{n:05d}.array_record"
            if n and size == PART:
                os.link(work / "tokens-00000.array_record", path)
                continue
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in records[:size]:
                writer.write(record)
            writer.close()
        arrays = {"lengths": np.full(documents, TOKENS, np.int32), "bytes": np.full(documents, 4 * TOKENS, np.int32)}
        arrays |= {"origins": rng.integers(0, 10_000, documents, np.int16), "crc32": np.resize(checks, documents)}
        arrays["files"] = np.array(sizes)
        for name, array in arrays.items():
            save_array(work / f"{name}.npy", array)
        pq.write_table(pa.table({"metadata": ["{}"] * documents}, schema=SCHEMA), work / "metadata.parquet")
        (work / "manifest.json").write_text(json.dumps({"dtype": "<u2", "sha256": "0" * 64}))
    with sealed_folder(folder / "metadata" / "table") as work:
        save_array(work / "ids.npy", rng.integers(0, 2048, METADATA * documents, np.int32))
        save_array(work / "offsets.npy", np.arange(0, METADATA * documents + 1, METADATA))
        save_array(work / "present.npy", np.ones(documents, bool))


def open_table(folder: Path) -> MetadataTable:
    sealed = Sealed(folder)
    return MetadataTable(Blocks(sealed, "ids.npy"), sealed.array("offsets.npy"), sealed.array("present.npy"))


def seconds(act: Callable[[], object]) -> float:
    found = []
    for _ in range(3):
        began = time.perf_counter()
        act()
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="seconds to open a cache whose files are checked")
    parser.add_argument("--documents", type=int, default=10_000_000, metavar="N")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the cache is kept (a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / "tokens" / f"{options.documents}"
        if not folder.exists():
            make(folder, options.documents)
        print(f"{options.documents:,} documents: token cache {seconds(lambda: TokenCache(folder)):.2f} s", end=", ")
        print(f"metadata table {seconds(lambda: open_table(folder / 'metadata' / 'table')):.2f} s", end=", ")
        cache, chosen = TokenCache(folder), np.random.default_rng(1).integers(0, options.documents, 20_000).tolist()
        began = time.perf_counter()
        for document in chosen:
            cache[document]
        print(f"{len(chosen) / (time.perf_counter() - began):,.0f} random documents/s")


if __name__ == "__main__":
    main()
