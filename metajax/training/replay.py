"""Replay bundles: the state before a bad step, its batch and its metrics, and recomputation of that step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metajax.core.atomic import write_text
from metajax.core.storage import home
from metajax.distributed.hosts import is_first
from metajax.training.checkpoints import load_arrays, save_arrays
from metajax.training.program import Program
from metajax.training.state import State


def write_bundle(
    workdir: Path, program: Program, state: State, frozen: tuple[Any, ...], batch: dict[str, np.ndarray], metrics: dict[str, Any]
) -> Any:
    """Write the state before a bad step (a bad step leaves it unchanged), the frozen inputs, the batch and the metrics with "step".
    Returns the folder, WORKDIR/replay-step-N, which may be on a bucket."""
    folder = home(workdir) / f"replay-step-{metrics['step']}"
    save_arrays(folder / "state", state.model)
    if frozen:
        save_arrays(folder / "frozen", frozen)
    if program.rows.counts:
        with (folder / f"batch-p{program.rows.index}.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **batch)
    if is_first():
        write_text(folder / "metrics.json", json.dumps(metrics))
    return folder


def replay(folder: Path, program: Program) -> dict[str, float]:
    """The metrics of the step in a replay bundle, recomputed on the mesh of `program`. A bundle on a bucket is copied first."""
    state, frozen = program.create_state(), program.place(program.frozen)
    model = load_arrays(folder / "state", program.abstract_state().model)
    taken = json.loads((folder / "metrics.json").read_text())["step"] - 1
    step = jax.device_put(np.int32(taken), state.step.sharding)  # random draws depend on it
    if frozen:
        frozen = load_arrays(folder / "frozen", frozen)
    files = sorted(folder.glob("batch-p*.npz"), key=lambda path: int(path.stem.partition("-p")[2]))
    parts = [np.load(path) for path in files]
    batch = program.put(program.local_rows({name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}))
    state = state.replace(model=model, step=step)
    _, metrics = program.compile_step(state, batch)(state, batch, *frozen)
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
