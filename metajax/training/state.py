"""The training state: parameters, optimiser state, step, and whether a step was not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from metajax.core.errors import UserError


@struct.dataclass
class State:
    """The pytree that a train step updates. `halted` freezes it after a loss or gradient that is not finite."""

    model: Any
    opt_state: Any
    step: jax.Array  # int32, steps taken
    halted: jax.Array  # bool


def initialiser(build_model: Any, tx: optax.GradientTransformation) -> Callable[[jax.Array], State]:
    """key -> the state before the first step."""

    def create(key: jax.Array) -> State:
        model = build_model(key)
        return State(model, tx.init(model), jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    return create


def _leaf_path(path: tuple[Any, ...]) -> str:
    parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
    return "/".join(part for part in parts if part != "value")  # `value` is nnx.Param's own attribute


def to_arrays(tree: Any) -> dict[str, jax.Array]:
    """{path: array} for every leaf, the form of checkpoints, independent of any module system."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_leaf_path(path): leaf for path, leaf in leaves}


def from_arrays(like: Any, arrays: dict[str, Any], what: str) -> Any:
    """The pytree `like` with its leaves taken from {path: array}.

    Raises:
      UserError: a path is missing, left over or of another shape; `what` names the source of the arrays.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    paths = [_leaf_path(path) for path, _ in leaves]
    origin = "it was made by another model configuration, or by an earlier version of metajax"
    for path in paths:
        if path not in arrays:
            raise UserError(f"{what} lacks {path}; {origin}")
    extra = sorted(set(arrays) - set(paths))
    if extra:
        raise UserError(f"{what} has {extra[0]}, which this model does not have; {origin}")
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        if np.shape(arrays[path]) != leaf.shape:
            raise UserError(f"{what}: {path} has shape {np.shape(arrays[path])}, this model needs {leaf.shape}")
    return jax.tree.unflatten(treedef, [arrays[path] for path in paths])
