"""The checkpoints of a run as files: what there is, whether it is whole, and what may go."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import NamedTuple

from metajax.training.checkpoints import verify


class Kept(NamedTuple):
    """One checkpoint."""

    step: int
    bytes: int
    written: str  # local time
    state: str  # what is known of it
    damaged: bool


def _steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def _hash_files(workdir: Path, step: int) -> list[Path]:
    return sorted((workdir / "hashes").glob(f"{step}-p*.json"))


def inventory(workdir: Path, read_all: bool) -> list[Kept]:
    """A run's checkpoints, oldest first; `read_all` holds every file against its hash."""
    found = []
    for step in _steps(workdir):
        folder, hashes = workdir / "checkpoints" / str(step), _hash_files(workdir, step)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        written = datetime.datetime.fromtimestamp(folder.stat().st_mtime).isoformat(" ", "seconds")
        problem = verify(folder, hashes) if read_all else None
        state = "verified" if read_all else "complete" if hashes else "without hashes: cut off, or being written"
        found.append(Kept(step, size, written, f"damaged: {problem}" if problem else state, problem is not None))
    return found


def prune(workdir: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that verify, and what was set aside as damaged; what was deleted.

    Nothing goes before as many have been found whole, so that damage never leaves the run without a checkpoint.
    """
    whole = [
        step
        for step in reversed(_steps(workdir))
        if verify(workdir / "checkpoints" / str(step), _hash_files(workdir, step)) is None
    ]
    kept, gone = whole[:keep], []
    for step in _steps(workdir) if kept else []:
        if step not in kept:
            gone.append(workdir / "checkpoints" / str(step))
            for path in _hash_files(workdir, step):
                path.unlink()
    gone += [workdir / "damaged"] if kept and (workdir / "damaged").exists() else []
    for folder in gone:
        shutil.rmtree(folder)
    return gone
