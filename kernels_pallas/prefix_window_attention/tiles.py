"""Shared code of the kernels: the plan of a call, its operands, and the arithmetic of one tile.

Tiles are transposed, with keys on sublanes and queries on lanes. Maxima and sums over keys then combine whole registers, and each
per-query value (maximum, sum, log-sum-exp) is one row. Names end in their shape: K keys, Q queries of a tile, D width of
queries and keys, V width of values. Exponentials have base 2.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.prefix_window_attention.blocks import Lists, inner, is_full, outer

Head = int | Array  # index within a grid step: static if the loop over heads is unrolled

LANES = 128
LOG2_E = 1.4426950408889634
HIDDEN = -2e38  # added to a score that the mask hides
FLOOR = -1e30  # the lowest running maximum: exp2(HIDDEN - FLOOR) is 0, so a query that sees nothing sums to 0
UNROLLED_TILES = 2  # of the keys of a visit; more of them are a loop, because the program would be long
VMEM_BYTES = 48 * 2**20  # of 64 MiB (tpu7x) to 128 MiB (v5e, v6e)


class Tile(NamedTuple):
    """A part of a visit's block that is computed at once. Slices count from the block's first key and query."""

    keys: Any
    queries: Any
    bias: Array | None  # of the mask; None if it allows every pair


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a call. `scale` multiplies the scores, before base 2. Widths are padded, `metas` is not."""

    scale: float
    kv_heads: int
    group: int  # query heads of a KV head
    kv_step: int  # KV heads of a grid step
    block_q: int
    block_k: int
    border_q: int  # a block that the mask cuts is computed in parts of border_k x border_q, without the hidden ones
    border_k: int
    tile_k: int  # keys of a tile; divides border_k
    places: int  # blocks of keys whose gradients stay in VMEM at once; 0: dq and (dk, dv) have a kernel each
    metas: int
    interpret: bool | pltpu.InterpretParams

    def each_head(self, tiles: Sequence[Tile], start: Callable[..., Any], finish: Callable[..., None]) -> None:
        """finish(tile, KV head, query head of its group, start(...)) for all tiles and heads of a grid step.

        The loop is unrolled, with each `start` before the `finish` of the unit before it, so that the matrix unit works on one
        while the vector unit works on the other. Interpret mode does not unroll, because that would only slow compilation.
        """
        heads = self.kv_step * self.group
        if self.interpret:
            for tile in tiles:
                unit = lambda i, tile=tile: (tile, i // self.group, i % self.group)  # noqa: E731
                jax.lax.fori_loop(0, heads, lambda i, _, unit=unit: finish(*unit(i), start(*unit(i))), None)
            return
        units = [(tile, i // self.group, i % self.group) for tile in tiles for i in range(heads)]
        begun = start(*units[0])
        for unit, following in itertools.zip_longest(units, units[1:]):
            current, begun = begun, start(*following) if following else None
            finish(*unit, current)

    def queries(self, *shape: int, block: Callable) -> pl.BlockSpec:
        """A block of [KV, G, *shape, queries]; `block` is `outer` or `inner`."""
        zeros = (0,) * (1 + len(shape))
        tile = (self.kv_step, self.group, *shape, self.block_q)
        return pl.BlockSpec(tile, lambda h, s, visits, *_: (h, *zeros, block(visits[s])))

    def keys(self, width: int, block: Callable) -> pl.BlockSpec:
        """A block of [KV, keys, width]."""
        return pl.BlockSpec((self.kv_step, self.block_k, width), lambda h, s, visits, *_: (h, block(visits[s]), 0))

    def key_columns(self, width: int, block: Callable) -> pl.BlockSpec:
        """A block of [KV, width, keys]."""
        return pl.BlockSpec((self.kv_step, width, self.block_k), lambda h, s, visits, *_: (h, 0, block(visits[s])))

    def ends(self, block: Callable) -> pl.BlockSpec:
        """A block of `Lists.end`."""
        return pl.BlockSpec((1, self.block_k), lambda h, s, visits, *_: (0, block(visits[s])))

    def resident(self, *shape: int) -> pl.BlockSpec:
        """All of [KV, *shape] for the heads of the grid step; it stays in VMEM over all visits."""
        return pl.BlockSpec((self.kv_step, *shape), lambda h, s, *_: (h, *(0,) * len(shape)))

    def call(self, kernel: Callable, count: Array, name: str, tables: int, **specs: Any) -> Callable:
        """`pallas_call` over the KV heads, and for each over the `count` visits; the first `tables` operands are in SMEM."""
        out_shape = specs.pop("out_shape")
        return pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=tables, grid=(self.kv_heads // self.kv_step, count), **specs
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES),
            interpret=self.interpret,
            name=name,
        )


class Operands(NamedTuple):
    """The kernels' inputs, padded; queries and keys are numbered over all rows."""

    q: Array  # [KV, G, D, queries]
    k: Array  # [KV, keys, D]
    v: Array  # [KV, keys, V]
    prefix_k: Array | None  # [KV, metas padded to 16, D]
    prefix_v: Array | None
    lists: Lists


def vmem(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Scratch."""
    return pltpu.VMEM(shape, dtype)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Matrix product over axis contract[0] of a and contract[1] of b, in full float32 for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def scaled(plan: Plan, s_KxQ: Array, bias: Array | None) -> Array:
    """Scores in base 2, plus the bias of the mask."""
    s_KxQ = s_KxQ * (plan.scale * LOG2_E)
    return s_KxQ if bias is None else s_KxQ + bias


class Mask(NamedTuple):
    """The tables of the mask of a visit: `first` and `last_end` of `Lists` in SMEM, and `end` of the block."""

    first_ref: Any
    last_end_ref: Any
    end_ref: Any


def each_tile(
    plan: Plan, visit: Array, blocks: tuple[Callable, Callable], mask: Mask, start: Callable, finish: Callable[..., None]
) -> None:
    """`Plan.each_head` for the tiles of a visit that the mask does not hide; `blocks` extract its (query, key) block."""
    query, key = (block(visit) for block in blocks)

    at_once = min(plan.block_k, UNROLLED_TILES * plan.tile_k)

    def whole(first: Head) -> None:
        starts = range(0, at_once, plan.tile_k)
        keys = [pl.ds(_multiple(first * at_once + i, plan.tile_k), plan.tile_k) for i in starts]
        plan.each_head([Tile(where, pl.ds(0, plan.block_q), None) for where in keys], start, finish)

    @pl.when(is_full(visit))
    def _() -> None:
        _times(plan.block_k // at_once, whole)

    across, down = plan.block_q // plan.border_q, plan.block_k // plan.border_k

    def part(row: Head, column: Head) -> None:
        past, before = row * plan.border_k, column * plan.border_q
        queries, keys = query * plan.block_q + before, mask.first_ref[key] + past

        def compute() -> None:
            tiles = []
            for i in range(0, plan.border_k, plan.tile_k):
                where = pl.ds(_multiple(past + i, plan.tile_k), plan.tile_k)
                bias = _bias(plan, keys + i - queries, mask.end_ref[:, where] - queries)
                tiles.append(Tile(where, pl.ds(_multiple(before, plan.border_q), plan.border_q), bias))
            plan.each_head(tiles, start, finish)

        if across * down == 1:
            return compute()
        seen = (keys < queries + plan.border_q) & (mask.last_end_ref[key * down + row] > queries)
        return pl.when(seen)(compute)

    @pl.when(~is_full(visit))
    def _() -> None:
        _times(across * down, lambda i: part(jax.lax.div(i, across), jax.lax.rem(i, across)))


def _times(count: int, body: Callable[[Head], None]) -> None:
    """body(0), ..., body(count - 1), as a loop if it is more than one."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _multiple(index: Head, of: int) -> Head:
    return index if isinstance(index, int) else pl.multiple_of(index, of)


def _bias(plan: Plan, first: Array, end_1xK: Array) -> Array:
    """float32[K, Q]: 0 where the mask allows the pair, else HIDDEN. `first`, `end`: queries that see key 0, and no longer a key."""
    shape = (plan.tile_k, plan.border_q)
    lane, sublane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 0))
    columns = min(LANES, plan.border_q)  # equal columns, so that a transpose of one register's width is enough
    end_KxQ = jnp.tile(jnp.broadcast_to(end_1xK, (columns, plan.tile_k)).T, (1, plan.border_q // columns))
    return jnp.where((lane - sublane >= first) & (lane < end_KxQ), 0.0, HIDDEN)


def prefix_bias(plan: Plan, padded: int) -> Array | None:
    """Bias that hides the padding after the last meta key, [padded, 1]."""
    if padded == plan.metas:
        return None
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (padded, 1), 0) < plan.metas, 0.0, HIDDEN)


def prefix_tile(plan: Plan, padded: int) -> Tile:
    """The prefix keys as a tile for all queries of a block."""
    return Tile(pl.ds(0, padded), pl.ds(0, plan.block_q), prefix_bias(plan, padded))


BY_QUERY = (outer, inner)
BY_KEY = (inner, outer)
