"""Writing so that a reader, or the next start after a kill, finds the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from metajax.config import require


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a hidden name and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes its name `folder` at the end: it is there whole or not at all.

    Where another process was faster its folder stays, for names say what the content is.
    """
    work = folder.parent / f".making-{secrets.token_hex(4)}"  # not by tempfile, which keeps everyone else out of it for good
    work.mkdir(parents=True)
    try:
        yield work
        with contextlib.suppress(OSError):
            os.replace(work, folder)
        require(folder.exists(), f"cannot write {folder}; check the space and the permissions there")
    finally:
        shutil.rmtree(work, ignore_errors=True)
