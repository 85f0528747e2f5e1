"""JSON lines: one JSON value per line, UTF-8, in a plain or compressed file, on a disk or a bucket.

A line ends with \\n or \\r\\n; other Unicode line separators are text. Blank lines count as lines and hold no value.
A byte order mark is skipped. If a key occurs twice in an object, the last one counts.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO

from etils import epath

from metajax.core.errors import UserError, require
from metajax.core.reading import reading

BLANK = b" \t\r\n\v\f"
MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".bz2": (b"BZh",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([n, 0x2A, 0x4D, 0x18]) for n in range(0x50, 0x60))),
}
REWRITE = "its window is larger than the 128 MiB that are read here; rewrite it: zstd --long=31 -dc FILE | zstd -o NEW.zst"


def parse(line: bytes) -> Any:
    """The value of a line; raises ValueError with the reason in one line.

    Real numbers too large for a float and integers of thousands of digits become Decimals.
    """
    try:
        return _DECODER.decode(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON that can be read ({error})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (its values are nested too deeply)") from None


def _float(digits: str) -> float | Decimal:
    value = float(digits)
    return value if math.isfinite(value) else Decimal(digits)


def _int(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # more digits than Python's limit for integers
        return Decimal(digits)


_DECODER = json.JSONDecoder(parse_float=_float, parse_int=_int)


def records(path: str) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank; raises UserError with file and line if one cannot be read."""
    for number, line in lines(path):
        try:
            value = parse(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        yield number, value


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file; raises UserError if reading fails."""
    with reading(path, lambda reason: _damaged(path, reason)), epath.Path(path).open("rb") as file, _plain(path, file) as stream:
        yield stream


def lines(path: str, offset: int = 0, number: int = 1) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of every line that is not blank, starting with line `number` at byte `offset`."""
    with opened(path) as stream:
        if offset:
            stream.seek(offset)
        for n, line in enumerate(stream, number):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip(BLANK):
                yield n, line


def line_marks(path: str, every: int) -> tuple[int, list[tuple[int, int]]]:
    """(number of lines that are not blank, (offset, line number) of each `every`-th of them), for `lines`."""
    marks, count, offset = [], 0, 0
    with opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.removeprefix(codecs.BOM_UTF8).strip(BLANK):
                if count % every == 0:
                    marks.append((offset, number))
                count += 1
            offset += len(line)
    return count, marks


def is_compressed(path: str) -> bool:
    """Whether the file name has the suffix of a supported compression."""
    return path.lower().endswith(tuple(MAGIC))


def _plain(path: str, file: BinaryIO) -> io.BufferedIOBase:
    """The decompressed bytes of an open file; raises UserError if the content does not match the suffix."""
    suffix = next((suffix for suffix in MAGIC if path.lower().endswith(suffix)), None)
    if suffix is None:
        return io.BufferedReader(file, 1 << 20)
    start = file.read(4)
    file.seek(0)
    require(bool(start), f"{path}: empty, which no {suffix} file is; fetch or write it again")
    other = next((known for known, magic in MAGIC.items() if start.startswith(magic)), ".jsonl for plain lines")
    is_it = start.startswith(MAGIC[suffix])
    require(is_it, f"{path}: not {suffix}, though its name ends so; rename it after its content ({other})")
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(file, compression="zstd"), 1 << 20)
    return io.BufferedReader(gzip.GzipFile(fileobj=file) if suffix == ".gz" else bz2.BZ2File(file), 1 << 20)


def _damaged(path: str, reason: str) -> UserError:
    if not is_compressed(path):
        return UserError(f"{path}: not a readable file of JSON lines ({reason}); write it again")
    remedy = REWRITE if "too much memory" in reason else "it is damaged or cut short; fetch or write it again"
    return UserError(f"{path}: cannot be decompressed ({reason}); {remedy}")
