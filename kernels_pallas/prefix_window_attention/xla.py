"""Prefix-window attention for any platform: query blocks, static slices of the keys, and a recomputing backward pass.

The backward pass saves only `out` and `lse` and recomputes each block's probabilities from them (FlashAttention-2, Dao 2023,
arXiv 2307.08691, algorithm 2), so memory grows with block x S, not with T x S. Blocks are scanned in a few bands. A band
reads only the keys up to its own end, so most of the triangle above the diagonal is never computed.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.prefix_window_attention.reference import with_prefix, within

NEVER = 2**31 - 1  # expiry of a key that is always visible
BANDS = 8  # static key slices: with n of them the work is (n + 1) / 2n of the full square


def attention_xla(
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
    block: int = 256,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Same contract as `attention_reference`, in query blocks of `block` rows; both outputs are differentiable.

    Scores, softmax and log-sum-exp are float32 for any input dtype; matrix products use the input dtype. With a traced
    `q_offset` every block reads all keys, because static slices need static query positions.
    """
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    offset = k.shape[1] - length if q_offset is None else q_offset
    metas = 0 if prefix_k is None else len(prefix_k)
    life = jnp.stack([jnp.broadcast_to(jnp.arange(k.shape[1]), expiry.shape), within(window, expiry)]).astype(jnp.int32)
    if prefix_k is not None:
        k, v = with_prefix(prefix_k, k), with_prefix(prefix_v, v)
        always = jnp.broadcast_to(jnp.array([-NEVER, NEVER], jnp.int32)[:, None, None], (2, batch, metas))
        life = jnp.concatenate([always, life], axis=2)
    plan = _Plan(scale, block, metas + offset if isinstance(offset, int) else None)
    # Heads are leading axes inside, so that every product is a plain batched matrix product.
    grouped = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, -1), 1, 3)
    keys, values = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    out, lse = _attention(plan, grouped, keys, values, life, jnp.asarray(offset, jnp.int32))
    out = jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, -1)
    return out, jnp.moveaxis(lse, 3, 1).reshape(batch, length, heads)


class _Plan(NamedTuple):
    scale: float
    block: int
    past: int | None  # keys before the position of query row 0; None if it is traced


class _Band(NamedTuple):
    rows: slice  # query rows
    seen: slice  # keys that any of them may see
    blocks: int  # number of equal query blocks, processed in sequence


