"""The selective scan in chunks, for any platform. The backward pass keeps the state before each chunk and recomputes the rest.

The backward pass holds T / chunk states plus the [chunk, C, N] arrays of one chunk, never [T, C, N]. Inside a chunk, tokens are
processed in sequence on a CPU (least work), and as a tree elsewhere (log2(chunk) launches instead of chunk). The chunks of a CPU
are short, so that the states of one stay in its caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
    chunk: int | None = None,
    within: str = "auto",
) -> tuple[Float[Array, "B T C"], Float[Array, "B C N"]]:
    """Same contract as `selective_scan_reference`, computed `chunk` tokens at a time (None: 16 in sequence, 128 as a tree).

    `within`: "sequential" or "associative" inside a chunk; "auto" is sequential if the program is lowered for a CPU.
    """
    dtype = scan_dtype(u)
    A, D, dt_bias = (x.astype(dtype) for x in (A, D, dt_bias))
    initial_state, reset_state = resolve_states(initial_state, reset_state, u.shape[0], A)
    reset = resolve_resets(reset, segment_ids)
    if reset is None:
        reset = jnp.zeros(u.shape[:2], bool)
    ways = {"sequential": (_sequential, chunk or 16), "associative": (_associative, chunk or 128)}
    operands = u, dt, A, B, C, D, dt_bias, z, initial_state, reset_state, reset
    if within == "auto":
        sequential, tree = (functools.partial(_in_chunks, *way) for way in ways.values())
        return jax.lax.platform_dependent(*operands, cpu=sequential, default=tree)
    return _in_chunks(*ways[within], *operands)


def _in_chunks(run: Callable, chunk: int, *operands: Array | None) -> tuple[Array, Array]:
    """`selective_scan_xla` of arrays whose states and resets are given, with `run` inside a chunk."""
    u, dt, A, B, C, D, dt_bias, z, initial_state, reset_state, reset = operands
    dtype, chunk = A.dtype, min(chunk, u.shape[1])

    @jax.checkpoint
    def step(h: Array, tokens: tuple[Array | None, ...]) -> tuple[Array, Array]:
        u, dt, b, c, z, reset = tokens  # time is the first axis
        u, b, c = (x.astype(dtype) for x in (u, b, c))
        s = jax.nn.softplus(dt.astype(dtype) + dt_bias)
        y, h = run(h, s, s * u, b, c, reset, A, reset_state)
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


@jax.custom_vjp
def _sequential(
    h: Array, s: Array, su: Array, b: Array, c: Array, reset: Array, A: Array, reset_state: Array
) -> tuple[Array, Array]:
    """(y [t,B,C] before skip and gate, state after the chunk), one token at a time.

    h [B,C,N]; s = step size and su = s u, [t,B,C]; b, c [t,B,N]; reset [t,B].
    """
    return _sequential_forward(h, s, su, b, c, reset, A, reset_state, keep=False)[0]


def _sequential_forward(
    h: Array, s: Array, su: Array, b: Array, c: Array, reset: Array, A: Array, reset_state: Array, keep: bool = True
) -> tuple[tuple[Array, Array], tuple]:
    """Channels are the last axis, where they fill vector registers, because N is small. Unrolling only slows compilation."""
    rates, to_state = A.T, reset_state.T

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array | None]]:
        s, su, b, c, start = token
        h = jnp.where(start[:, None, None], to_state, h)
        h = jnp.exp(s[:, None, :] * rates) * h + su[:, None, :] * b[:, :, None]
        return h, (jnp.sum(h * c[:, :, None], axis=1), h if keep else None)

    first = h.swapaxes(1, 2)
    last, (y, states) = jax.lax.scan(step, first, (s, su, b, c, reset))
    return (y, last.swapaxes(1, 2)), (s, su, b, c, reset, rates, to_state, first, states)


def _sequential_backward(saved: tuple, gradients: tuple[Array, Array]) -> tuple:
    """The recurrence in reverse; `g` is the gradient of a token's state."""
    s, su, b, c, reset, rates, to_state, first, states = saved
    dy, dh = gradients
    before = jnp.concatenate([first[None], states[:-1]])

    def step(carry: tuple[Array, Array, Array], token: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], tuple]:
        later, dA, dreset = carry
        s, b, c, start, before, dy = token
        start = start[:, None, None]
        g = dy[:, None, :] * c[:, :, None] + later
        earlier = jnp.exp(s[:, None, :] * rates) * g
        of_rate = earlier * jnp.where(start, to_state, before)
        dA, dreset = dA + jnp.sum(of_rate * s[:, None, :], axis=0), dreset + jnp.sum(jnp.where(start, earlier, 0.0), axis=0)
        return (jnp.where(start, 0.0, earlier), dA, dreset), (
            g,
            jnp.sum(g * b[:, :, None], axis=1),
            jnp.sum(of_rate * rates, axis=1),
        )

    carry = dh.swapaxes(1, 2), jnp.zeros_like(rates), jnp.zeros_like(rates)
    (dh, dA, dreset), (g, dsu, ds) = jax.lax.scan(step, carry, (s, b, c, reset, before, dy), reverse=True)
    db, dc = jnp.einsum("tbnc,tbc->tbn", g, su), jnp.einsum("tbnc,tbc->tbn", states, dy)
    return dh.swapaxes(1, 2), ds, dsu, db, dc, np.zeros(reset.shape, jax.dtypes.float0), dA.T, dreset.T


_sequential.defvjp(_sequential_forward, _sequential_backward)


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
