"""Wrapper of the Pallas TPU kernels with the contract of `reference.py`: padding, layout, visits and the gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.prefix_window_attention.backward import backward
from kernels_pallas.prefix_window_attention.blocks import block_lists, fits, open_blocks
from kernels_pallas.prefix_window_attention.forward import forward
from kernels_pallas.prefix_window_attention.reference import within
from kernels_pallas.prefix_window_attention.tiles import LANES, Operands, Plan

BLOCK = 512  # queries and keys of a visit; 512 queries occupy the four matrix units of a v5e
PART = 256  # keys of a tile; queries and keys of a part at the mask's borders
LARGEST = (1024, 4096)  # queries and keys of a visit, where the visits do not fit into scalar memory otherwise
UNROLLED = 8  # most query heads of a grid step in visits of `BLOCK`: more would make a long program
PACK = 16  # rows of a packed bfloat16 register: widths and prefix keys are padded to it
HEADS = 4  # least number of query heads of a grid step, so that one head's waits overlap with another's work
RING_BYTES = 24 * 2**20  # of VMEM for the gradients of keys and values


class Tiling(NamedTuple):
    """Sizes of a visit, of its parts at the mask's borders, and of a tile; fields of `Plan`."""

    block_q: int
    block_k: int
    border_q: int
    border_k: int
    tile_k: int


