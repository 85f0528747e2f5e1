"""Ways to damage files on a disk, for tests of the code that reads them.

for path, name in cases(folder): shutil.copytree(folder, copy); DAMAGES[name](copy / path, another)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def flip(path: Path, another: Path, at: float = 0.5) -> None:
    """Flip one bit, `at` this share of the file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def cut(path: Path, another: Path) -> None:
    """Remove the second half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, another: Path) -> None:
    """Empty the file."""
    os.truncate(path, 0)


def missing(path: Path, another: Path) -> None:
    path.unlink()


def garbage(path: Path, another: Path) -> None:
    """Replace the content with random bytes of the same number."""
    path.write_bytes(bytes((37 * i + 11) % 256 for i in range(path.stat().st_size)))


def others(path: Path, another: Path) -> None:
    """Replace the file with the intact file of that name in another folder."""
    shutil.copyfile(another, path)


def folder_in_its_place(path: Path, another: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "flip": flip,
    "cut": cut,
    "empty": empty,
    "missing": missing,
    "garbage": garbage,
    "others": others,
    "folder": folder_in_its_place,
}


def cases(folder: Path, names: Sequence[str] = tuple(DAMAGES)) -> Iterator[tuple[str, str]]:
    """(path below the folder, name of a damage) for every file that is not empty, in order."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        for name in names:
            yield str(path.relative_to(folder)), name
