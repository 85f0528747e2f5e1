"""The backward kernels: one for all gradients, or two, by blocks of queries and by blocks of keys.

All recompute the probabilities from the saved log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691, algorithm 2):
dS = P (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, delta = rowsum(dO O) - d lse.

The one kernel visits by blocks of queries: their dQ is finished when they are left. The dK and dV of each block of keys stay in
one of `Plan.places` parts of VMEM from the first visit to the last, and then move to HBM. There are as many places as a row has
blocks, or as blocks of a window can be open at once (`open_blocks`). If they do not fit into VMEM, two kernels take over.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.prefix_window_attention.blocks import PAST_END, inner, is_first, is_last, outer
from kernels_pallas.prefix_window_attention.tiles import (
    BY_KEY,
    BY_QUERY,
    LOG2_E,
    Head,
    Mask,
    Operands,
    Plan,
    Tile,
    dot,
    each_tile,
    prefix_tile,
    scaled,
    vmem,
)

COPIES = 2  # finished blocks of keys on their way to HBM


@functools.partial(jax.jit, static_argnums=0)
def backward(plan: Plan, x: Operands, lse: Array, d_out: Array, delta: Array) -> Operands:
    """Cotangents of the operands; those of the visits are None."""
    # For a query without keys, lse is set to +inf, which makes its probabilities 0. The cotangent of its -inf may be anything.
    empty = lse == -jnp.inf
    by_query = jnp.where(empty, jnp.inf, lse * LOG2_E), d_out, jnp.where(empty, 0.0, delta)
    (d_q, *d_metas), d_keys = _by_query(plan, x, by_query, with_keys=plan.places > 0)
    d_k, d_v = (jnp.swapaxes(d, 1, 2) for d in d_keys or _by_key(plan, x, by_query))
    d_prefix_k, d_prefix_v = (d.astype(x.k.dtype) for d in d_metas) if d_metas else (None, None)
    return Operands(q=d_q, k=d_k, v=d_v, prefix_k=d_prefix_k, prefix_v=d_prefix_v, lists=None)


def _like_keys(x: Operands) -> list[Any]:
    """k and v with the keys last, in HBM: a copy within VMEM would take the vector unit's time."""
    return [pltpu.HBM((a.shape[0], a.shape[2], a.shape[1]), a.dtype) for a in (x.k, x.v)]


def _by_query(plan: Plan, x: Operands, by_query: tuple[Array, ...], with_keys: bool) -> tuple[Sequence[Array], Sequence[Array]]:
    """([d_q, float32 gradients of the prefix keys and values if there is a prefix], [d_k, d_v] if `with_keys`)."""
    width, values = x.q.shape[2], x.v.shape[2]
    metas = [] if x.prefix_k is None else [x.prefix_k, x.prefix_v]
    resident = [plan.resident(*meta.shape[1:]) for meta in metas]
    sums, tables, like = [vmem(plan.kv_step, plan.group, width, plan.block_q)], [], []
    if with_keys:
        tables, like = [x.lists.opens, x.lists.closes], _like_keys(x)
        widths = (width, values)
        sums += [vmem(plan.places, plan.kv_step, n, plan.block_k) for n in widths]
        sums += [vmem(COPIES, plan.kv_step, n, plan.block_k, dtype=x.k.dtype) for n in widths]
        sums += [pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((COPIES, 2))]
    found = plan.call(
        functools.partial(_kernel_by_query, plan, with_keys),
        x.lists.count,
        "prefix_window_attention_backward" + ("" if with_keys else "_q"),
        tables=3 + len(tables),
        out_shape=[
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            *(jax.ShapeDtypeStruct(meta.shape, jnp.float32) for meta in metas),
            *like,
        ],
        in_specs=[*_in_specs(plan, x, outer, inner), *resident],
        out_specs=[plan.queries(width, block=outer), *resident, *[pl.BlockSpec(memory_space=pltpu.HBM) for _ in like]],
        scratch_shapes=sums,
    )(x.lists.by_query, x.lists.first, x.lists.last_end, *tables, x.lists.end, x.q, x.k, x.v, *by_query, *metas)
    return found[: 1 + len(metas)], found[1 + len(metas) :]


def _in_specs(plan: Plan, x: Operands, query, key) -> list[pl.BlockSpec]:
    """Of end, q, k, v, lse, d_out and delta."""
    width, values = x.q.shape[2], x.v.shape[2]
    return [
        plan.ends(key),
        plan.queries(width, block=query),
        plan.keys(width, key),
        plan.keys(values, key),
        plan.queries(block=query),
        plan.queries(values, block=query),
        plan.queries(block=query),
    ]


