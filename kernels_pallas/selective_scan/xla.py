"""The selective scan in chunks, for any platform. The backward pass keeps the state before each chunk and recomputes the rest.

The backward pass holds T / chunk states plus the [chunk, C, N] arrays of one chunk, never [T, C, N]. Inside a chunk, tokens are
processed in sequence on a CPU (least work), and as a tree elsewhere (log2(chunk) launches instead of chunk).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.selective_scan.reference import (
    TAPS,
    resolve_resets,
    resolve_states,
    resolve_tails,
    scan_dtype,
    segment_starts,
)


def selective_scan_xla(
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
    chunk: int = 128,
    within: str = "auto",
) -> tuple[Float[Array, "B T C"], Float[Array, "B C N"]]:
    """Same contract as `selective_scan_reference`, computed `chunk` tokens at a time.

    `within`: "sequential" or "associative" inside a chunk; "auto" is sequential if the program is lowered for a CPU.
    """
    dtype = scan_dtype(u)
    A, D, dt_bias = (x.astype(dtype) for x in (A, D, dt_bias))
    initial_state, reset_state = resolve_states(initial_state, reset_state, u.shape[0], A)
    reset = resolve_resets(reset, segment_ids)
    if reset is None:
        reset = jnp.zeros(u.shape[:2], bool)
    chunk = min(chunk, u.shape[1])

    @jax.checkpoint
    def step(h: Array, tokens: tuple[Array | None, ...]) -> tuple[Array, Array]:
        u, dt, b, c, z, reset = tokens  # time is the first axis
        u, b, c = (x.astype(dtype) for x in (u, b, c))
        s = jax.nn.softplus(dt.astype(dtype) + dt_bias)
        y, h = _run(within, h, s, s * u, b, c, reset, A, reset_state)
        y = y + D * u
        return h, (y if z is None else y * jax.nn.silu(z.astype(dtype))).astype(tokens[0].dtype)

    # Whole chunks are scanned; the remaining tokens form one shorter chunk.
    whole = u.shape[1] // chunk * chunk
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (u, dt, B, C, z, reset))
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), tokens)
    h, y = jax.lax.scan(step, initial_state, chunks)
    y = y.reshape(whole, *y.shape[2:])
    if whole < u.shape[1]:
        h, rest = step(h, jax.tree.map(lambda x: x[whole:], tokens))
        y = jnp.concatenate([y, rest])
    return jnp.moveaxis(y, 0, 1), h


def _run(within: str, *operands: Array) -> tuple[Array, Array]:
    """One chunk, sequential or as a tree: (y [t, B, C] before skip and gate, state after the chunk)."""
    if within == "auto":
        return jax.lax.platform_dependent(*operands, cpu=_sequential, default=_associative)
    return {"sequential": _sequential, "associative": _associative}[within](*operands)


def _sequential(
    h: Array, s: Array, su: Array, b: Array, c: Array, reset: Array, A: Array, reset_state: Array
) -> tuple[Array, Array]:
    """h [B,C,N]; s = step size and su = s u, [t,B,C]; b, c [t,B,N]; reset [t,B].

    Inside, channels are the last axis, where they fill vector registers, because N is small. Unrolling only slows compilation.
    """
    rates, reset_state = A.T, reset_state.T

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        s, su, b, c, start = token
        h = jnp.where(start[:, None, None], reset_state, h)
        h = jnp.exp(s[:, None, :] * rates) * h + su[:, None, :] * b[:, :, None]
        return h, jnp.sum(h * c[:, :, None], axis=1)

    h, y = jax.lax.scan(step, h.swapaxes(1, 2), (s, su, b, c, reset))
    return y, h.swapaxes(1, 2)


def _associative(
    h: Array, s: Array, su: Array, b: Array, c: Array, reset: Array, A: Array, reset_state: Array
) -> tuple[Array, Array]:
    """`_sequential` as a tree: a reset token has decay 0 and adds its decayed `reset_state` to its input."""
    start = reset[:, :, None, None]
    decay = jnp.exp(s[..., None] * A)
    x = su[..., None] * b[:, :, None, :]
    x = jnp.where(start, decay * reset_state + x, x)
    decay = jnp.where(start, 0.0, decay)

    def combine(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], late[0] * early[1] + late[1]

    decay, x = jax.lax.associative_scan(combine, (decay, x))
    states = decay * h + x
    return jnp.sum(states * c[:, :, None, :], axis=-1), states[-1]


def causal_conv_xla(
    x: Float[Array, "B T C"],
    w: Float[Array, "C K"],
    b: Float[Array, " C"],
    *,
    initial_tail: Float[Array, "B K-1 C"] | None = None,
    reset_tail: Float[Array, "K-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """Same contract as `causal_conv_reference`, by shifts, multiplies and adds. The backward pass saves only the inputs."""
    initial_tail, reset_tail = resolve_tails(x, w.shape[1], initial_tail, reset_tail)
    offset = segment_offsets(x, segment_ids)
    y = convolve(x, w, b, initial_tail, reset_tail, offset)
    return y, final_tail(x, initial_tail, reset_tail, offset)


def segment_offsets(x: Array, segment_ids: Array | None) -> Array:
    """int32[B,T], tokens since the segment's start. Before the first start it is at least 3, so `reset_tail` is not read."""
    index = jnp.arange(x.shape[1])
    starts = jnp.zeros(x.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    return index - jax.lax.cummax(jnp.where(starts, index, -TAPS), axis=1)


def borrowed_taps(w: Array, reset_tail: Array) -> Array:
    """[K-1,C]: what `reset_tail` adds to the first K-1 tokens of a segment."""
    taps, before = jnp.moveaxis(w, 1, 0), w.shape[1] - 1
    return jnp.stack([sum(taps[i - first] * reset_tail[i] for i in range(first, before)) for first in range(before)])


@jax.checkpoint
def convolve(x: Array, w: Array, b: Array, initial_tail: Array, reset_tail: Array, offset: Array) -> Array:
    """silu of the masked shifts [B,T,C]."""
    length, before, dtype = x.shape[1], w.shape[1] - 1, scan_dtype(x)
    w = w.astype(dtype)
    extended = jnp.concatenate([initial_tail, x], axis=1).astype(dtype)
    offset = offset[:, :, None]
    y = b.astype(dtype) + w[:, -1] * x.astype(dtype)
    for lag in range(1, before + 1):
        shifted = extended[:, before - lag : before - lag + length]
        y = y + w[:, before - lag] * jnp.where(offset >= lag, shifted, 0.0)
    for first, taps in enumerate(borrowed_taps(w, reset_tail.astype(dtype))):
        y = y + jnp.where(offset == first, taps, 0.0)
    return jax.nn.silu(y).astype(x.dtype)


def final_tail(x: Array, initial_tail: Array, reset_tail: Array, offset: Array) -> Array:
    """[B,K-1,C]: the last K-1 inputs of the last segment, filled from `reset_tail` if it is shorter."""
    seen, before = offset[:, -1:] + 1, len(reset_tail)
    position = jnp.arange(before)
    borrowed = jnp.take(reset_tail, jnp.minimum(position + seen, before - 1), axis=0)
    last = jnp.concatenate([initial_tail, x], axis=1)[:, x.shape[1] :]
    return jnp.where((position + seen < before)[:, :, None], borrowed, last)
