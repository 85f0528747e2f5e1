"""The backward kernel. For each chunk, last to first, it recomputes the states from the saved one and then walks back.

The grid has the order of the forward kernel with time reversed. So the cotangent of the state of all channels stays in VMEM,
and the gradients of B and C are summed over channel tiles before they leave VMEM.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.selective_scan.tiling import (
    GROUP,
    LANES,
    LOG2_E,
    SUBLANES,
    Operands,
    Plan,
    across,
    fold_columns,
    fold_states,
    in_both_cases,
    row_on_sublanes,
    sigmoid,
    softplus,
    spread_lanes,
    starts_here,
    store_part,
    store_rows,
    sum_parts,
)

WALK = 4  # tokens unrolled at once in the walk back; more would spill registers


class Inputs(NamedTuple):
    """Refs of the inputs, in the order of `pallas_call`; shapes as in `Operands`."""

    bits: object
    u: object
    dt: object
    z: object
    d_y: object  # like u
    a: object
    b: object
    c: object
    d: object
    bias: object
    reset_state: object
    starts: object  # state before each chunk, [batch, chunks, tiles, states, width]
    d_final: object  # like `Operands.initial`


class Outputs(NamedTuple):
    """Refs of the outputs. Those from `d_a` on are accumulators over time, one per batch row."""

    d_u: object
    d_dt: object
    d_z: object
    d_b: object
    d_c: object
    d_a: object  # [batch, tiles, states, width]
    d_d: object  # [batch, tiles, SUBLANES, width]: the caller sums over sublanes, as for `d_bias`
    d_bias: object
    d_state: object  # the carry; at the end, the cotangent of the initial state
    d_reset: object


class Scratch(NamedTuple):
    b: object  # [T, N, L], broadcast over lanes
    c: object
    d_b: object  # [T, N, L], summed over tiles and columns but not over lanes
    d_c: object
    h: object  # [T + 1, N, W]: the state before each token and after the last
    s: object  # strips of one group each, [T / G, columns, G, L]: the step size
    su: object  # step size times u
    d_y: object  # cotangent of the scan's output before skip and gate
    parts: object
    more_parts: object


def backward(plan: Plan, x: Operands, starts: Array, d_y: Array, d_final: Array) -> tuple[Array | None, ...]:
    """The cotangents in the order of `Outputs`, not yet summed over batch and sublanes; d_z is None without a gate."""
    states, width = plan.states, plan.width
    row, chunked = plan.rows(reverse=True), plan.per_chunk(states, plan.chunk, reverse=True)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    gate = [x.z] if plan.gated else []
    per_row = [f32((plan.batch, plan.tiles, rows, width)) for rows in (states, SUBLANES, SUBLANES, states, states)]
    spread, strips = (plan.chunk, states, LANES), (plan.chunk // GROUP, *plan.strip)
    scratch = [spread] * 4 + [(plan.chunk + 1, states, width)] + [strips] * 3 + [plan.parts] * 2
    outputs = pl.pallas_call(
        functools.partial(_kernel, plan),
        out_shape=[
            *(jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (x.u, x.dt, *gate)),
            *(f32(like.shape) for like in (x.b, x.c)),
            *per_row,
        ],
        in_specs=[
            plan.per_chunk(1, plan.chunk // GROUP, reverse=True, memory_space=pltpu.SMEM),
            *[row] * (3 + len(gate)),
            plan.shared(states),
            chunked,
            chunked,
            plan.shared(1),
            plan.shared(1),
            plan.shared(states),
            plan.starts(reverse=True),
            plan.per_row(states),
        ],
        out_specs=[*[row] * (2 + len(gate)), chunked, chunked, *(plan.per_row(like.shape[2]) for like in per_row)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        name="selective_scan_backward",
        **plan.call(),
    )(x.bits, x.u, x.dt, *gate, d_y, x.a, x.b, x.c, x.d, x.bias, x.reset_state, starts, d_final)
    return (*outputs[:2], *([] if plan.gated else [None]), *outputs[2:])


def _kernel(plan: Plan, *refs) -> None:
    refs = list(refs)
    if not plan.gated:
        refs.insert(Inputs._fields.index("z"), None)
        refs.insert(len(Inputs._fields) + Outputs._fields.index("d_z"), None)
    first, last = len(Inputs._fields), len(Inputs._fields) + len(Outputs._fields)
    x, out, scratch = Inputs(*refs[:first]), Outputs(*refs[first:last]), Scratch(*refs[last:])
    t, tile = pl.program_id(1), pl.program_id(2)

    @pl.when(tile == 0)
    def _() -> None:
        spread_lanes([(x.b, scratch.b), (x.c, scratch.c)], plan.unroll)
        scratch.d_b[...] = jnp.zeros_like(scratch.d_b)
        scratch.d_c[...] = jnp.zeros_like(scratch.d_c)

    @pl.when(t == 0)
    def _() -> None:
        out.d_state[0, tile] = x.d_final[0, tile]
        for ref in (out.d_a, out.d_d, out.d_bias, out.d_reset):
            ref[0, tile] = jnp.zeros(ref.shape[2:], jnp.float32)

    groups = plan.chunk // GROUP
    scratch.h[0] = x.starts[0, 0, 0]

    def each_group(step, reverse: bool) -> None:
        def group(i: Array, carry: None) -> None:
            index = groups - 1 - i if reverse else i
            bits = x.bits[0, 0, 0, index] if plan.resets else None
            in_both_cases(bits, lambda bits: step(plan, tile, index, bits, x, out, scratch))

        jax.lax.fori_loop(0, groups, group, None)

    each_group(_recompute, reverse=False)
    each_group(_walk_back, reverse=True)

    @pl.when(tile == plan.tiles - 1)
    def _() -> None:
        _sum_lanes(scratch.d_b, out.d_b, plan.unroll)
        _sum_lanes(scratch.d_c, out.d_c, plan.unroll)


def _rows(index: Array) -> pl.Slice:
    return pl.ds(pl.multiple_of(index * GROUP, GROUP), GROUP)


def _recompute(plan: Plan, tile: Array, index: Array, bits: Array | None, x: Inputs, out: Outputs, scratch: Scratch) -> None:
    """Write states and step sizes of one group to scratch, and go back through the gate: d_z, the scan output's cotangent."""
    rows = _rows(index)
    u = x.u[0, rows].astype(jnp.float32)
    s = softplus(x.dt[0, rows].astype(jnp.float32) + x.bias[tile])
    store_rows(scratch.s.at[index], s)
    store_rows(scratch.su.at[index], s * u)
    a_NxW = x.a[tile] * LOG2_E

    def step(i: Array, h_NxW: Array) -> Array:
        token = index * GROUP + i
        if bits is not None:
            h_NxW = jnp.where(starts_here(bits, i), x.reset_state[tile], h_NxW)
        decay_NxW = jnp.exp2(row_on_sublanes(scratch.s.at[index], i, plan.states) * a_NxW)
        su_NxW = row_on_sublanes(scratch.su.at[index], i, plan.states)
        h_NxW = decay_NxW * h_NxW + su_NxW * across(scratch.b[token], plan.width)
        scratch.h[token + 1] = h_NxW
        if plan.gated:
            store_part(scratch.parts, i, fold_states(h_NxW * across(scratch.c[token], plan.width)))
        return h_NxW

    plan.tokens(step, scratch.h[index * GROUP], unroll=GROUP)
    d_y = x.d_y[0, rows].astype(jnp.float32)
    if plan.gated:
        z = x.z[0, rows].astype(jnp.float32)
        y = sum_parts(scratch.parts) + x.d[tile] * u
        open_ = sigmoid(z)
        silu = z * open_
        out.d_z[0, rows] = (d_y * y * (open_ + silu * (1.0 - open_))).astype(out.d_z.dtype)
        d_y = d_y * silu
    store_rows(scratch.d_y.at[index], d_y)
    out.d_d[0, tile] += _fold_rows(d_y * u)