def _kernel_by_query(plan: Plan, with_keys: bool, visits_ref, first_ref, last_end_ref, *refs) -> None:
    tables, refs = (refs[:2], refs[2:]) if with_keys else ((), refs)
    end_ref, q_ref, k_ref, v_ref, lse_ref, d_out_ref, delta_ref, *refs = refs
    metas, refs = (refs[:2], refs[2:]) if plan.metas else ((), refs)
    d_q_ref, *refs = refs
    d_metas, refs = (refs[:2], refs[2:]) if plan.metas else ((), refs)
    d_k_ref, d_v_ref, sum_ref, *scratch = refs if with_keys else (None, None, *refs)
    step = pl.program_id(1)
    key = inner(visits_ref[step])
    at = functools.partial(_Side, plan, q_ref, lse_ref, d_out_ref, delta_ref)

    @pl.when(is_first(visits_ref, step))
    def _() -> None:
        if not metas:
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            return

        @pl.when(step == 0)
        def _() -> None:
            for ref in d_metas:
                ref[...] = jnp.zeros(ref.shape, jnp.float32)

        side = at(*metas)

        def finish(tile: Tile, h: Head, g: Head, products: tuple[Array, Array]) -> None:
            p_KxQ, d_s_KxQ = side.probabilities(tile, h, g, products)
            sum_ref[h, g] = dot(metas[0][h], d_s_KxQ, (0, 0))
            d_metas[0][h] += dot(d_s_KxQ, q_ref[h, g], (1, 1)) * plan.scale
            d_metas[1][h] += dot(p_KxQ, d_out_ref[h, g], (1, 1))

        plan.each_head([prefix_tile(plan, metas[0].shape[1])], side.products, finish)

    ring = _Ring(plan, d_k_ref, d_v_ref, *scratch) if with_keys else None
    if ring is not None:
        ring.open(step, key, outer(visits_ref[step]) == tables[0][key])
    side = at(k_ref, v_ref)

    def finish(tile: Tile, h: Head, g: Head, products: tuple[Array, Array]) -> None:
        p_KxQ, d_s_KxQ = side.probabilities(tile, h, g, products)
        sum_ref[h, g, :, tile.queries] += dot(k_ref[h, tile.keys], d_s_KxQ, (0, 0))
        if ring is not None:
            side.add(tile, h, g, p_KxQ, d_s_KxQ, *(ref.at[jax.lax.rem(key, plan.places)] for ref in ring.sums))

    each_tile(plan, visits_ref[step], BY_QUERY, Mask(first_ref, last_end_ref, end_ref), side.products, finish)
    if ring is not None:
        ring.close(key, outer(visits_ref[step]) == tables[1][key], visits_ref[step + 1] == PAST_END)

    @pl.when(is_last(visits_ref, step))
    def _() -> None:
        d_q_ref[...] = (sum_ref[...] * plan.scale).astype(d_q_ref.dtype)


class _Ring:
    """The gradients of open blocks of keys: their sums in VMEM, and the copies of closed ones to HBM."""

    def __init__(
        self, plan: Plan, d_k_ref, d_v_ref, sum_k_ref, sum_v_ref, done_k_ref, done_v_ref, closed_ref, semaphores
    ) -> None:
        self.plan, self.closed_ref, self.semaphores, self.line = plan, closed_ref, semaphores, pl.program_id(0)
        self.sums, self.done, self.targets = (sum_k_ref, sum_v_ref), (done_k_ref, done_v_ref), (d_k_ref, d_v_ref)

    def open(self, step: Array, key: Array, opens: Array) -> None:
        @pl.when(step == 0)
        def _() -> None:
            self.closed_ref[0] = 0

        @pl.when(opens)
        def _() -> None:
            for ref in self.sums:
                ref[jax.lax.rem(key, self.plan.places)] = jnp.zeros(ref.shape[1:], ref.dtype)

    def close(self, key: Array, closes: Array, last: Array) -> None:
        """Copies the block if this visit `closes` it; the `last` visit waits for all copies."""
        closed = self.closed_ref[0]

        @pl.when(closes)
        def _() -> None:
            pl.when(closed >= COPIES)(lambda: self._wait(jax.lax.rem(closed, COPIES)))
            for i, factor in enumerate((self.plan.scale, 1.0)):
                sums = self.sums[i][jax.lax.rem(key, self.plan.places)]
                self.done[i][jax.lax.rem(closed, COPIES)] = (sums * factor).astype(self.done[i].dtype)
                self._copy(i, jax.lax.rem(closed, COPIES), key).start()
            self.closed_ref[0] = closed + 1

        @pl.when(last)
        def _() -> None:
            total = self.closed_ref[0]
            jax.lax.fori_loop(jax.lax.max(total - COPIES, 0), total, lambda i, _: self._wait(jax.lax.rem(i, COPIES)), None)

    def _copy(self, i: int, place: Array, key: Head):
        heads, keys = self.plan.kv_step, self.plan.block_k
        target = self.targets[i].at[pl.ds(self.line * heads, heads), :, pl.ds(pl.multiple_of(key * keys, keys), keys)]
        return pltpu.make_async_copy(self.done[i].at[place], target, self.semaphores.at[place, i])

    def _wait(self, place: Array) -> None:
        for i in range(2):  # all copies have one size, so any block's may stand for the one that is awaited
            self._copy(i, place, 0).wait()


