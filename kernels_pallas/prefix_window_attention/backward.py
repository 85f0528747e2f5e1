"""The two backward kernels: by blocks of queries for dq and the gradients of the prefix keys, by blocks of keys for dk and dv.

Both recompute the probabilities from the saved log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691, algorithm 2):
dS = P (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, delta = rowsum(dO O) - d lse.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.prefix_window_attention.blocks import inner, is_first, is_last, outer
from kernels_pallas.prefix_window_attention.tiles import (
    BY_KEY,
    BY_QUERY,
    LOG2_E,
    Head,
    Operands,
    Plan,
    dot,
    in_both_cases,
    prefix_bias,
    scores,
)


@functools.partial(jax.jit, static_argnums=0)
def backward(plan: Plan, x: Operands, lse: Array, d_out: Array, delta: Array) -> Operands:
    """Cotangents of the operands; those of the visits are None."""
    # For a query without keys, lse is set to +inf, which makes its probabilities 0. The cotangent of its -inf may be anything.
    empty = lse == -jnp.inf
    lse, delta = jnp.where(empty, jnp.inf, lse * LOG2_E), jnp.where(empty, 0.0, delta)
    d_q, *d_metas = _backward_q(plan, x, lse, d_out, delta)
    d_k, d_v = _backward_kv(plan, x, lse, d_out, delta)
    d_prefix_k, d_prefix_v = (d.astype(x.k.dtype) for d in d_metas) if d_metas else (None, None)
    return Operands(q=d_q, k=d_k, v=d_v, prefix_k=d_prefix_k, prefix_v=d_prefix_v, lists=None)


def _backward_q(plan: Plan, x: Operands, lse: Array, d_out: Array, delta: Array) -> tuple[Array, ...]:
    """d_q like q, and the float32 gradients of the prefix keys and values if there is a prefix."""
    width, values = x.q.shape[2], x.v.shape[2]
    metas = [] if x.prefix_k is None else [x.prefix_k, x.prefix_v]
    resident = [plan.resident(*meta.shape[1:]) for meta in metas]
    return plan.call(
        functools.partial(_kernel_q, plan),
        x.lists.query_count,
        "prefix_window_attention_backward_q",
        out_shape=[
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            *(jax.ShapeDtypeStruct(meta.shape, jnp.float32) for meta in metas),
        ],
        in_specs=[
            plan.ends(inner),
            plan.queries(width, block=outer),
            plan.keys(width, inner),
            plan.keys(values, inner),
            plan.queries(block=outer),
            plan.queries(values, block=outer),
            plan.queries(block=outer),
            *resident,
        ],
        out_specs=[plan.queries(width, block=outer), *resident],
        scratch=[(plan.kv_step, plan.group, width, plan.block_q)],
    )(x.lists.by_query, x.lists.first, x.lists.end, x.q, x.k, x.v, lse, d_out, delta, *metas)


def _kernel_q(plan: Plan, visits_ref, first_ref, end_ref, q_ref, k_ref, v_ref, lse_ref, d_out_ref, delta_ref, *refs) -> None:
    *refs, sum_ref = refs
    prefix_k_ref, prefix_v_ref, d_q_ref, d_k_ref, d_v_ref = refs if plan.metas else (None, None, *refs, None, None)
    step = pl.program_id(1)
    visit = visits_ref[step]
    at_query = functools.partial(_probabilities, plan, q_ref, lse_ref, d_out_ref, delta_ref)

    @pl.when(is_first(visits_ref, step))
    def _() -> None:
        if not plan.metas:
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            return

        @pl.when(step == 0)
        def _() -> None:
            d_k_ref[...] = jnp.zeros(d_k_ref.shape, jnp.float32)
            d_v_ref[...] = jnp.zeros(d_v_ref.shape, jnp.float32)

        bias = prefix_bias(plan, prefix_k_ref.shape[1])

        @plan.each_head
        def _(h: Head, g: Head) -> None:
            p_KxQ, d_s_KxQ = at_query(h, g, prefix_k_ref[h], prefix_v_ref[h], bias)
            sum_ref[h, g] = dot(prefix_k_ref[h], d_s_KxQ, (0, 0))
            d_k_ref[h] += dot(d_s_KxQ, q_ref[h, g], (1, 1)) * plan.scale
            d_v_ref[h] += dot(p_KxQ, d_out_ref[h, g], (1, 1))

    def body(bias: Array | None) -> None:
        @plan.each_head
        def _(h: Head, g: Head) -> None:
            _, d_s_KxQ = at_query(h, g, k_ref[h], v_ref[h], bias)
            sum_ref[h, g] += dot(k_ref[h], d_s_KxQ, (0, 0))

    in_both_cases(plan, visit, BY_QUERY, end_ref, first_ref, body)

    @pl.when(is_last(visits_ref, step))
    def _() -> None:
        d_q_ref[...] = (sum_ref[...] * plan.scale).astype(d_q_ref.dtype)


def _backward_kv(plan: Plan, x: Operands, lse: Array, d_out: Array, delta: Array) -> tuple[Array, ...]:
    """(d_k like k, d_v like v)"""
    width, values = x.q.shape[2], x.v.shape[2]
    return plan.call(
        functools.partial(_kernel_kv, plan),
        x.lists.key_count,
        "prefix_window_attention_backward_kv",
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (x.k, x.v)],
        in_specs=[
            plan.ends(outer),
            plan.queries(width, block=inner),
            plan.keys(width, outer),
            plan.keys(values, outer),
            plan.queries(block=inner),
            plan.queries(values, block=inner),
            plan.queries(block=inner),
        ],
        out_specs=[plan.keys(width, outer), plan.keys(values, outer)],
        scratch=[(plan.kv_step, plan.block_k, width), (plan.kv_step, plan.block_k, values)],
    )(x.lists.by_key, x.lists.first, x.lists.end, x.q, x.k, x.v, lse, d_out, delta)


def _kernel_kv(plan: Plan, visits_ref, first_ref, end_ref, q_ref, k_ref, v_ref, lse_ref, d_out_ref, delta_ref, *refs) -> None:
    d_k_ref, d_v_ref, sum_k_ref, sum_v_ref = refs
    step = pl.program_id(1)
    visit = visits_ref[step]

    @pl.when(is_first(visits_ref, step))
    def _() -> None:
        sum_k_ref[...] = jnp.zeros(sum_k_ref.shape, jnp.float32)
        sum_v_ref[...] = jnp.zeros(sum_v_ref.shape, jnp.float32)

    def body(bias: Array | None) -> None:
        @plan.each_head
        def _(h: Head, g: Head) -> None:
            p_KxQ, d_s_KxQ = _probabilities(plan, q_ref, lse_ref, d_out_ref, delta_ref, h, g, k_ref[h], v_ref[h], bias)
            sum_k_ref[h] += dot(d_s_KxQ, q_ref[h, g], (1, 1))
            sum_v_ref[h] += dot(p_KxQ, d_out_ref[h, g], (1, 1))

    in_both_cases(plan, visit, BY_KEY, end_ref, first_ref, body)

    @pl.when(is_last(visits_ref, step))
    def _() -> None:
        d_k_ref[...] = (sum_k_ref[...] * plan.scale).astype(d_k_ref.dtype)
        d_v_ref[...] = sum_v_ref[...].astype(d_v_ref.dtype)


def _probabilities(
    plan: Plan, q_ref, lse_ref, d_out_ref, delta_ref, h: Head, g: Head, k_KxD: Array, v_KxV: Array, bias: Array | None
) -> tuple[Array, Array]:
    """(P, dS / scale) of one tile, [K, Q], in the dtype of the inputs."""
    rows = pl.ds(g, 1)
    p_KxQ = jnp.exp2(scores(plan, k_KxD, q_ref[h, g], bias) - lse_ref[h, rows])
    d_p_KxQ = dot(v_KxV, d_out_ref[h, g], (1, 0))
    d_s_KxQ = p_KxQ * (d_p_KxQ - delta_ref[h, rows])
    return p_KxQ.astype(k_KxD.dtype), d_s_KxQ.astype(k_KxD.dtype)
