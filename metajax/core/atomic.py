"""Atomic writes: a reader, or the next start after a kill, finds the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metajax.core.errors import require

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """If nothing more can be written, raise an OSError with the errno and `path`: errors of libraries lack them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None) or next((n for n in FULL if os.strerror(n) in str(error)), 0)
        if number not in FULL or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a hidden name and rename it into place. On a bucket a plain write is already atomic."""
    if "://" in os.fspath(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with storage_errors(path):
            temporary.write_text(text, encoding="utf-8")
            _to_disk(temporary)
            os.replace(temporary, path)
            _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def strict(value: Any) -> Any:
    """A JSON-ready value in strict JSON: numbers that are not finite become None."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


@contextlib.contextmanager
def whole_folder(folder: Path, last: str = "") -> Iterator[Path]:
    """A new folder to fill. It is renamed to `folder` at the end, so that `folder` is complete or does not exist.

    If another process was faster, its folder stays: equal names mean equal content. A bucket has no folders to rename.
    There the file `last` is copied after all others, and its presence shows that they are complete.
    """
    if "://" in os.fspath(folder):
        with tempfile.TemporaryDirectory() as filled:
            yield Path(filled)
            copy_files(Path(filled), folder, last)
        return
    work = Path(folder.parent) / f".making-{secrets.token_hex(4)}"  # tempfile's folders stay unreadable for other users
    work.mkdir(parents=True)
    try:
        with storage_errors(folder):
            yield work
            for path in (*work.rglob("*"), work):
                _to_disk(path)
        with contextlib.suppress(OSError):
            os.replace(work, folder)
            _to_disk(folder.parent)
        require(folder.exists(), f"cannot write {folder}; check the space and the permissions there")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def copy_files(source: Path, target: Path, last: str = "") -> None:
    """Copy the files of a folder into another one, with the file `last` after all others. Either folder may be on a bucket."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        (target / path.name).write_bytes(path.read_bytes())