def _by_key(plan: Plan, x: Operands, by_query: tuple[Array, ...]) -> Sequence[Array]:
    """[d_k, d_v]"""
    width, values = x.q.shape[2], x.v.shape[2]
    return plan.call(
        functools.partial(_kernel_by_key, plan),
        x.lists.count,
        "prefix_window_attention_backward_kv",
        tables=3,
        out_shape=_like_keys(x),
        in_specs=_in_specs(plan, x, inner, outer),
        out_specs=[plan.key_columns(n, outer) for n in (width, values)],
        scratch_shapes=[vmem(plan.kv_step, n, plan.block_k) for n in (width, values)],
    )(x.lists.by_key, x.lists.first, x.lists.last_end, x.lists.end, x.q, x.k, x.v, *by_query)


def _kernel_by_key(plan: Plan, visits_ref, first_ref, last_end_ref, end_ref, q_ref, k_ref, v_ref, *refs) -> None:
    lse_ref, d_out_ref, delta_ref, d_k_ref, d_v_ref, sum_k_ref, sum_v_ref = refs
    step = pl.program_id(1)
    side = _Side(plan, q_ref, lse_ref, d_out_ref, delta_ref, k_ref, v_ref)

    @pl.when(is_first(visits_ref, step))
    def _() -> None:
        sum_k_ref[...] = jnp.zeros(sum_k_ref.shape, jnp.float32)
        sum_v_ref[...] = jnp.zeros(sum_v_ref.shape, jnp.float32)

    def finish(tile: Tile, h: Head, g: Head, products: tuple[Array, Array]) -> None:
        side.add(tile, h, g, *side.probabilities(tile, h, g, products), sum_k_ref, sum_v_ref)

    each_tile(plan, visits_ref[step], BY_KEY, Mask(first_ref, last_end_ref, end_ref), side.products, finish)

    @pl.when(is_last(visits_ref, step))
    def _() -> None:
        d_k_ref[...] = (sum_k_ref[...] * plan.scale).astype(d_k_ref.dtype)
        d_v_ref[...] = sum_v_ref[...].astype(d_v_ref.dtype)


class _Side:
    """What a block of queries and these keys and values give for the gradient."""

    def __init__(self, plan: Plan, q_ref, lse_ref, d_out_ref, delta_ref, k_ref, v_ref) -> None:
        self.plan, self.q_ref, self.lse_ref, self.d_out_ref, self.delta_ref = plan, q_ref, lse_ref, d_out_ref, delta_ref
        self.k_ref, self.v_ref = k_ref, v_ref

    def products(self, tile: Tile, h: Head, g: Head) -> tuple[Array, Array]:
        """(K Q^T, V dO^T) of a tile, [K, Q]."""
        s_KxQ = dot(self.k_ref[h, tile.keys], self.q_ref[h, g, :, tile.queries], (1, 0))
        return s_KxQ, dot(self.v_ref[h, tile.keys], self.d_out_ref[h, g, :, tile.queries], (1, 0))

    def probabilities(self, tile: Tile, h: Head, g: Head, products: tuple[Array, Array]) -> tuple[Array, Array]:
        """(P, dS / scale) of a tile, [K, Q], in the dtype of the inputs."""
        s_KxQ, d_p_KxQ = products
        row, dtype = (h, pl.ds(g, 1), tile.queries), self.k_ref.dtype
        p_KxQ = jnp.exp2(scaled(self.plan, s_KxQ, tile.bias) - self.lse_ref[row])
        return p_KxQ.astype(dtype), (p_KxQ * (d_p_KxQ - self.delta_ref[row])).astype(dtype)

    def add(self, tile: Tile, h: Head, g: Head, p_KxQ: Array, d_s_KxQ: Array, sum_k_ref, sum_v_ref) -> None:
        """Adds the tile's dV^T and dK^T / scale. With the keys last they are plain products with a transposed right side."""
        sum_v_ref[h, :, tile.keys] += dot(self.d_out_ref[h, g, :, tile.queries], p_KxQ, (1, 1))
        sum_k_ref[h, :, tile.keys] += dot(self.q_ref[h, g, :, tile.queries], d_s_KxQ, (1, 1))
