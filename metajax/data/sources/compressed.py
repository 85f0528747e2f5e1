"""JSON lines in compressed files, read from their beginning on: enough for tokenising them once, and too slow for anything else."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from metajax.core.errors import require
from metajax.core.json_lines import is_compressed, lines
from metajax.data.documents import Document
from metajax.data.sources.files import Columns, Files


class CompressedLines(Files):
    """Compressed JSON lines. Records are counted when their number is asked for, and read on from the last one; going back begins anew."""

    kind = "jsonl"

    def __init__(self, spec: str, paths: Sequence[str], root: str, columns: Columns):
        self.spec, self.paths, self.root, self.columns, self.tally = spec, tuple(paths), root, columns, Counter()
        plain = [path for path in paths if not is_compressed(path)]
        require(not plain, f"{spec}: {plain and plain[0]} is not compressed as others are; make two sources of them")
        self._fresh()

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._file, self._next, self._stream = -1, 0, iter(())

    @cached_property
    def _starts(self) -> list[int]:
        counts = [sum(1 for _ in lines(path)) for path in self.paths]
        require(sum(counts) > 0, f"{', '.join(self.paths)}: no records; {self.kind} data needs at least one")
        return list(itertools.accumulate(counts, initial=0))

    def __getitem__(self, i: int) -> Document:
        file, row = self.locate(i)
        with self._lock:
            if file != self._file or row < self._next:
                self._file, self._next, self._stream = file, 0, lines(self.paths[file])
            _, line = next(itertools.islice(self._stream, row - self._next, None))
            self._next = row + 1
        return self.parsed(line, i)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_file", "_next", "_stream")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()