def _bands(plan: _Plan, length: int, keys: int) -> list[_Band]:
    """At most `BANDS` runs of whole blocks with static key slices, then the remaining rows."""
    block, bands = plan.block, 1 if plan.past is None else BANDS
    whole = length // block
    step = -(-whole // bands) * block or block
    edges = [*range(0, whole * block, step), whole * block, *([length] if length % block else [])]
    ends = (keys if plan.past is None else max(1, j + plan.past) for j in edges[1:])
    pairs = zip(itertools.pairwise(edges), ends, strict=True)
    return [_Band(slice(i, j), slice(0, end), max((j - i) // block, 1)) for (i, j), end in pairs]


def _split(x: Array, band: _Band) -> Array:
    """The band's rows of [B, KV, G, T, ...] by block: [blocks, B, KV, G, rows, ...]."""
    x = x[:, :, :, band.rows]
    return jnp.moveaxis(x.reshape(*x.shape[:3], band.blocks, -1, *x.shape[4:]), 3, 0)


def _join(x: Array) -> Array:
    """The inverse of `_split`: [blocks, B, KV, G, rows, ...] -> [B, KV, G, blocks * rows, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _firsts(band: _Band, offset: Array | np.ndarray) -> Array:
    """Key index of each block's first row; a constant offset reaches the backward pass as a NumPy array."""
    return offset + jnp.arange(band.rows.start, band.rows.stop, (band.rows.stop - band.rows.start) // band.blocks)


def _scores(q: Array, k: Array, life: Array, first: Array, scale: float) -> Array:
    """Masked scaled scores, float32[B, KV, G * rows, keys] for q [B, KV, G, rows, D]; -inf where not allowed."""
    scores = _product("bkrd,bksd->bkrs", _merge(q), k) * scale
    q_index = first + jnp.arange(q.shape[3])[:, None]
    allow = (life[0, :, None, :] <= q_index) & (q_index < life[1, :, None, :])
    return jnp.where(jnp.tile(allow, (1, q.shape[2], 1))[:, None], scores, -jnp.inf)


def _merge(x: Array) -> Array:
    """[B, KV, G, rows, ...] -> [B, KV, G * rows, ...]: the heads of a group share their keys, so they act as more rows."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q: Array, k: Array, v: Array, life: Array, offset: Array) -> tuple[Array, Array]:
    """q [B,KV,G,T,Dq], k [B,KV,S,Dq], v [B,KV,S,Dv], life [2,B,S]: for each key, its first query and its expiry.

    Returns out [B,KV,G,T,Dv], lse [B,KV,G,T].
    """
    outs, lses = [], []
    for band in _bands(plan, q.shape[3], k.shape[2]):
        seen = (k[:, :, band.seen], v[:, :, band.seen], life[:, :, band.seen])
        step = functools.partial(_forward_block, *seen, plan.scale)
        _, (out, lse) = jax.lax.scan(step, None, (_firsts(band, offset), _split(q, band)))
        outs.append(_join(out))
        lses.append(_join(lse))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _forward_block(
    k: Array, v: Array, life: Array, scale: float, carry: None, block: tuple[Array, Array]
) -> tuple[None, tuple[Array, Array]]:
    """One block of queries: (out [B,KV,G,rows,Dv], lse [B,KV,G,rows])."""
    first, q = block
    scores = _scores(q, k, life, first, scale)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)  # a row without keys: exp(-inf - 0) = 0, not NaN
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("bkrs,bksd->bkrd", weights.astype(v.dtype), v) / jnp.where(total > 0, total, 1.0)
    return carry, (out.astype(v.dtype).reshape(*q.shape[:4], -1), (peak + jnp.log(total)).reshape(q.shape[:4]))


def _forward(plan: _Plan, *arrays: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, lse = _attention(plan, *arrays)
    return (out, lse), (*arrays, out, lse)


def _backward(plan: _Plan, saved: tuple[Array | np.ndarray, ...], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    """dS = P * (dO V^T - rowsum(dO * O) + dLSE); dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO."""
    q, k, v, life, offset, out, lse = saved
    d_out, d_lse = cotangents
    # d_lse is added to the row term, because d lse / d score = P. With lse set to a finite value, rows without keys have P = 0.
    row = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    row, lse = jnp.where(lse == -jnp.inf, 0.0, row), jnp.where(lse == -jnp.inf, 0.0, lse)
    d_qs, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for band in _bands(plan, q.shape[3], k.shape[2]):
        seen = (k[:, :, band.seen], v[:, :, band.seen], life[:, :, band.seen])
        blocks = (_firsts(band, offset), *(_split(x, band) for x in (q, d_out, row, lse)))
        sums = (d_k[:, :, band.seen], d_v[:, :, band.seen])
        sums, d_q = jax.lax.scan(functools.partial(_backward_block, *seen, plan.scale), sums, blocks)
        d_k, d_v = (total.at[:, :, band.seen].set(part) for total, part in zip((d_k, d_v), sums, strict=True))
        d_qs.append(_join(d_q))
    return jnp.concatenate(d_qs, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


def _backward_block(
    k: Array, v: Array, life: Array, scale: float, sums: tuple[Array, Array], block: tuple[Array, ...]
) -> tuple[tuple[Array, Array], Array]:
    """One block of queries: ((dK, dV) with its share added, its dQ)."""
    first, q, d_out, row, lse = block
    d_out = _merge(d_out)
    weights = jnp.exp(_scores(q, k, life, first, scale) - _merge(lse)[..., None])
    d_weights = _product("bkrd,bksd->bkrs", d_out, v)
    d_scores = (weights * (d_weights + _merge(row)[..., None]) * scale).astype(q.dtype)
    # Three products read these two. Without the barrier each product would compute the exponentials again.
    d_scores, weights = jax.lax.optimization_barrier((d_scores, weights.astype(v.dtype)))
    d_q = _product("bkrs,bksd->bkrd", d_scores, k).reshape(q.shape).astype(q.dtype)
    d_k = _product("bkrs,bkrd->bksd", d_scores, _merge(q))
    return (sums[0] + d_k, sums[1] + _product("bkrs,bkrd->bksd", weights, d_out)), d_q


_attention.defvjp(_forward, _backward)
