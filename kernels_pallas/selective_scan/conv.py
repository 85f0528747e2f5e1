"""The causal convolution as a Pallas TPU kernel. It reads x once; XLA reads x once per tap and keeps masked copies.

It is not fused with the scan, because step size, B and C are matrix products over all channels of its output.
The rows of a chunk are in scratch with 8 rows of the neighbouring chunk, so that a shift in time is a load at another row.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.selective_scan.reference import TAPS, resolve_tails
from kernels_pallas.selective_scan.tiling import (
    LANES,
    SUBLANES,
    columns_of,
    in_both_cases,
    pad,
    round_up,
    sigmoid,
)
from kernels_pallas.selective_scan.xla import borrowed_taps, convolve, final_tail, segment_offsets

GROUP = 16  # tokens of an inner step: one packed bf16 tile of rows; its start bits and its neighbours' fit in one word
PAST = TAPS - 2  # bits before the group's own in its word of starts: starts further back affect no token
WORD = PAST + GROUP + TAPS - 1


@dataclasses.dataclass(frozen=True)
class ConvPlan:
    """Static facts of a call: padded sizes and tiles."""

    batch: int
    chunks: int
    chunk: int
    tiles: int
    width: int
    resets: bool
    interpret: bool | pltpu.InterpretParams

    def rows(self, size: int, reverse: bool = False) -> pl.BlockSpec:
        """A block of [batch, chunks * size, channels]."""
        return pl.BlockSpec((1, size, self.width), lambda b, c, t: (b, self.chunks - 1 - t if reverse else t, c))

    def words(self, reverse: bool = False) -> pl.BlockSpec:
        block = (1, 1, 1, self.chunk // GROUP)
        index = lambda b, c, t: (b, self.chunks - 1 - t if reverse else t, 0, 0)  # noqa: E731
        return pl.BlockSpec(block, index, memory_space=pltpu.SMEM)

    def weights(self) -> pl.BlockSpec:
        return pl.BlockSpec((SUBLANES, self.width), lambda b, c, t: (0, c))

    def strip(self, extra: int) -> object:
        """Scratch of a chunk and `extra` rows with separate lane columns, so that a load can start at any row."""
        return pltpu.VMEM((self.width // LANES, self.chunk + extra, LANES), jnp.float32)

    def call(self) -> dict[str, object]:
        semantics = ("parallel", "parallel", "arbitrary")
        return {
            "grid": (self.batch, self.tiles, self.chunks),
            "interpret": self.interpret,
            "compiler_params": pltpu.CompilerParams(dimension_semantics=semantics),
        }


def causal_conv_tpu(
    x: Float[Array, "B T C"],
    w: Float[Array, "C K"],
    b: Float[Array, " C"],
    *,
    initial_tail: Float[Array, "B K-1 C"] | None = None,
    reset_tail: Float[Array, "K-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int = 256,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """Same contract as `causal_conv_reference`, for float32 and bfloat16. Raises ValueError for another dtype or chunk."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"causal_conv_tpu takes float32 or bfloat16 inputs, not {x.dtype}: use the xla implementation")
    if chunk % GROUP:
        raise ValueError(f"chunk = {chunk}: the kernel works on groups of {GROUP} tokens, so it must be a multiple of {GROUP}")
    initial_tail, reset_tail = resolve_tails(x, w.shape[1], initial_tail, reset_tail)
    missing = TAPS - w.shape[1]  # a narrower convolution is one of width 4 whose first taps are zero
    w, initial_tail, reset_tail = (
        jnp.pad(part, [(0, 0)] * axis + [(missing, 0)] + [(0, 0)] * (part.ndim - axis - 1))
        for part, axis in ((w, 1), (initial_tail, 1), (reset_tail, 0))
    )
    offset = segment_offsets(x, segment_ids)
    batch, length, channels = x.shape
    chunk = min(chunk, round_up(length, GROUP))
    width = LANES * columns_of(-(-channels // LANES))
    plan = ConvPlan(
        batch=batch,
        chunks=-(-length // chunk),
        chunk=chunk,
        tiles=-(-channels // width),
        width=width,
        resets=segment_ids is not None,
        interpret=interpret,
    )
    y = _convolve(plan, x, w.astype(jnp.float32), b.astype(jnp.float32), initial_tail, reset_tail, offset)
    return y, final_tail(x, initial_tail, reset_tail, offset)[:, missing:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: ConvPlan, x: Array, w: Array, b: Array, initial_tail: Array, reset_tail: Array, offset: Array) -> Array:
    words, rows, halo, weights = _operands(plan, x, w, b, initial_tail, reset_tail, offset)
    y = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        in_specs=[plan.words(), plan.rows(plan.chunk), plan.rows(SUBLANES), plan.weights()],
        out_specs=plan.rows(plan.chunk),
        scratch_shapes=[plan.strip(SUBLANES)],
        name="causal_conv_forward",
        **plan.call(),
    )(words, rows, halo, weights)
    return y[:, : x.shape[1], : x.shape[2]]


def _convolve_forward(plan: ConvPlan, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _convolve(plan, *arrays), arrays


def _convolve_backward(plan: ConvPlan, saved: tuple[Array, ...], d_y: Array) -> tuple[Array | None, ...]:
    x, w, b, initial_tail, reset_tail, offset = saved
    words, rows, halo, weights = _operands(plan, *saved)
    length, channels = x.shape[1:]
    sums = (plan.batch, SUBLANES, SUBLANES, plan.tiles * plan.width)
    row = plan.rows(plan.chunk, reverse=True)
    d_x, d_weights = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        out_shape=[jax.ShapeDtypeStruct(rows.shape, rows.dtype), jax.ShapeDtypeStruct(sums, jnp.float32)],
        in_specs=[plan.words(reverse=True), row, plan.rows(SUBLANES, reverse=True), plan.weights(), row],
        out_specs=[row, pl.BlockSpec((1, SUBLANES, SUBLANES, plan.width), lambda b, c, t: (b, 0, 0, c))],
        scratch_shapes=[plan.strip(SUBLANES), plan.strip(SUBLANES)],
        name="causal_conv_backward",
        **plan.call(),
    )(words, rows, halo, weights, pad(d_y, rows.shape[1], rows.shape[2]))
    d_weights = d_weights.sum((0, 2))[:, :channels]
    _, through_taps = jax.vjp(lambda w, tail: borrowed_taps(w, tail.astype(jnp.float32)), w, reset_tail)
    d_w, d_reset_tail = through_taps(d_weights[TAPS + 1 :])
    # Only the first three tokens see the initial tail.
    head = slice(0, TAPS - 1)
    _, to_tail = jax.vjp(lambda tail: convolve(x[:, head], w, b, tail, reset_tail, offset[:, head]), initial_tail)
    d_x = d_x[:, :length, :channels]
    return d_x, d_w + d_weights[:TAPS].T, d_weights[TAPS], *to_tail(d_y[:, head]), d_reset_tail, None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _operands(
    plan: ConvPlan, x: Array, w: Array, b: Array, initial_tail: Array, reset_tail: Array, offset: Array
) -> tuple[Array, Array, Array, Array]:
    """(words of starts, padded rows, the 8 rows before each chunk, taps + bias + borrowed taps as float32[8, channels])."""
    length, channels = plan.chunks * plan.chunk, plan.tiles * plan.width
    rows = pad(x, length, channels)
    last = rows.reshape(plan.batch, plan.chunks, plan.chunk, channels)[:, :-1, plan.chunk - SUBLANES :]
    first = jnp.pad(pad(initial_tail, channels), ((0, 0), (SUBLANES - TAPS + 1, 0), (0, 0)))[:, None]
    halo = jnp.concatenate([first, last], axis=1).reshape(plan.batch, -1, channels)
    weights = jnp.concatenate([w.T, b[None], borrowed_taps(w, reset_tail.astype(jnp.float32))])
    starts = jnp.pad((offset == 0).astype(jnp.int32), ((0, 0), (PAST, length - offset.shape[1] + WORD)))
    words = sum(starts[:, i : i + length : GROUP] << i for i in range(WORD))
    return words.reshape(plan.batch, plan.chunks, 1, plan.chunk // GROUP), rows, halo, pad(weights, channels)


def _store(strip: object, row: Array | int, x_RxW: Array) -> None:
    for column in range(strip.shape[0]):
        strip[column, pl.ds(row, x_RxW.shape[0])] = x_RxW[:, column * LANES : (column + 1) * LANES]


def _load(strip: object, row: Array | int, size: int = GROUP) -> Array:
    return jnp.concatenate([strip[column, pl.ds(row, size)] for column in range(strip.shape[0])], axis=1)


def _bit(word: Array, back: int, width: int) -> Array:
    """int32[G, W]: 1 where the token `back` positions before this one starts a segment (negative: after it)."""
    token = jax.lax.broadcasted_iota(jnp.int32, (GROUP, width), 0)
    return (word >> (token + (PAST - back))) & 1


def _each_group(plan: ConvPlan, words_ref: object, step, reverse: bool) -> None:
    """Call step(first row of the group, its word of starts) for each group; the word is None if no start is near."""
    groups = plan.chunk // GROUP

    def group(i: Array, carry: None) -> None:
        index = groups - 1 - i if reverse else i
        word = words_ref[0, 0, 0, index] if plan.resets else None
        in_both_cases(word, lambda word: step(pl.multiple_of(index * GROUP, GROUP), word))

    jax.lax.fori_loop(0, groups, group, None)


def _taps(strip: object, row: Array, word: Array | None) -> tuple[list[Array], list[Array]]:
    """(input of each tap, oldest first, [G, W] each; int32 masks of the tokens at offsets 0, 1, 2 of a segment)."""
    shifted = [_load(strip, row + SUBLANES - lag) for lag in reversed(range(TAPS))]
    if word is None:
        return shifted, []
    width = shifted[0].shape[1]
    offsets, near = [], jnp.zeros((GROUP, width), jnp.int32)
    for back in range(TAPS - 1):
        start = _bit(word, back, width)
        offsets.append(start & (1 - near))
        near = near | start
        # A token at offset `back` or less has no earlier token of its segment further back than that.
        tap = TAPS - 2 - back
        shifted[tap] = jnp.where(near == 0, shifted[tap], 0.0)
    return shifted, offsets


def _before_silu(weights_ref: object, taps: list[Array], offsets: list[Array]) -> Array:
    pre = weights_ref[TAPS : TAPS + 1] + sum(weights_ref[i : i + 1] * tap for i, tap in enumerate(taps))
    for i, offset in enumerate(offsets):
        pre = pre + jnp.where(offset == 1, weights_ref[TAPS + 1 + i : TAPS + 2 + i], 0.0)
    return pre


def _forward_kernel(plan: ConvPlan, words_ref, x_ref, halo_ref, weights_ref, y_ref, strip) -> None:
    _store(strip, 0, halo_ref[0].astype(jnp.float32))

    def step(row: Array, word: Array | None) -> None:
        rows = pl.ds(row, GROUP)
        _store(strip, row + SUBLANES, x_ref[0, rows].astype(jnp.float32))
        pre = _before_silu(weights_ref, *_taps(strip, row, word))
        y_ref[0, rows] = (pre * sigmoid(pre)).astype(y_ref.dtype)

    _each_group(plan, words_ref, step, reverse=False)


def _backward_kernel(
    plan: ConvPlan, words_ref, x_ref, halo_ref, weights_ref, d_y_ref, d_x_ref, sums_ref, x_strip, d_strip
) -> None:
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)
        _store(d_strip, plan.chunk, jnp.zeros((SUBLANES, plan.width), jnp.float32))

    @pl.when(t > 0)
    def _() -> None:  # the next chunk's first rows, which this chunk's last tokens affect
        _store(d_strip, plan.chunk, _load(d_strip, 0, SUBLANES))

    _store(x_strip, 0, halo_ref[0].astype(jnp.float32))

    def spread(row: Array, word: Array | None) -> None:
        _store(x_strip, row + SUBLANES, x_ref[0, pl.ds(row, GROUP)].astype(jnp.float32))

    def step(row: Array, word: Array | None) -> None:
        rows = pl.ds(row, GROUP)
        taps, offsets = _taps(x_strip, row, word)
        pre = _before_silu(weights_ref, taps, offsets)
        open_ = sigmoid(pre)
        d_pre = d_y_ref[0, rows].astype(jnp.float32) * (open_ + pre * open_ * (1.0 - open_))
        _store(d_strip, row, d_pre)
        terms = [*(d_pre * tap for tap in taps), d_pre, *(jnp.where(offset == 1, d_pre, 0.0) for offset in offsets)]
        for i, term in enumerate(terms):
            sums_ref[0, i] += term[:SUBLANES] + term[SUBLANES:]
        d_x = weights_ref[TAPS - 1 : TAPS] * d_pre
        between = jnp.zeros(d_x.shape, jnp.int32)
        for lag in range(1, TAPS):
            later = _load(d_strip, row + lag)
            if word is not None:  # if a segment starts between the two tokens, they are independent
                between = between | _bit(word, -lag, plan.width)
                later = jnp.where(between == 0, later, 0.0)
            d_x = d_x + weights_ref[TAPS - 1 - lag : TAPS - lag] * later
        d_x_ref[0, rows] = d_x.astype(d_x_ref.dtype)

    jax.lax.fori_loop(0, plan.chunk // GROUP, lambda i, carry: spread(pl.multiple_of(i * GROUP, GROUP), None), None)
    _each_group(plan, words_ref, step, reverse=True)
