"""The checkpoints of a run as files: listing, verification and pruning."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, NamedTuple

from metajax.core.storage import files, hashes_of, home, steps_of
from metajax.training.checkpoints import another_runs, folder_of, verify


class Kept(NamedTuple):
    """One checkpoint."""

    step: int
    bytes: int
    written: str  # local time
    state: str  # "verified", "complete", or what is wrong
    damaged: bool


def inventory(workdir: Path, read_all: bool) -> list[Kept]:
    """A run's checkpoints, oldest first; `read_all` checks every file against its hash."""
    found = []
    for step in steps_of(workdir):
        infos = files(folder_of(workdir, step)).values()
        size, written = sum(info["size"] for info in infos), max(map(_written, infos), default="")
        problem = _problem(workdir, step) if read_all else None
        whole = "complete" if hashes_of(workdir, step) else "without hashes: cut off, or being written"
        state = "verified" if read_all else whole
        found.append(Kept(step, size, written, f"damaged: {problem}" if problem else state, problem is not None))
    return found


def _problem(workdir: Path, step: int) -> str | None:
    return verify(folder_of(workdir, step), hashes_of(workdir, step)) or another_runs(workdir, step)


def _written(info: dict[str, Any]) -> str:
    time = info["mtime"]  # seconds for a local file, a UTC datetime on a bucket
    seconds = time.timestamp() if isinstance(time, datetime.datetime) else time
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def prune(workdir: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that verify, and the damaged ones set aside. Return the deleted paths.

    Nothing is deleted before `keep` checkpoints have verified, so damage never leaves the run without a checkpoint.
    """
    steps, damaged = steps_of(workdir), home(workdir) / "damaged"
    kept = [step for step in reversed(steps) if _problem(workdir, step) is None][:keep]
    if not kept:
        return []
    others = [step for step in steps if step not in kept]
    for path in (path for step in others for path in hashes_of(workdir, step)):
        path.unlink()
    gone = [folder_of(workdir, step) for step in others] + ([damaged] if damaged.exists() else [])
    for folder in gone:
        folder.rmtree()
    return gone
