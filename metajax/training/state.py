"""The training state, and pytrees as {path: array}, the form of checkpoints, which depends on no module system."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import struct

from metajax.core.errors import require


class State(struct.PyTreeNode):
    """The pytree that a train step updates. `halted` freezes it after a loss or gradient that is not finite."""

    model: Any
    opt_state: Any
    step: jax.Array  # int32, steps taken
    halted: jax.Array  # bool


def _path_of(entries: tuple[Any, ...]) -> str:
    parts = [jax.tree_util.keystr((entry,), simple=True) for entry in entries]
    return "/".join(part for part in parts if part != "value")  # `value` is nnx.Param's own attribute


def to_arrays(tree: Any) -> dict[str, Any]:
    """{path: array} for every leaf."""
    return {_path_of(entries): leaf for entries, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_arrays(like: Any, arrays: dict[str, Any], what: str) -> Any:
    """The pytree `like` with its leaves taken from {path: array}; UserError names `what`, the source of the arrays, and a path that
    is missing, left over or of another shape."""
    leaves, made = to_arrays(like), "it was made by another model configuration, or by an earlier version of metajax"
    for path in leaves:
        require(path in arrays, f"{what} lacks {path}; {made}")
    extra = min(arrays.keys() - leaves.keys(), default=None)
    require(extra is None, f"{what} has {extra}, which this model does not have; {made}")
    for path, leaf in leaves.items():
        shape = np.shape(arrays[path])
        require(shape == leaf.shape, f"{what}: {path} has shape {shape}, this model needs {leaf.shape}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in leaves])
