"""The one table from logical axes to mesh axes, and the shardings that follow from it.

Collisions are refused: two logical axes of one array may not use the same mesh axis. A dimension is sharded over the first of its
mesh axes that divide it. If `SPREAD` does not divide the width of a parameter, another dimension takes it, and a large parameter
that no dimension can shard is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from metajax.core.errors import UserError, require

SPREAD = ("fsdp", "context")  # mesh axes over which parameters and their moments are sharded
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    # of embeddings on their way from columns of all tokens to all columns of a device's tokens
    **{"replica": ("data",), "column": ("fsdp",)},
    "length": ("context",),
    # ssm: Mamba's channels next to "embed", and between its two products; channels: the same in parameters without the model's width
    **dict.fromkeys(("embed", "channels"), SPREAD),
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "ssm"), ("tensor",)),
    # inputs: channels that a convolution reads; features: of the space shared by images and texts
    **dict.fromkeys(("positions", "selection", "taps", "inputs", "features", "rate", "prefix", "norm", "layers"), ()),
}
RESIDUAL_AXES = ("batch", "length", None)
COLUMN_AXES = ("replica", None, "embed")
EXCHANGE_AXES = ("replica", "length", "column")  # between the two, so that each step exchanges over one mesh axis

SECOND_CHOICE = ("mlp", "ssm", "heads", "kv_heads", "vocab", "positions")  # axes that take SPREAD if "embed" does not divide
LARGE = 1 << 20  # elements; a larger parameter must be sharded


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The PartitionSpec of an array with logical `axes` on `mesh`; UserError for an unknown axis or a collision.

    A stacked array has leading dimensions beyond its axes: they are layers.
    """
    axes = (*("layers",) * (len(shape) - len(axes)), *axes)
    taken: dict[str, str] = {}
    entries: list[tuple[str, ...]] = []
    for logical, size in zip(axes, shape, strict=True):
        require(logical is None or logical in RULES, f"no sharding rule for the logical axis {logical!r}")
        names = tuple(n for n in RULES[logical] if mesh.shape.get(n, 1) > 1) if logical else ()
        for name in names:
            if name in taken:
                raise UserError(f"logical axes {taken[name]!r} and {logical!r} of one array both map to mesh axis {name!r}")
            taken[name] = str(logical)
        entries.append(_dividing((), names, size, mesh))
    spread = tuple(name for name in SPREAD if RULES.get(taken.get(name, "")) == SPREAD)
    if spread and not any(set(spread) & set(entry) for entry in entries):
        for at in (axes.index(logical) for logical in SECOND_CHOICE if logical in axes):
            wider = _dividing(entries[at], spread, shape[at], mesh)
            if wider != entries[at]:
                entries[at] = wider
                break
    return PartitionSpec(*(entry or None for entry in entries))


def _dividing(entry: tuple[str, ...], names: tuple[str, ...], size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """A dimension's mesh axes with as many of `names` after them as divide its size."""
    for end in range(len(names), 0, -1):
        if size % math.prod(mesh.shape[name] for name in (*entry, *names[:end])) == 0:
            return (*entry, *names[:end])
    return entry


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings with the structure of `tree`, whose leaves are nnx.Params carrying `axes` (others are replicated)."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable) and jax.tree.leaves(leaf):  # an optimizer's state may leave parameters out
            spec = partition_spec(leaf.get_metadata()["axes"], leaf.shape, mesh)
            require(
                leaf.size < LARGE or mesh.shape.get("fsdp", 1) == 1 or any("fsdp" in entry for entry in spec if entry),
                f"a parameter of shape {leaf.shape} does not divide by fsdp = {mesh.shape.get('fsdp', 1)} and would be replicated on every "
                "device; choose a smaller fsdp in runtime.mesh, such as data=4,fsdp=64",
            )
            return leaf.replace(NamedSharding(mesh, spec))
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), leaf)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pin `x` to the sharding of its logical axes on the mesh in use; without a mesh, `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