def _walk_back(plan: Plan, tile: Array, index: Array, bits: Array | None, x: Inputs, out: Outputs, scratch: Scratch) -> None:
    """Walk back one group, last token first: g_NxW is the cotangent of h after the token, back_NxW that of h before it."""
    a_NxW = x.a[tile]
    a2_NxW = a_NxW * LOG2_E

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        back_NxW, d_a_NxW = carry
        i = GROUP - 1 - i
        token = index * GROUP + i
        d_y_NxW = row_on_sublanes(scratch.d_y.at[index], i, plan.states)
        g_NxW = d_y_NxW * across(scratch.c[token], plan.width) + back_NxW
        scratch.d_c[token] += fold_columns(scratch.h[token + 1] * d_y_NxW)
        scratch.d_b[token] += fold_columns(g_NxW * row_on_sublanes(scratch.su.at[index], i, plan.states))
        store_part(scratch.parts, i, fold_states(g_NxW * across(scratch.b[token], plan.width)))
        s_NxW = row_on_sublanes(scratch.s.at[index], i, plan.states)
        # Computing the decay again is cheaper than keeping it, because the recomputation is limited by the one store position.
        back_NxW = g_NxW * jnp.exp2(s_NxW * a2_NxW)
        before_NxW = scratch.h[token]
        if bits is not None:
            before_NxW = jnp.where(starts_here(bits, i), x.reset_state[tile], before_NxW)
        exponent_NxW = back_NxW * before_NxW  # cotangent of (step size times A)
        store_part(scratch.more_parts, i, fold_states(exponent_NxW * a_NxW))
        d_a_NxW = d_a_NxW + exponent_NxW * s_NxW
        if bits is not None:
            out.d_reset[0, tile] += jnp.where(starts_here(bits, i), back_NxW, 0.0)
            back_NxW = jnp.where(starts_here(bits, i), 0.0, back_NxW)
        return back_NxW, d_a_NxW

    out.d_state[0, tile], out.d_a[0, tile] = plan.tokens(step, (out.d_state[0, tile], out.d_a[0, tile]), unroll=WALK)
    _through_inputs(tile, index, x, out, scratch)


