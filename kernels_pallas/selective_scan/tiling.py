"""Shared code of the forward and backward kernels: the plan of a call, its operands, and parts of the inner loops.

Names inside kernels end in their shape: T tokens of a chunk, G tokens of a group, N states (sublanes), W channels of a tile
(lanes), L = 128 lanes, S = 8 sublanes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

T = TypeVar("T")

LANES = 128
SUBLANES = 8
GROUP = 32  # tokens unrolled in the scan's inner loops: whole packed bf16 tiles of rows, and one bit per token in a word
SPREAD = 16  # tokens unrolled in the loops that run once per chunk for all channel tiles
WIDEST = 5  # lane columns of a tile; more would spill registers
VMEM_BYTES = 48 * 2**20  # of 64 MiB (tpu7x) to 128 MiB (v5e, v6e)
LOG2_E = 1.4426950408889634
# log1p(e) / e on [0, 1], Chebyshev fit of degree 8, relative error 3e-8. Softplus of a small step size (1e-3) must keep its
# relative precision, which log(1 + e) loses.
LOG1P = (
    0.999999970540657,
    -0.49999501516786815,
    0.33319271342491946,
    -0.2484436989238459,
    0.19111431080246266,
    -0.13674769704837997,
    0.0783616680109936,
    -0.029588507388484703,
    0.005253457796023025,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a call: padded sizes, tiles, and which parts exist."""

    batch: int
    chunks: int  # time chunks of `chunk` tokens
    chunk: int
    tiles: int  # channel tiles of `width` lanes
    width: int
    states: int  # a multiple of 8
    gated: bool
    resets: bool
    interpret: bool | pltpu.InterpretParams

    @property
    def length(self) -> int:
        return self.chunks * self.chunk

    @property
    def channels(self) -> int:
        return self.tiles * self.width

    def rows(self, reverse: bool = False) -> pl.BlockSpec:
        """A block of [batch, length, channels]."""
        return pl.BlockSpec((1, self.chunk, self.width), lambda b, t, c: (b, self.time(t, reverse), c))

    def per_chunk(self, *shape: int, reverse: bool = False, **kwargs: object) -> pl.BlockSpec:
        """A block of [batch, chunks, *shape]: all of one chunk."""
        rest = (0,) * len(shape)
        return pl.BlockSpec((1, 1, *shape), lambda b, t, c: (b, self.time(t, reverse), *rest), **kwargs)

    def starts(self, reverse: bool = False) -> pl.BlockSpec:
        """A block of [batch, chunks, tiles, states, width]."""
        block = (1, 1, 1, self.states, self.width)
        return pl.BlockSpec(block, lambda b, t, c: (b, self.time(t, reverse), c, 0, 0))

    def shared(self, rows: int) -> pl.BlockSpec:
        """The whole of [tiles, rows, width], resident."""
        return pl.BlockSpec((self.tiles, rows, self.width), lambda b, t, c: (0, 0, 0))

    def per_row(self, rows: int) -> pl.BlockSpec:
        """One batch row of [batch, tiles, rows, width], resident; as an output it accumulates over time."""
        return pl.BlockSpec((1, self.tiles, rows, self.width), lambda b, t, c: (b, 0, 0, 0))

    def time(self, t: Array, reverse: bool) -> Array:
        return self.chunks - 1 - t if reverse else t

    @property
    def unroll(self) -> int:
        """Unrolling of the loops that run once per chunk for all channel tiles."""
        return 1 if self.interpret else SPREAD

    def tokens(self, step: Callable[[Array, T], T], carry: T, unroll: int) -> T:
        """carry = step(token, carry) for the tokens of a group, `unroll` at once, so that one token's waits overlap with the
        next token's work. Interpret mode does not unroll, because that would only slow compilation."""
        return jax.lax.fori_loop(0, GROUP, step, carry, unroll=1 if self.interpret else unroll)

    @property
    def parts(self) -> tuple[int, ...]:
        """Shape of the scratch of `store_part`: partial sums over states on 8 sublanes, by lane column and token."""
        return (self.width // LANES, GROUP * SUBLANES, LANES)

    @property
    def strip(self) -> tuple[int, ...]:
        """Shape of the scratch of `store_rows`: one group of rows, with separate lane columns."""
        return (self.width // LANES, GROUP, LANES)

    def call(self) -> dict[str, object]:
        """Arguments of both `pallas_call`s. Time is sequential, and so are channels, because they share one chunk's B and C."""
        semantics = ("parallel", "arbitrary", "arbitrary")
        return {
            "grid": (self.batch, self.chunks, self.tiles),
            "interpret": self.interpret,
            "compiler_params": pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES),
        }


class Operands(NamedTuple):
    """The kernel's inputs, padded and tiled; u, dt and z in their own dtype, all others float32."""

    u: Array  # [batch, length, channels]
    dt: Array
    z: Array | None
    a: Array  # [tiles, states, width], negative
    b: Array  # [batch, chunks, states, chunk]
    c: Array
    d: Array  # [tiles, 1, width]
    bias: Array
    initial: Array  # [batch, tiles, states, width]
    reset_state: Array  # [tiles, states, width]
    bits: Array  # int32 [batch, chunks, 1, chunk / GROUP]: bit i of a group is set where its token i starts a segment


def spread_lanes(pairs: Sequence[tuple[object, object]], unroll: int) -> None:
    """[1, 1, N, T] -> [T, N, L] for each (source, target): broadcasts each token's column of states to all lanes.

    Runs once per chunk for all channel tiles, and for B and C together so that their waits overlap.
    """
    states, tokens = pairs[0][0].shape[2:]
    lane = jax.lax.broadcasted_iota(jnp.int32, (states, tokens), 1)

    def body(t: Array, carry: None) -> None:
        for source_ref, target_ref in pairs:
            # The sum has only one nonzero term, so it is exact, and its result is on every lane.
            column_N = jnp.sum(jnp.where(lane == t, source_ref[0, 0], 0.0), axis=1, keepdims=True)
            target_ref[t] = jnp.broadcast_to(column_N, (states, LANES))

    jax.lax.fori_loop(0, tokens, body, None, unroll=unroll)


def across(x_NxL: Array, width: int) -> Array:
    """Repeat 128 lanes for every column of a tile. This costs no operation; the registers are reused."""
    return jnp.concatenate([x_NxL] * (width // LANES), axis=1)


def store_rows(strip_ref: object, x_GxW: Array) -> None:
    """Store a group of rows for `row_on_sublanes`."""
    for column in range(strip_ref.shape[0]):
        strip_ref[column] = x_GxW[:, column * LANES : (column + 1) * LANES]


def row_on_sublanes(strip_ref: object, token: Array, states: int) -> Array:
    """One row of a strip on every sublane, [N, W], by a load with stride 0; a broadcast in registers costs two operations."""
    columns = [strip_ref[column, pl.ds(token, 1)] for column in range(strip_ref.shape[0])]
    return jnp.concatenate([jnp.broadcast_to(x, (states, LANES)) for x in columns], axis=1)


def fold_states(x_NxW: Array) -> Array:
    """Sum over groups of 8 states, [N, W] -> [S, W]."""
    return sum(x_NxW[i : i + SUBLANES] for i in range(0, x_NxW.shape[0], SUBLANES))


def fold_columns(x_NxW: Array) -> Array:
    """Sum over the columns of a tile, [N, W] -> [N, L]."""
    return sum(x_NxW[:, i : i + LANES] for i in range(0, x_NxW.shape[1], LANES))


def store_part(parts_ref: object, token: Array, x_SxW: Array) -> None:
    """Store one token's partial sums for `sum_parts`."""
    rows = pl.ds(pl.multiple_of(token * SUBLANES, SUBLANES), SUBLANES)
    for column in range(parts_ref.shape[0]):
        parts_ref[column, rows] = x_SxW[:, column * LANES : (column + 1) * LANES]


def sum_parts(parts_ref: object) -> Array:
    """Sum over sublanes, [G, W]. Strided loads turn sublanes into rows, so that 8 tokens are added at once."""
    columns = []
    for column in range(parts_ref.shape[0]):
        halves = []
        for first in range(0, GROUP * SUBLANES, SUBLANES * SUBLANES):
            rows = [parts_ref.at[column][pl.ds(first + i, SUBLANES, SUBLANES)] for i in range(SUBLANES)]
            halves.append(_tree_sum(rows))
        columns.append(jnp.concatenate(halves, axis=0))
    return jnp.concatenate(columns, axis=1)


def _tree_sum(terms: list[Array]) -> Array:
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) with relative precision everywhere: max(x, 0) + log1p(exp(-|x|))."""
    e = jnp.exp2(jnp.abs(x) * -LOG2_E)
    series = jnp.full_like(e, LOG1P[-1])
    for coefficient in LOG1P[-2::-1]:
        series = series * e + coefficient
    return jnp.maximum(x, 0.0) + series * e


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp2(x * -LOG2_E))


def in_both_cases(bits: Array | None, body: Callable[[Array | None], None]) -> None:
    """Run `body(bits)`, or `body(None)` if no token of the group starts a segment, which is the common and cheaper case."""
    if bits is None:
        body(None)
        return
    pl.when(bits == 0)(lambda: body(None))
    pl.when(bits != 0)(lambda: body(bits))


def starts_here(bits: Array, token: Array) -> Array:
    """Scalar: whether this token of the group starts a segment."""
    return (bits >> token) & 1 == 1


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def columns_of(needed: int) -> int:
    """Lane columns of a tile: the number that pads `needed` least; on a tie, the largest."""
    return min(range(1, WIDEST + 1), key=lambda k: (round_up(needed, k), -k))


def pad(x: Array, *sizes: int, fill: float = 0.0) -> Array:
    """Pads the last axes of `x` to `sizes`."""
    grow = [(0, 0)] * (x.ndim - len(sizes)) + [(0, size - old) for size, old in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    return jnp.pad(x, grow, constant_values=fill)
