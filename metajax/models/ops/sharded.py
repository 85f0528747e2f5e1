"""Operations along a row on a mesh: each device computes its rows, its heads or channels, and its part of a long row.

The compiler cannot split a Pallas call or a recurrence over a mesh, so these operations run in `jax.shard_map`.
If rows are sharded over `context`, each part reads from the parts before it: attention their keys, the convolution three
inputs, the scan their final state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.selective_scan.reference import TAPS, resolve_states, resolve_tails, segment_starts
from kernels_pallas.selective_scan.xla import final_tail, segment_offsets
from metajax.distributed.rules import partition_spec

Axes = tuple[str | None, ...]
Kernel = Callable[..., tuple[Array, Array]]


def parts_of(*lengths: int) -> int:
    """Number of devices over which the mesh shards rows of these lengths; 1 if one is not sharded or the counts differ."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if AxisType.Manual in mesh.axis_types else mesh.shape.get("context", 1)
    length, *others = lengths
    spreads = all(other == length for other in others) and length % parts == 0 and length // parts >= TAPS
    return parts if spreads else 1


def on_devices(kernel: Kernel, axes: Mapping[str, Axes], outputs: tuple[Axes, Axes], parts: int, **arrays: Array | None) -> tuple:
    """kernel(**arrays) on each device's shards, laid out by the logical `axes`; arrays that are None are left out.

    parts: the result of `parts_of`; with 1 the axis "length" is not sharded. Inside `jax.shard_map`, or without a mesh
    of several devices, this calls `kernel` directly.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return kernel(**given)
    sizes = {axis: size for name, x in given.items() for axis, size in zip(axes[name], x.shape, strict=True) if axis}
    layout = {axis: partition_spec((axis,), (size,), mesh)[0] for axis, size in sizes.items() if axis != "length" or parts > 1}
    if None in (layout.get("heads"), layout.get("kv_heads")):
        layout |= {"heads": None, "kv_heads": None}  # query heads are placed with the key heads of their groups
    spec = lambda names: PartitionSpec(*(layout.get(name) for name in names))  # noqa: E731
    specs = {name: spec(axes[name]) for name in given}
    local = lambda given: kernel(**given)  # noqa: E731
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=tuple(map(spec, outputs)), check_vma=False)(given)


def attention_in_parts(
    attend: Kernel,
    window: int | None,
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B T KV Dq"],
    v: Float[Array, "B T KV Dv"],
    expiry: Int[Array, "B all"],
    **metas: Array,
) -> tuple[Array, Array]:
    """`attend` for one part of each row: (out, lse) of the part's queries. `expiry` is that of the whole row.

    A window no longer than a part needs only the keys of the previous part. Without a window, or with a longer one, a part
    gathers the keys of all parts.
    """
    here, length = jax.lax.axis_index("context"), q.shape[1]
    if window is None or window > length:
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        if window is None and length % 2 == 0:
            return _balanced(functools.partial(attend, k=k, v=v, expiry=expiry, **metas), q)
        return attend(q, k, v, expiry, q_offset=here * length, **metas)
    if window:
        k, v = (jnp.concatenate([_from_before(x[:, length - window :]), x], axis=1) for x in (k, v))
    first = here * length - window  # index of the first of these keys; expiry 0 hides those before the row
    padded = jnp.pad(expiry, ((0, 0), (window, 0)))
    mine = jax.lax.dynamic_slice_in_dim(padded, here * length, window + length, axis=1) - first
    return attend(q, k, v, mine, q_offset=window, **metas)


def _balanced(attend: Kernel, q: Float[Array, "B T H Dq"]) -> tuple[Array, Array]:
    """`attend` for one part's queries to all keys, each half on a device such that every device sees equally many keys.

    Of the 2P halves of P parts, device j computes j and 2P - 1 - j. The even halves, each the first of its part, go to the
    devices in one permutation, and the odd ones in another.
    """
    parts, half, here = jax.lax.axis_size("context"), q.shape[1] // 2, jax.lax.axis_index("context")
    found = []
    for odd in (0, 1):
        takes = [j if j % 2 == odd else 2 * parts - 1 - j for j in range(parts)]  # device -> half
        there = [(half_of // 2, j) for j, half_of in enumerate(takes)]
        moved = jax.lax.ppermute(q[:, odd * half :][:, :half], "context", there)
        made = attend(moved, q_offset=jnp.asarray(takes)[here] * half)
        found.append(jax.tree.map(lambda x: jax.lax.ppermute(x, "context", [(b, a) for a, b in there]), made))  # noqa: B023
    early, late = found
    return jnp.concatenate([early[0], late[0]], axis=1), jnp.concatenate([early[1], late[1]], axis=1)


def scan_in_parts(
    scan: Kernel,
    segment_ids: Int[Array, "B all"],
    initial_state: Float[Array, "B C N"] | None = None,
    reset_state: Float[Array, "C N"] | None = None,
    z: Float[Array, "B T C"] | None = None,
    **tokens: Array,
) -> tuple[Array, Array]:
    """`scan` for one part of each row: (y of the part, state after the whole row). `segment_ids` are those of the whole row.

    Each part is scanned twice: first from zeros, which gives made_i, then from the final state of the parts before it,
    h_i = decay_i h_(i-1) + made_i. The decay of a part is exp(A sum of its steps), or 0 if a segment starts inside it.
    """
    here, length = jax.lax.axis_index("context"), tokens["u"].shape[1]
    ids, begins = _part_of(segment_ids, here, length)
    initial, reset = resolve_states(initial_state, reset_state, len(ids), tokens["A"].astype(jnp.float32))
    _, made = scan(**tokens, segment_ids=ids, initial_state=jnp.zeros_like(initial), reset_state=reset)
    steps = jnp.sum(jax.nn.softplus(tokens["dt"].astype(jnp.float32) + tokens["dt_bias"]), axis=1)
    starts_inside = jnp.any(segment_starts(ids), axis=1)
    decay = jnp.where(starts_inside[:, None, None], 0.0, jnp.exp(steps[:, :, None] * tokens["A"]))
    state, found = initial, []
    for begin, left, new in zip(*(jax.lax.all_gather(x, "context") for x in (begins, decay, made)), strict=True):
        found.append(jnp.where(begin[:, None, None], reset, state))
        state = left * found[-1] + new
    y, _ = scan(**tokens, z=z, segment_ids=ids, initial_state=jnp.stack(found)[here], reset_state=reset)
    return y, state


def conv_in_parts(
    conv: Kernel,
    x: Float[Array, "B T C"],
    segment_ids: Int[Array, "B all"],
    initial_tail: Float[Array, "B tail C"] | None = None,
    reset_tail: Float[Array, "tail C"] | None = None,
    **weights: Array,
) -> tuple[Array, Array]:
    """`conv` for one part of each row: (y of the part, tail after the whole row). `segment_ids` are those of the whole row."""
    here, length = jax.lax.axis_index("context"), x.shape[1]
    ids, begins = _part_of(segment_ids, here, length)
    initial, reset = resolve_tails(x, weights["w"].shape[1], initial_tail, reset_tail)
    last = slice(length - len(reset), length)
    tail = final_tail(x[:, last], initial, reset, segment_offsets(x[:, last], ids[:, last]))
    before = jnp.where(here == 0, initial, _from_before(tail))
    y, tail = conv(
        x=x, segment_ids=ids, initial_tail=jnp.where(begins[:, None, None], reset, before), reset_tail=reset, **weights
    )
    return y, jax.lax.all_gather(tail, "context")[-1]


def _part_of(segment_ids: Int[Array, "B all"], here: Array, length: int) -> tuple[Int[Array, "B T"], Bool[Array, " B"]]:
    """(segment ids of this part, whether its first token starts a segment). The latter needs the id before the part."""
    starts = segment_starts(segment_ids)
    ids, starts = (jax.lax.dynamic_slice_in_dim(x, here * length, length, axis=1) for x in (segment_ids, starts))
    return ids, starts[:, 0]


def _from_before(x: Array) -> Array:
    """`x` of the previous part; zeros for the first part."""
    return jax.lax.ppermute(x, "context", [(i, i + 1) for i in range(jax.lax.axis_size("context") - 1)])
