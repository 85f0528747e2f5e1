"""The checkpoints of a run as files: listing, verification and pruning."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, NamedTuple

from metajax.core.storage import files, hashes_of, home, steps_of
from metajax.training.checkpoints import another_runs, verify


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
        folder, hashes = home(workdir) / "checkpoints" / str(step), hashes_of(workdir, step)
        infos = files(folder).values()
        size, written = sum(info["size"] for info in infos), max(map(_written, infos), default="")
        problem = (verify(folder, hashes) or another_runs(workdir, step)) if read_all else None
        state = "verified" if read_all else "complete" if hashes else "without hashes: cut off, or being written"
        found.append(Kept(step, size, written, f"damaged: {problem}" if problem else state, problem is not None))
    return found


def _written(info: dict[str, Any]) -> str:
    time = info["mtime"]  # seconds for a local file, a UTC datetime on a bucket
    seconds = time.timestamp() if isinstance(time, datetime.datetime) else time
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def prune(workdir: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that verify, and the damaged ones set aside. Return the deleted paths.

    Nothing is deleted before `keep` checkpoints have verified, so damage never leaves the run without a checkpoint.
    """
    there = home(workdir)
    steps = steps_of(workdir)
    bad = {s: verify(there / "checkpoints" / str(s), hashes_of(workdir, s)) or another_runs(workdir, s) for s in reversed(steps)}
    whole = [step for step, problem in bad.items() if problem is None]
    kept, gone = whole[:keep], []
    for step in steps if kept else []:
        if step not in kept:
            gone.append(there / "checkpoints" / str(step))
            for path in hashes_of(workdir, step):
                path.unlink()
    gone += [there / "damaged"] if kept and (there / "damaged").exists() else []
    for folder in gone:
        folder.rmtree()
    return gone
