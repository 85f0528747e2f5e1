"""The forward kernel: for each block of queries, an online softmax over its visits that starts from the prefix keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.prefix_window_attention.blocks import inner, is_first, is_last, outer
from kernels_pallas.prefix_window_attention.tiles import (
    BY_QUERY,
    FLOOR,
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


@functools.partial(jax.jit, static_argnums=0)  # equal layers share one trace
def forward(plan: Plan, x: Operands) -> tuple[Array, Array]:
    """(out [KV, G, V, queries] in v's dtype, log-sum-exp float32[KV, G, queries])."""
    queries, width, values = x.q.shape[3], x.q.shape[2], x.v.shape[2]
    metas = [] if x.prefix_k is None else [x.prefix_k, x.prefix_v]
    state = vmem(plan.kv_step, plan.group, 1, plan.block_q)
    return plan.call(
        functools.partial(_kernel, plan),
        x.lists.count,
        "prefix_window_attention_forward",
        tables=3,
        out_shape=[
            jax.ShapeDtypeStruct((*x.q.shape[:2], values, queries), x.v.dtype),
            jax.ShapeDtypeStruct((*x.q.shape[:2], queries), jnp.float32),
        ],
        in_specs=[
            plan.ends(inner),
            plan.queries(width, block=outer),
            plan.keys(width, inner),
            plan.keys(values, inner),
            *[plan.resident(*meta.shape[1:]) for meta in metas],
        ],
        out_specs=[plan.queries(values, block=outer), plan.queries(block=outer)],
        scratch_shapes=[state, state, vmem(plan.kv_step, plan.group, values, plan.block_q)],
    )(x.lists.by_query, x.lists.first, x.lists.last_end, x.lists.end, x.q, x.k, x.v, *metas)


def _kernel(plan: Plan, visits_ref, first_ref, last_end_ref, end_ref, q_ref, k_ref, v_ref, *refs) -> None:
    *prefix_refs, out_ref, lse_ref, peak_ref, total_ref, sum_ref = refs
    state_refs = (peak_ref, total_ref, sum_ref)
    step = pl.program_id(1)

    def start(tile: Tile, h: Head, g: Head, keys_ref=k_ref) -> Array:
        return dot(keys_ref[h, tile.keys], q_ref[h, g, :, tile.queries], (1, 0))

    @pl.when(is_first(visits_ref, step))
    def _() -> None:
        if not prefix_refs:
            peak_ref[...] = jnp.full(peak_ref.shape, FLOOR, jnp.float32)
            total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            return
        prefix_k_ref, prefix_v_ref = prefix_refs

        def finish(tile: Tile, h: Head, g: Head, s_KxQ: Array) -> None:
            values = _softmax(scaled(plan, s_KxQ, tile.bias), prefix_v_ref[h], None)
            for ref, value in zip(state_refs, values, strict=True):
                ref[h, g] = value

        plan.each_head([prefix_tile(plan, prefix_k_ref.shape[1])], functools.partial(start, keys_ref=prefix_k_ref), finish)

    def finish(tile: Tile, h: Head, g: Head, s_KxQ: Array) -> None:
        state = tuple(ref[h, g, :, tile.queries] for ref in state_refs)
        values = _softmax(scaled(plan, s_KxQ, tile.bias), v_ref[h, tile.keys], state)
        for ref, value in zip(state_refs, values, strict=True):
            ref[h, g, :, tile.queries] = value

    each_tile(plan, visits_ref[step], BY_QUERY, Mask(first_ref, last_end_ref, end_ref), start, finish)

    @pl.when(is_last(visits_ref, step))
    def _() -> None:
        def finish(tile: Tile, h: Head, g: Head, total: Array) -> None:
            out_ref[h, g] = (sum_ref[h, g] / jnp.where(total > 0, total, 1.0)).astype(out_ref.dtype)
            lse_ref[h, pl.ds(g, 1)] = jnp.where(total > 0, (peak_ref[h, g] + jnp.log2(total)) / LOG2_E, -jnp.inf)

        plan.each_head([Tile(None, None, None)], lambda tile, h, g: total_ref[h, g], finish)


def _softmax(s_KxQ: Array, v_KxV: Array, state: tuple[Array, Array, Array] | None) -> tuple[Array, Array, Array]:
    """(maximum [1, Q], sum of weights [1, Q], weighted sum of values [V, Q]) with these keys added to `state`."""
    peak = jnp.max(s_KxQ, axis=0, keepdims=True)
    if state is not None:
        peak = jnp.maximum(peak, state[0])
    p_KxQ = jnp.exp2(s_KxQ - peak)
    total = jnp.sum(p_KxQ, axis=0, keepdims=True)
    sum_VxQ = dot(v_KxV, p_KxQ.astype(v_KxV.dtype), (0, 0))
    if state is None:
        return peak, total, sum_VxQ
    shrink = jnp.exp2(state[0] - peak)
    return peak, state[1] * shrink + total, state[2] * shrink + sum_VxQ