def _through_inputs(tile: Array, index: Array, x: Inputs, out: Outputs, scratch: Scratch) -> None:
    """The cotangents of u and dt of one group, and its share of the bias's cotangent."""
    rows = _rows(index)
    u = x.u[0, rows].astype(jnp.float32)
    d_su, d_s = sum_parts(scratch.parts), sum_parts(scratch.more_parts)
    s, d_y = (jnp.concatenate([ref[index, i] for i in range(ref.shape[1])], axis=1) for ref in (scratch.s, scratch.d_y))
    out.d_u[0, rows] = (d_su * s + x.d[tile] * d_y).astype(out.d_u.dtype)
    d_x = (d_su * u + d_s) * sigmoid(x.dt[0, rows].astype(jnp.float32) + x.bias[tile])
    out.d_dt[0, rows] = d_x.astype(out.d_dt.dtype)
    out.d_bias[0, tile] += _fold_rows(d_x)


def _fold_rows(x_GxW: Array) -> Array:
    """[G, W] -> [S, W]"""
    return sum(x_GxW[i : i + SUBLANES] for i in range(0, x_GxW.shape[0], SUBLANES))


def _sum_lanes(source_ref: object, out_ref: object, unroll: int) -> None:
    """[T, N, L] -> [1, 1, N, T], the transpose of `spread_lanes`: sums over lanes, with tokens back on lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape[2:], 1)

    def body(t: Array, sums_NxT: Array) -> Array:
        return jnp.where(lane == t, jnp.sum(source_ref[t], axis=1, keepdims=True), sums_NxT)

    zeros = jnp.zeros(out_ref.shape[2:], jnp.float32)
    out_ref[0, 0] = jax.lax.fori_loop(0, source_ref.shape[0], body, zeros, unroll=unroll)
