"""Writing so that a reader, or the next start after a kill, finds the old content or the new, never half of it."""

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
REFUSED = (*FULL, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM)


def system_error(error: Exception) -> int:
    """The errno that an error has, or that a library's own error speaks of; 0 where it is none of the operating system's refusals."""
    return getattr(error, "errno", None) or next((n for n in REFUSED if os.strerror(n) in str(error)), 0)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Where nothing more can be written, an OSError with the number and `path`: libraries raise errors of their own without them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = system_error(error)
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
    """Write a UTF-8 text file under a hidden name and rename it into place; an object of a bucket is whole or not there anyway."""
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
    """A JSON-ready value as JSON can say it: a number that is not finite is None."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


@contextlib.contextmanager
def whole_folder(folder: Path, last: str = "") -> Iterator[Path]:
    """A new folder to fill, which is renamed to `folder` at the end, so that it exists whole or not at all.

    Where another process was faster its folder stays, for names say what the content is. A bucket has no folders to rename: there
    the file `last`, copied after all others, says that they are there.
    """
    if "://" in os.fspath(folder):
        with tempfile.TemporaryDirectory() as filled:
            yield Path(filled)
            copy_files(Path(filled), folder, last)
        return
    work = (
        Path(folder.parent) / f".making-{secrets.token_hex(4)}"
    )  # not by tempfile, which keeps everyone else out of it for good
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
    """Copy the files of a folder into another one, either may be on a bucket, `last` after all others."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        (target / path.name).write_bytes(path.read_bytes())
