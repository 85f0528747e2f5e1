"""A train step compiled ahead of time, called on lists of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from metajax.training.objectives import Batch
from metajax.training.state import State

Leaves = list[jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names"])
@dataclass(frozen=True, eq=False)
class Scalars(Mapping[str, Any]):
    """Scalars by name, held in one array, because the host reads one array in the time of one scalar."""

    names: tuple[str, ...]
    values: Any  # float32 [names]

    @classmethod
    def of(cls, scalars: Mapping[str, jax.Array]) -> Scalars:
        """Pack scalars of float32 or bool, sorted by name; True becomes 1."""
        names = tuple(sorted(scalars))
        return cls(names, jnp.stack([scalars[name].astype(jnp.float32) for name in names]))

    def __getitem__(self, name: str) -> Any:
        return self.values[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def on_leaves(step: Callable[..., tuple[State, Mapping[str, jax.Array]]], state: State, frozen: tuple[Any, ...]) -> Any:
    """A train step as a function (leaves of the state, batch, leaves of the frozen inputs) -> (leaves of the state, Scalars)."""
    trees = jax.tree.structure(state), jax.tree.structure(frozen)

    def train_step(leaves: Leaves, batch: Batch, held: Leaves) -> tuple[Leaves, Scalars]:  # the name of the program in dumps
        state, metrics = step(jax.tree.unflatten(trees[0], leaves), batch, *jax.tree.unflatten(trees[1], held))
        return jax.tree.leaves(state), Scalars.of(metrics)

    return train_step


@dataclass(frozen=True)
class CompiledStep:
    """The train step compiled for fixed shapes; it can never be recompiled.

    A loop calls `run` with leaves. JAX flattens and rebuilds a tree of NNX modules in Python at every call, which can take longer
    than a small step itself.
    """

    compiled: jax.stages.Compiled
    tree: Any  # the structure of a State

    def run(self, leaves: Sequence[Any], batch: Batch, held: Sequence[Any]) -> tuple[Leaves, Scalars]:
        """(leaves of the next state, metrics) from the leaves of a state, which are donated, a batch and the leaves of the frozen
        inputs."""
        return self.compiled(leaves, batch, held)

    def state(self, leaves: Sequence[Any]) -> State:
        """The state with these leaves."""
        return jax.tree.unflatten(self.tree, leaves)

    def __call__(self, state: State, batch: Batch, *frozen: Any) -> tuple[State, Scalars]:
        """`run` on trees."""
        leaves, metrics = self.run(jax.tree.leaves(state), batch, jax.tree.leaves(frozen))
        return self.state(leaves), metrics
