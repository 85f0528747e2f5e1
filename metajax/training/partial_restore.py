"""Reads all or some parameters of a checkpoint, under other names and on the mesh of the new model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from metajax.core.errors import nearest, require
from metajax.training.state import from_arrays, to_arrays


def read_parts(folder: Path, abstract: Any, parts: Mapping[str, str], fresh: dict[str, Any]) -> Any:
    """The model `abstract` with `parts`, {part: its name in the checkpoint}, from `folder` and all other parameters from `fresh`.

    Raises:
      UserError: this model lacks a part, or a parameter of the checkpoint is missing, left over or has another shape.
    """
    mine, what = to_arrays(abstract), str(folder)
    theirs = {path: there + path[len(here) :] for path in mine for here, there in parts.items() if _below(path, here)}
    for here in parts:
        known = sorted({"/".join(path.split("/")[:n]) for path in mine for n in (1, 2, 3, 4)})
        require(any(_below(path, here) for path in mine), f"init.from: this model has no part {here!r}{nearest(here, known)}")
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
        named = {path.removeprefix("model/"): item for path, item in stored.items() if path.startswith("model/")}
        like = {there: mine[path] for path, there in theirs.items()}
        from_arrays(like, {path: item for path, item in named.items() if any(_below(path, p) for p in parts.values())}, what)
        wanted = {f"model/{path}": leaf for path, leaf in like.items()}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        found = checkpointer.restore(folder / "state", args=arguments)
    return from_arrays(abstract, fresh | {path: found[f"model/{there}"] for path, there in theirs.items()}, what)


def _below(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}/")