def attention_tpu(
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B S KV Dq"],
    v: Float[Array, "B S KV Dv"],
    expiry: Int[Array, "B S"],
    *,
    scale: float,
    prefix_k: Float[Array, "M KV Dq"] | None = None,
    prefix_v: Float[Array, "M KV Dv"] | None = None,
    q_offset: int | Int[Array, ""] | None = None,
    window: int | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    border: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Same contract as `attention_reference` for float32 and bfloat16 inputs, as two or three TPU kernels.

    A visit has `block_q` queries and `block_k` keys (multiples of 128; None: `tiling_of` chooses). Where the mask cuts a visit,
    it is computed in parts of `border` queries and keys (None: 256, or whole). `interpret` runs the kernels on a CPU, with any
    block size. Raises ValueError for unsupported dtypes and blocks, and for more visits than scalar memory (SMEM) holds.
    """
    dtype, out_dtype = _common_dtype(q, k, v), v.dtype
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    length, keys, kv_heads, group = q.shape[1], k.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    offset = keys - length if q_offset is None else q_offset
    for asked in (block_q, block_k, border):
        if asked is not None and asked % LANES and not interpret:
            raise ValueError(f"a block of {asked}: queries and keys lie on {LANES} lanes, so a block must be a multiple of that")
    tiling = tiling_of((q.shape[0], length, keys), (q.shape[2], kv_heads), dtype, offset, window, block_q, block_k, border)
    block_q, block_k = tiling.block_q, tiling.block_k
    metas = 0 if prefix_k is None else prefix_k.shape[0]
    kv_step, places = kept(k.shape, v.shape, group, block_k, window)
    plan = Plan(
        scale=scale,
        kv_heads=kv_heads,
        group=group,
        kv_step=kv_step,
        places=places,
        metas=metas,
        interpret=interpret,
        **tiling._asdict(),
    )
    expiry = within(window, expiry.astype(jnp.int32))
    grouped = q.reshape(*q.shape[:2], kv_heads, group, -1)
    operands = Operands(
        q=_flat(jnp.moveaxis(_pad(grouped, {1: block_q, 4: PACK}), (2, 3, 4), (0, 1, 2)), 3),
        k=_flat(jnp.moveaxis(_pad(k, {1: block_k, 3: PACK}), 2, 0), 1),
        v=_flat(jnp.moveaxis(_pad(v, {1: block_k, 3: PACK}), 2, 0), 1),
        prefix_k=_metas(prefix_k, k) if metas else None,
        prefix_v=_metas(prefix_v, v) if metas else None,
        lists=block_lists(expiry, offset, length, block_q, block_k, window, tiling.border_k),
    )
    out, lse = _attention(plan, operands)
    out = out.reshape(kv_heads * group, out.shape[2], q.shape[0], -1)[:, : v.shape[3], :, :length]
    lse = lse.reshape(kv_heads * group, q.shape[0], -1)[:, :, :length]
    return jnp.transpose(out, (2, 3, 0, 1)).astype(out_dtype), jnp.transpose(lse, (1, 2, 0))


def tiling_of(
    sizes: tuple[int, int, int],
    heads: tuple[int, int],
    dtype: jnp.dtype | str,
    offset: int | Array,
    window: int | None,
    block_q: int | None = None,
    block_k: int | None = None,
    border: int | None = None,
) -> Tiling:
    """The tiling for (rows, queries, keys) and (query heads, KV heads); the sizes that are None are chosen.

    Visits are `BLOCK`, less for short rows, `PART` for float32 and many heads, and more while their list does not fit.
    """
    group = heads[0] // heads[1]
    step = heads_of_a_step(heads[1], group) * group
    usual = BLOCK if jnp.dtype(dtype).itemsize == 2 and step <= UNROLLED else PART
    q, k = (asked or min(usual, -(-n // LANES) * LANES) for asked, n in ((block_q, sizes[1]), (block_k, sizes[2])))
    while not fits(*sizes, offset, q, k, window) and (grown := _larger(q, k, block_q, block_k)):
        q, k = grown
    # One head has no other to overlap with, so its parts are whole visits: two tiles of keys follow one another.
    part = border or (PART if step > 1 else BLOCK)
    border_q, border_k = (part if n % part == 0 else n for n in (q, k))
    return Tiling(q, k, border_q, border_k, PART if border_k % PART == 0 else border_k)


def _larger(q: int, k: int, block_q: int | None, block_k: int | None) -> tuple[int, int] | None:
    """The next larger visit, of which the sizes that were asked for stay as they are; None beyond `LARGEST`."""
    if block_k is None and (k <= q or q == LARGEST[0]) and k < LARGEST[1]:
        return q, 2 * k
    if block_q is None and q < LARGEST[0]:
        return 2 * q, k
    return (q, 2 * k) if block_k is None and k < LARGEST[1] else None


def heads_of_a_step(kv_heads: int, group: int) -> int:
    """KV heads per grid step: the smallest divisor of `kv_heads` that gives at least `HEADS` query heads, else all."""
    return next(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n * group >= HEADS or n == kv_heads))


def kept(keys: tuple[int, ...], values: tuple[int, ...], group: int, block_k: int, window: int | None) -> tuple[int, int]:
    """(KV heads of a grid step, `Plan.places`) for k [B, S, KV, D] and v: fewer heads where their gradients fit only then."""
    usual, blocks = heads_of_a_step(keys[2], group), -(-keys[1] // block_k)
    places = blocks if window is None else min(blocks, open_blocks(block_k, window))
    size = 4 * places * block_k * sum(-(-shape[3] // PACK) * PACK for shape in (keys, values))
    steps = (n for n in range(usual, 0, -1) if keys[2] % n == 0 and n * size <= RING_BYTES)
    step = next(steps, None)
    # One head's visits of the largest blocks fill VMEM, and are work enough for a step.
    return (usual if block_k <= 2 * BLOCK else 1, 0) if step is None else (step, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, x: Operands) -> tuple[Array, Array]:
    return forward(plan, x)


def _forward(plan: Plan, x: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
    out, lse = forward(plan, x)
    return (out, lse), (x, out, lse)


def _backward(plan: Plan, saved: tuple[Operands, Array, Array], cotangents: tuple[Array, Array]) -> tuple[Operands]:
    x, out, lse = saved
    d_out, d_lse = cotangents
    # The cotangents of lse and of the row sum both multiply the probability, so they combine to one number per query.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=2) - d_lse
    return (backward(plan, x, lse, d_out, delta),)


_attention.defvjp(_forward, _backward)


def _common_dtype(q: Array, k: Array, v: Array) -> jnp.dtype:
    """The dtype of the matrix products. Raises ValueError for dtypes that the kernels do not support."""
    if not {x.dtype for x in (q, k, v)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(str(x.dtype) for x in (q, k, v))
        raise ValueError(f"attention_tpu takes float32 or bfloat16, not q, k, v of {names}: use the xla implementation")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide into groups by {k.shape[2]} key heads")
    return jnp.result_type(q, k, v)


def _pad(x: Array, multiples: dict[int, int]) -> Array:
    """Pad each axis with zeros at the end to a multiple."""
    return jnp.pad(x, [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)])


def _flat(x: Array, axis: int) -> Array:
    """Merge the axes `axis` and `axis` + 1 into one: the positions of all rows."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _metas(meta: Array, like: Array) -> Array:
    """[M, KV, D] -> [KV, padded M, padded D] in the dtype of `like`."""
    return jnp.moveaxis(_pad(meta, {0: PACK, 2: PACK}), 1, 0).astype(like.dtype)
