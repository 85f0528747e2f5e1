"""Attention written as the formula: dense, with one T x S array of scores. All fast paths are tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_reference(
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
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """softmax(scale * q k^T + mask) v and its log-sum-exp, where key k is visible to the queries k <= q < expiry[k].

    With a `window`, a query sees only its own and that many earlier keys. It is part of the mask and static, so that an
    implementation may rely on it.

    Query row t is at key index t + q_offset (any integer, also traced). None means S - T, so that with T < S the queries
    continue a row of earlier keys. `prefix_k` and `prefix_v` are additional keys and values that every query of every row sees.
    Query head h reads KV head h // (H / KV). Scores and softmax are float32 (float64 for float64 inputs). `out` has the dtype
    of `v`; `lse` (natural logarithm, scaled scores) has the dtype of the softmax. A row without any visible key gives out 0,
    lse -inf and gradients 0.
    """
    expiry = within(window, expiry)
    q_index = jnp.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1] if q_offset is None else q_offset)
    k_index = jnp.arange(k.shape[1])[None, :]
    allow = (k_index <= q_index) & (q_index < expiry[:, None, :])
    if prefix_k is not None:
        k, v, allow = (
            with_prefix(prefix_k, k),
            with_prefix(prefix_v, v),
            jnp.pad(allow, ((0, 0), (0, 0), (len(prefix_k), 0)), constant_values=True),
        )
    return masked_attention(q, k, v, allow, scale=scale)


def within(window: int | None, expiry: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The expiries in a window."""
    return expiry if window is None else jnp.minimum(expiry, jnp.arange(expiry.shape[1]) + window + 1).astype(expiry.dtype)


def with_prefix(prefix: Float[Array, "M KV D"], x: Float[Array, "B S KV D"]) -> Float[Array, "B M+S KV D"]:
    """Concatenate the prefix keys (or values) before those of every row."""
    return jnp.concatenate([jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape)), x], axis=1)


def masked_attention(
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B S KV Dq"],
    v: Float[Array, "B S KV Dv"],
    allow: Bool[Array, "B T S"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """`attention_reference` for any mask, given as bool[B, T, S]."""
    probabilities, lse = masked_softmax(q, k, allow, scale=scale)
    grouped = probabilities.reshape(*k.shape[:1], k.shape[2], -1, *probabilities.shape[2:])
    out = jnp.einsum("bkgts,bskd->btkgd", grouped, v.astype(probabilities.dtype))
    return out.reshape(*q.shape[:3], v.shape[3]).astype(v.dtype), lse


def masked_softmax(
    q: Float[Array, "B T H Dq"], k: Float[Array, "B S KV Dq"], allow: Bool[Array, "B T S"], *, scale: float
) -> tuple[Float[Array, "B H T S"], Float[Array, "B T H"]]:
    """Attention probabilities, [B, H, T, S], and log-sum-exp, [B, T, H], of a dense mask; float32, or float64 for float64 inputs."""
    batch, length, heads, width = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.astype(dtype).reshape(batch, length, k.shape[2], -1, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k.astype(dtype)) * scale
    scores = scores.reshape(batch, heads, length, k.shape[1])
    allow = allow[:, None]
    # Both branches of each `where` are finite, because a NaN in the unused branch would still reach the gradient.
    peak = jnp.max(scores, axis=-1, keepdims=True, where=allow, initial=-jnp.inf)
    any_key = jnp.isfinite(peak)
    peak = jax.lax.stop_gradient(jnp.where(any_key, peak, 0.0))
    weights = jnp.where(allow, jnp.exp(jnp.where(allow, scores - peak, 0.0)), 0.0)
    total = jnp.where(any_key, jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    lse = jnp.where(any_key, peak + jnp.log(total), -jnp.inf)
    return weights / total, jnp.moveaxis(lse[..., 0], 1, 2)
