"""The selective scan and its convolution written as the formulas, one token at a time. All fast paths are tested against it.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao 2023, arXiv 2312.00752), algorithm 2, with the
simplified Euler rule for B that the authors' code uses. Segments (packed documents) are an addition: each starts from a
given state, the state after a shared prefix of meta tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WIDTHS = (2, 3, 4)  # of the convolution: the current token and those before it
TAPS = max(WIDTHS)


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a token's segment id differs from the previous token's. The first token of a row is not a start."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def resolve_resets(reset: Bool[Array, "B T"] | None, segment_ids: Int[Array, "B T"] | None) -> Bool[Array, "B T"] | None:
    """`reset`, or the starts of `segment_ids`, or None if neither is given. Raises ValueError if both are given."""
    if reset is not None and segment_ids is not None:
        raise ValueError("give reset or segment_ids, not both: segment_ids already say where a segment starts")
    return reset if segment_ids is None else segment_starts(segment_ids)


def resolve_states(
    initial_state: Float[Array, "B C N"] | None, reset_state: Float[Array, "C N"] | None, batch: int, like: Float[Array, "C N"]
) -> tuple[Float[Array, "B C N"], Float[Array, "C N"]]:
    """Both states as arrays of `like`'s dtype: `reset_state` defaults to zeros, `initial_state` to `reset_state`."""
    reset_state = jnp.zeros_like(like) if reset_state is None else reset_state.astype(like.dtype)
    if initial_state is None:
        return jnp.broadcast_to(reset_state, (batch, *like.shape)), reset_state
    return initial_state.astype(like.dtype), reset_state


def resolve_tails(x: Array, width: int, initial_tail: Array | None, reset_tail: Array | None) -> tuple[Array, Array]:
    """Both tails in x's dtype: `reset_tail` [K-1,C] defaults to zeros, `initial_tail` [B,K-1,C] to `reset_tail`.

    Raises ValueError for a width K that is not in `WIDTHS`, and for tails whose shape does not match.
    """
    if width not in WIDTHS:
        raise ValueError(f"a convolution of width {width}: widths from {WIDTHS[0]} to {WIDTHS[-1]} are supported")
    reset_tail = jnp.zeros((width - 1, x.shape[2]), x.dtype) if reset_tail is None else reset_tail.astype(x.dtype)
    tail = jnp.broadcast_to(reset_tail, (x.shape[0], *reset_tail.shape)) if initial_tail is None else initial_tail.astype(x.dtype)
    if (reset_tail.shape[0], tail.shape[1]) != (width - 1, width - 1):
        raise ValueError(
            f"tails of {reset_tail.shape[0]} and {tail.shape[1]} tokens: a convolution of width {width} has {width - 1}"
        )
    return tail, reset_tail


def scan_dtype(u: Array) -> jnp.dtype:
    """The compute dtype of the scan: float64 for float64 inputs, float32 for all others."""
    return jnp.promote_types(u.dtype, jnp.float32)


def selective_scan_reference(
    u: Float[Array, "B T C"],
    dt: Float[Array, "B T C"],
    A: Float[Array, "C N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " C"],
    dt_bias: Float[Array, " C"],
    z: Float[Array, "B T C"] | None = None,
    *,
    initial_state: Float[Array, "B C N"] | None = None,
    reset_state: Float[Array, "C N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C N"]]:
    """(y, final state) of the Mamba-1 scan with its step size, skip and gate.

    s_t = softplus(dt_t + dt_bias); h_t = exp(s_t A) h_(t-1) + s_t u_t B_t; y_t = (h_t C_t + D u_t) silu(z_t).
    A is negative. Where `reset` is true (or `segment_ids` change), h_(t-1) is replaced by `reset_state` (None: zeros). The
    row starts from `initial_state` (None: `reset_state`). `z` None omits the gate. State and arithmetic are float32,
    or float64 for float64 inputs; y has the dtype of u, the state that of the arithmetic.
    Raises ValueError if both `reset` and `segment_ids` are given.
    """
    dtype = scan_dtype(u)
    A, D, dt_bias = (x.astype(dtype) for x in (A, D, dt_bias))
    initial_state, reset_state = resolve_states(initial_state, reset_state, u.shape[0], A)
    reset = resolve_resets(reset, segment_ids)
    if reset is None:
        reset = jnp.zeros(u.shape[:2], bool)

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        s, u, b, c, start = token
        h = jnp.where(start[:, None, None], reset_state, h)
        h = jnp.exp(s[:, :, None] * A) * h + (s * u)[:, :, None] * b[:, None, :]
        return h, jnp.sum(h * c[:, None, :], axis=-1)

    s = jax.nn.softplus(dt.astype(dtype) + dt_bias)
    tokens = (s, *(x.astype(dtype) for x in (u, B, C)), reset)
    final, y = jax.lax.scan(step, initial_state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    y = jnp.moveaxis(y, 0, 1) + D * u.astype(dtype)
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), final


def causal_conv_reference(
    x: Float[Array, "B T C"],
    w: Float[Array, "C K"],
    b: Float[Array, " C"],
    *,
    initial_tail: Float[Array, "B K-1 C"] | None = None,
    reset_tail: Float[Array, "K-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """(silu(b + sum_k w[:, k] x_(t-K+1+k)), the last K-1 inputs): depthwise, causal, the last tap on the current token, K one of `WIDTHS`.

    `initial_tail` precedes the row (None: `reset_tail`); `reset_tail` precedes each later segment (None: zeros). Tails are
    oldest first. The final tail is the `initial_tail` of a call that continues the last segment.
    """
    dtype = scan_dtype(x)
    initial_tail, reset_tail = resolve_tails(x, w.shape[1], initial_tail, reset_tail)
    starts = jnp.zeros(x.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)

    def step(tail: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        x, start = token
        tail = jnp.where(start[:, None, None], reset_tail, tail)
        window = jnp.concatenate([tail, x[:, None]], axis=1)
        y = jnp.einsum("bkc,ck->bc", window.astype(dtype), w.astype(dtype)) + b.astype(dtype)
        return window[:, 1:], jax.nn.silu(y)

    tail, y = jax.lax.scan(step, initial_tail, (jnp.moveaxis(x, 1, 0), starts.T))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), tail
