"""Folders whose files are checked against hashes before they are used.

A sealed folder holds `hashes.json`: the size of every other file and the sha256 of each of its blocks. Small files are checked
when they are opened, large arrays block by block when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from metajax.core.atomic import whole_folder
from metajax.core.errors import UserError

FORMAT = 1  # part of the names of sealed folders; raise it when their content changes, and all are made again
HASHES = "hashes.json"
BLOCK = 1 << 23  # bytes


@contextlib.contextmanager
def sealed_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, as `whole_folder`, which is sealed at the end."""
    with whole_folder(folder, HASHES) as work:
        yield work
        files = {path.name: {"bytes": path.stat().st_size, "blocks": _hashes(path)} for path in sorted(work.iterdir())}
        (work / HASHES).write_text(json.dumps({"files": files, "sha256": _seal(folder, files)}))


def _seal(folder: Path, files: dict[str, Any]) -> str:
    """The hash of the file hashes and the folder's name, so that a swapped folder is noticed."""
    return hashlib.sha256(json.dumps([folder.parts[-2:], files], sort_keys=True).encode()).hexdigest()


def _hashes(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK), b"")]


def save_array(path: Path, array: np.ndarray) -> None:
    """Like `np.save`, but with the errors of the file, which say why nothing more can be written."""
    with path.open("wb") as file:
        np.save(SimpleNamespace(write=file.write), array)


class Sealed:
    """The files of a sealed folder. If a file was changed, every method raises UserError that names the folder to delete."""

    def __init__(self, folder: Path):
        """Check that every file exists with its size. Files that were added later are ignored."""
        self.folder = Path(folder)
        try:
            whole = json.loads((self.folder / HASHES).read_bytes())
            self.files: dict[str, dict[str, Any]] = whole["files"]
            seal = whole["sha256"]
        except (ValueError, TypeError, KeyError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self.damaged(HASHES) from None
        if seal != _seal(self.folder, self.files):
            raise self.damaged(HASHES)
        for name, entry in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise self.damaged(name)

    def damaged(self, name: str) -> UserError:
        """The error for a file that is missing or has changed."""
        path = self.folder / name
        what = "changed or damaged since it was written" if path.is_file() else "missing"
        return UserError(f"{path}: {what}; delete the folder {self.folder}, and the same command makes it again")

    def path(self, name: str) -> Path:
        """The path of a file, after its whole content has been checked."""
        path = self.folder / name
        if not path.is_file() or _hashes(path) != self.files[name]["blocks"]:
            raise self.damaged(name)
        return path

    def check(self) -> Sealed:
        """Read every file and check its whole content."""
        for name in self.files:
            self.path(name)
        return self

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        return self.path(name).read_bytes()

    def array(self, name: str) -> np.ndarray:
        """An array that `save_array` wrote, memory-mapped, after its whole content has been checked."""
        return np.asarray(np.load(self.path(name), mmap_mode="r"))


class Blocks:
    """A memory-mapped array [N] in a sealed folder. A slice checks only the blocks of the file that it covers, each once.

    Any other attribute is read from the whole array, after all of it has been checked.
    """

    def __init__(self, sealed: Sealed, name: str):
        self._sealed, self._name = sealed, name
        self._bytes = np.memmap(sealed.folder / name, np.uint8, "r")
        self._good: set[int] = set()
        self._check(0, 1)  # the header
        self._array = np.load(sealed.folder / name, mmap_mode="r")

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self._array))
        at, size = self._array.offset, self._array.itemsize
        self._check(at + start * size, at + stop * size)
        return self._array[rows]

    def _check(self, start: int, stop: int) -> None:
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if block not in self._good:
                found = hashlib.sha256(self._bytes[block * BLOCK : (block + 1) * BLOCK]).hexdigest()
                if found != self._sealed.files[self._name]["blocks"][block]:
                    raise self._sealed.damaged(self._name)
                self._good.add(block)

    def __len__(self) -> int:
        return len(self._array)

    def __getattr__(self, name: str) -> Any:
        return getattr(self[:], name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blocks, (self._sealed.folder, self._name)


def _blocks(folder: Path, name: str) -> Blocks:
    return Blocks(Sealed(folder), name)
