"""Shared code of the three kernels: the plan of a call, its operands, and the arithmetic of one tile.

Tiles are transposed, with keys on sublanes and queries on lanes. Maxima and sums over keys then combine whole registers, and each
per-query value (maximum, sum, log-sum-exp) is one row. Names end in their shape: K keys, Q queries of a block, D width of
queries and keys, V width of values. Exponentials have base 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

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
VMEM_BYTES = 48 * 2**20  # of 64 MiB (tpu7x) to 128 MiB (v5e, v6e)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of a call. `scale` multiplies the scores, before base 2. Widths are padded, `metas` is not."""

    scale: float
    kv_heads: int
    group: int  # query heads of a KV head
    kv_step: int  # KV heads of a grid step
    block_q: int
    block_k: int
    metas: int
    interpret: bool | pltpu.InterpretParams

    def each_head(self, body: Callable[[Head, Head], None]) -> None:
        """body(KV head, query head of its group) for the heads of a grid step. The loop is unrolled, so that one head's waits
        overlap with another's work. Interpret mode does not unroll, because that would only slow compilation."""
        heads = self.kv_step * self.group
        if self.interpret:
            jax.lax.fori_loop(0, heads, lambda i, _: body(i // self.group, i % self.group), None)
            return
        for i in range(heads):
            body(i // self.group, i % self.group)

    def queries(self, *shape: int, block: Callable) -> pl.BlockSpec:
        """A block of [KV, G, *shape, queries]; `block` is `outer` or `inner`."""
        zeros = (0,) * (1 + len(shape))
        tile = (self.kv_step, self.group, *shape, self.block_q)
        return pl.BlockSpec(tile, lambda h, s, visits, first: (h, *zeros, block(visits[s])))

    def keys(self, width: int, block: Callable) -> pl.BlockSpec:
        """A block of [KV, keys, width]."""
        return pl.BlockSpec((self.kv_step, self.block_k, width), lambda h, s, visits, first: (h, block(visits[s]), 0))

    def ends(self, block: Callable) -> pl.BlockSpec:
        """A block of `Lists.end`."""
        return pl.BlockSpec((1, self.block_k), lambda h, s, visits, first: (0, block(visits[s])))

    def resident(self, *shape: int) -> pl.BlockSpec:
        """All of [KV, *shape] for the heads of the grid step; it stays in VMEM over all visits."""
        return pl.BlockSpec((self.kv_step, *shape), lambda h, s, visits, first: (h, *(0,) * len(shape)))

    def call(self, kernel: Callable, count: Array, name: str, **specs: object) -> Callable:
        """`pallas_call` over the KV heads, and for each over the `count` visits."""
        scratch = specs.pop("scratch")
        out_shape = specs.pop("out_shape")
        return pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.kv_heads // self.kv_step, count),
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
                **specs,
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


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Matrix product over axis contract[0] of a and contract[1] of b, in full float32 for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def scores(plan: Plan, k_KxD: Array, q_DxQ: Array, bias: Array | None) -> Array:
    """Scaled scores in base 2, [K, Q], plus the bias of the mask."""
    s_KxQ = dot(k_KxD, q_DxQ, (1, 0)) * (plan.scale * LOG2_E)
    return s_KxQ if bias is None else s_KxQ + bias


def in_both_cases(
    plan: Plan, visit: Array, blocks: tuple[Callable, Callable], end_ref: object, first_ref: object, body: Callable
) -> None:
    """`body(None)` in a block without masked pairs, else `body(bias)`; `blocks` extract the (query, key) block of a visit."""
    query, key = (block(visit) for block in blocks)
    pl.when(is_full(visit))(lambda: body(None))
    pl.when(~is_full(visit))(lambda: body(_bias(plan, query * plan.block_q, first_ref[key], end_ref)))


def _bias(plan: Plan, query: Array, first: Array, end_ref: object) -> Array:
    """float32[K, Q]: 0 where the mask allows the pair, else HIDDEN; `query` is the block's first query."""
    shape = (plan.block_k, plan.block_q)
    lane, sublane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 0))
    end_KxQ = jnp.broadcast_to(end_ref[...], shape[::-1]).T
    allow = (lane - sublane >= first - query) & (lane < end_KxQ - query)
    return jnp.where(allow, 0.0, HIDDEN)


def prefix_bias(plan: Plan, padded: int) -> Array | None:
    """Bias that hides the padding after the last meta key, [padded, 1]."""
    if padded == plan.metas:
        return None
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (padded, 1), 0) < plan.metas, 0.0, HIDDEN)


BY_QUERY = (outer, inner)
BY_KEY = (inner, outer)
