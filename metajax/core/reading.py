"""Reading data files: only a few are open at a time, and each error is one line."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from metajax.core.errors import UserError, first_line

# Files that `handle` keeps open in a process, with two descriptors each: half of the system's limit, at most 256 files.
OPEN = max(2, min(256, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 48) // 4))
REMEDIES = {
    errno.ENFILE: "this machine has no file handle left; close other programs",
    errno.EMFILE: "this process may have {limit} files open (ulimit -n); raise the limit",
    errno.ENOMEM: "free some memory, or give the process more",
    errno.EIO: "check the disk or the mount",
    errno.ESTALE: "check the mount",
    errno.EACCES: "give yourself the right to read it",
    errno.EPERM: "give yourself the right to read it",
    errno.ENOENT: "put it back",
}


def handle(opener: Callable[[str], Any], path: str, key: str) -> Any:
    """opener(path), cached by least recent use. An evicted one is closed when nothing refers to it any more.

    key: identifies the source, so that a file that was rewritten under the same path is opened again.
    """
    try:
        return _kept(opener, path, key)
    except (OSError, RuntimeError) as error:
        if _fault(error) not in (errno.EMFILE, errno.ENFILE):
            raise
        _kept.cache_clear()  # other files of this process, or a lower limit, leave less room than at the start
        return _kept(opener, path, key)


@lru_cache(maxsize=OPEN)
def _kept(opener: Callable[[str], Any], path: str, key: str) -> Any:
    return opener(path)


@contextlib.contextmanager
def reading(path: str, damaged: Callable[[str], UserError]) -> Iterator[None]:
    """Turn the error of a library that reads `path` into damaged(reason), unless the machine caused it.

    Raises another UserError if the process or machine ran out of a resource or cannot reach the file, which never counts as a
    damaged record. An OSError of a bucket that cannot be reached passes unchanged.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError, EOFError, zlib.error, pa.ArrowException) as error:
        if isinstance(error, OSError) and _is_of_network(error):
            raise
        fault = _fault(error)
        if fault is None:
            raise damaged(first_line(error)) from None
        remedy = REMEDIES.get(fault, "repair that").format(limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        raise UserError(f"{path}: {os.strerror(fault)}; {remedy}, and give the same command again") from None


def _is_of_network(error: OSError) -> bool:
    """Whether a bucket or the network caused the error, which `metajax.core.storage.outages` reports."""
    is_builtin = type(error).__module__ in ("builtins", "gzip")
    return not is_builtin or isinstance(error, (ConnectionError, TimeoutError)) or str(error).startswith("Forbidden")


def _fault(error: BaseException) -> int | None:
    """The errno if the machine refused something, None if the file itself is damaged."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno
    return next((code for code in REMEDIES if isinstance(error, RuntimeError) and os.strerror(code) in str(error)), None)
