"""The same attention for any platform: query blocks, static slices of the keys, and a recomputing backward.

The backward keeps `out` and `lse` alone and rebuilds each block's probabilities from them (FlashAttention-2, Dao 2023,
arXiv 2307.08691, algorithm 2), so memory grows with block x S, not with T x S. Blocks are scanned in a few bands, and a band
reads the keys up to its own end alone: most of the half square above the diagonal is never computed.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BANDS = 8  # static key slices: with n of them the work is (n + 1) / 2n of the full square


def attention_xla(
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B S KV Dq"],
    v: Float[Array, "B S KV Dv"],
    expiry: Int[Array, "B S"],
    *,
    scale: float,
    block: int = 256,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The contract of `attention_reference`, in query blocks of `block` rows; both outputs can be differentiated.

    Scores, softmax and log-sum-exp are float32 for any input dtype; the products take the inputs as they are.
    """
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    # Heads lead inside, so that every product is a plain batched matrix product.
    grouped = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, -1), 1, 3)
    out, lse = _attention(grouped, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), expiry, scale, block)
    out = jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, -1)
    return out, jnp.moveaxis(lse, 3, 1).reshape(batch, length, heads)


class _Band(NamedTuple):
    rows: slice  # query rows
    seen: slice  # keys that any of them may see
    blocks: int  # equal query blocks, done one after the other


def _bands(length: int, keys: int, block: int) -> list[_Band]:
    """At most `BANDS` runs of whole blocks with static key slices, then what is left over of the length."""
    whole = length // block
    step = -(-whole // BANDS) * block or block
    edges = [*range(0, whole * block, step), whole * block, *([length] if length % block else [])]
    past = keys - length
    return [_Band(slice(i, j), slice(0, j + past), max((j - i) // block, 1)) for i, j in itertools.pairwise(edges)]


def _split(x: Array, band: _Band) -> Array:
    """The band's rows of [B, KV, G, T, ...] by block: [blocks, B, KV, G, rows, ...]."""
    x = x[:, :, :, band.rows]
    return jnp.moveaxis(x.reshape(*x.shape[:3], band.blocks, -1, *x.shape[4:]), 3, 0)


def _join(x: Array) -> Array:
    """The inverse of `_split`: [blocks, B, KV, G, rows, ...] -> [B, KV, G, blocks * rows, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _firsts(band: _Band) -> Array:
    """Key index of each block's first row: the band's last row stands at the last key that the band sees."""
    rows = band.rows.stop - band.rows.start
    return band.seen.stop - rows + jnp.arange(band.blocks) * (rows // band.blocks)


def _scores(q: Array, k: Array, expiry: Array, first: Array, scale: float) -> Array:
    """Masked scaled scores, float32[B, KV, G * rows, keys] for q [B, KV, G, rows, D]; -inf where not allowed."""
    scores = _product("bkrd,bksd->bkrs", _merge(q), k) * scale
    q_index = first + jnp.arange(q.shape[3])[:, None]
    allow = (jnp.arange(k.shape[2])[None, :] <= q_index) & (q_index < expiry[:, None, :])
    return jnp.where(jnp.tile(allow, (1, q.shape[2], 1))[:, None], scores, -jnp.inf)


def _merge(x: Array) -> Array:
    """[B, KV, G, rows, ...] -> [B, KV, G * rows, ...]: the heads of a group share their keys, so they are more rows."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, expiry: Array, scale: float, block: int) -> tuple[Array, Array]:
    """q [B,KV,G,T,Dq], k [B,KV,S,Dq], v [B,KV,S,Dv] -> out [B,KV,G,T,Dv], lse [B,KV,G,T]."""
    outs, lses = [], []
    for band in _bands(q.shape[3], k.shape[2], block):
        seen = (k[:, :, band.seen], v[:, :, band.seen], expiry[:, band.seen])
        step = functools.partial(_forward_block, *seen, scale)
        _, (out, lse) = jax.lax.scan(step, None, (_firsts(band), _split(q, band)))
        outs.append(_join(out))
        lses.append(_join(lse))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _forward_block(
    k: Array, v: Array, expiry: Array, scale: float, carry: None, block: tuple[Array, Array]
) -> tuple[None, tuple[Array, Array]]:
    """One block of queries: (out [B,KV,G,rows,Dv], lse [B,KV,G,rows])."""
    first, q = block
    scores = _scores(q, k, expiry, first, scale)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)  # a row without keys: exp(-inf - 0) = 0, not NaN
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("bkrs,bksd->bkrd", weights.astype(v.dtype), v) / jnp.where(total > 0, total, 1.0)
    return carry, (out.astype(v.dtype).reshape(*q.shape[:4], -1), (peak + jnp.log(total)).reshape(q.shape[:4]))


def _forward(
    q: Array, k: Array, v: Array, expiry: Array, scale: float, block: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, lse = _attention(q, k, v, expiry, scale, block)
    return (out, lse), (q, k, v, expiry, out, lse)


def _backward(
    scale: float, block: int, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    """dS = P * (dO V^T - rowsum(dO * O) + dLSE); dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO."""
    q, k, v, expiry, out, lse = saved
    d_out, d_lse = cotangents
    # d_lse joins the row term: d lse / d score = P. Rows without keys have P = 0 throughout, once lse is finite.
    row = d_lse - jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    row, lse = jnp.where(lse == -jnp.inf, 0.0, row), jnp.where(lse == -jnp.inf, 0.0, lse)
    d_qs, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for band in _bands(q.shape[3], k.shape[2], block):
        seen = (k[:, :, band.seen], v[:, :, band.seen], expiry[:, band.seen])
        blocks = (_firsts(band), *(_split(x, band) for x in (q, d_out, row, lse)))
        sums = (d_k[:, :, band.seen], d_v[:, :, band.seen])
        sums, d_q = jax.lax.scan(functools.partial(_backward_block, *seen, scale), sums, blocks)
        d_k, d_v = (total.at[:, :, band.seen].set(part) for total, part in zip((d_k, d_v), sums, strict=True))
        d_qs.append(_join(d_q))
    return jnp.concatenate(d_qs, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _backward_block(
    k: Array, v: Array, expiry: Array, scale: float, sums: tuple[Array, Array], block: tuple[Array, ...]
) -> tuple[tuple[Array, Array], Array]:
    """One block of queries: its share added to (dK, dV), and its dQ."""
    first, q, d_out, row, lse = block
    d_out = _merge(d_out)
    weights = jnp.exp(_scores(q, k, expiry, first, scale) - _merge(lse)[..., None])
    d_weights = _product("bkrd,bksd->bkrs", d_out, v)
    d_scores = (weights * (d_weights + _merge(row)[..., None]) * scale).astype(q.dtype)
    # Three products read these two: without the barrier each would redo the exponentials on its own.
    d_scores, weights = jax.lax.optimization_barrier((d_scores, weights.astype(v.dtype)))
    d_q = _product("bkrs,bksd->bkrd", d_scores, k).reshape(q.shape).astype(q.dtype)
    d_k = _product("bkrs,bkrd->bksd", d_scores, _merge(q))
    return (sums[0] + d_k, sums[1] + _product("bkrs,bkrd->bksd", weights, d_out)), d_q


_attention.defvjp(_forward, _backward)
