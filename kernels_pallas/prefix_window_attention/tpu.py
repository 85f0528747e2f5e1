"""Wrapper of the Pallas TPU kernels with the contract of `reference.py`: padding, layout, visits and the gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.prefix_window_attention.backward import backward
from kernels_pallas.prefix_window_attention.blocks import block_lists
from kernels_pallas.prefix_window_attention.forward import forward
from kernels_pallas.prefix_window_attention.tiles import LANES, Operands, Plan

BLOCK = 256
PACK = 16  # rows of a packed bfloat16 register: widths and prefix keys are padded to it
HEADS = 4  # least number of query heads of a grid step, so that one head's waits overlap with another's work


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
    block_q: int | None = None,
    block_k: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Same contract as `attention_reference` for float32 and bfloat16 inputs, as three TPU kernels.

    A tile has `block_q` queries and `block_k` keys (multiples of 128; None: 256, or less for short rows). `interpret` runs
    the kernels on a CPU, with any block size. Raises ValueError for unsupported dtypes and blocks, and for more visits than
    scalar memory (SMEM) holds.
    """
    dtype, out_dtype = _common_dtype(q, k, v), v.dtype
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    length, keys = q.shape[1], k.shape[1]
    block_q, block_k = (_block(size, asked, interpret) for size, asked in ((length, block_q), (keys, block_k)))
    offset = keys - length if q_offset is None else q_offset
    metas = 0 if prefix_k is None else prefix_k.shape[0]
    lists = block_lists(expiry.astype(jnp.int32), offset, length, block_q, block_k)
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    plan = Plan(
        scale=scale,
        kv_heads=kv_heads,
        group=group,
        kv_step=heads_of_a_step(kv_heads, group),
        block_q=block_q,
        block_k=block_k,
        metas=metas,
        interpret=interpret,
    )
    grouped = q.reshape(*q.shape[:2], kv_heads, group, -1)
    operands = Operands(
        q=_flat(jnp.moveaxis(_pad(grouped, {1: block_q, 4: PACK}), (2, 3, 4), (0, 1, 2)), 3),
        k=_flat(jnp.moveaxis(_pad(k, {1: block_k, 3: PACK}), 2, 0), 1),
        v=_flat(jnp.moveaxis(_pad(v, {1: block_k, 3: PACK}), 2, 0), 1),
        prefix_k=_metas(prefix_k, k) if metas else None,
        prefix_v=_metas(prefix_v, v) if metas else None,
        lists=lists,
    )
    out, lse = _attention(plan, operands)
    out = out.reshape(kv_heads * group, out.shape[2], q.shape[0], -1)[:, : v.shape[3], :, :length]
    lse = lse.reshape(kv_heads * group, q.shape[0], -1)[:, :, :length]
    return jnp.transpose(out, (2, 3, 0, 1)).astype(out_dtype), jnp.transpose(lse, (1, 2, 0))


def heads_of_a_step(kv_heads: int, group: int) -> int:
    """KV heads per grid step: the smallest divisor of `kv_heads` that gives at least `HEADS` query heads, else all."""
    return next(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n * group >= HEADS or n == kv_heads))


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


def _block(size: int, asked: int | None, interpret: bool | pltpu.InterpretParams) -> int:
    """The requested block size, or 256 but at most the padded size."""
    if asked is not None and asked % LANES and not interpret:
        raise ValueError(f"a block of {asked}: queries and keys lie on {LANES} lanes, so a block must be a multiple of that")
    return asked or min(BLOCK, -(-size // LANES) * LANES)


def _pad(x: Array, multiples: dict[int, int]) -> Array:
    """Pad each axis with zeros at the end to a multiple."""
    return jnp.pad(x, [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)])


def _flat(x: Array, axis: int) -> Array:
    """Merge the axes `axis` and `axis` + 1 into one: the positions of all rows."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _metas(meta: Array, like: Array) -> Array:
    """[M, KV, D] -> [KV, padded M, padded D] in the dtype of `like`."""
    return jnp.moveaxis(_pad(meta, {0: PACK, 2: PACK}), 1, 0).astype(like.dtype)
