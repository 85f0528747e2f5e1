"""The forward kernel: one pass over time, with the state of all channels in VMEM."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.selective_scan.tiling import (
    GROUP,
    LANES,
    LOG2_E,
    Operands,
    Plan,
    across,
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


def forward(plan: Plan, x: Operands, save: bool) -> tuple[Array, Array, Array | None]:
    """(y [batch, length, channels], final state [batch, tiles, states, width], state before each chunk if `save`)."""
    states, width = plan.states, plan.width
    row = plan.rows()
    out_shape = [
        jax.ShapeDtypeStruct(x.u.shape, x.u.dtype),
        jax.ShapeDtypeStruct(x.initial.shape, jnp.float32),
        jax.ShapeDtypeStruct((plan.batch, plan.chunks, plan.tiles, states, width), jnp.float32),
    ]
    out_specs = [row, plan.per_row(states), plan.starts()]
    gate = [x.z] if plan.gated else []
    y, final, *starts = pl.pallas_call(
        functools.partial(_kernel, plan, save),
        out_shape=out_shape if save else out_shape[:2],
        in_specs=[
            plan.per_chunk(1, plan.chunk // GROUP, memory_space=pltpu.SMEM),
            row,
            row,
            *[row for _ in gate],
            plan.shared(states),
            plan.per_chunk(states, plan.chunk),
            plan.per_chunk(states, plan.chunk),
            plan.shared(1),
            plan.shared(1),
            plan.per_row(states),
            plan.shared(states),
        ],
        out_specs=out_specs if save else out_specs[:2],
        scratch_shapes=[
            pltpu.VMEM((plan.chunk, states, LANES), jnp.float32),
            pltpu.VMEM((plan.chunk, states, LANES), jnp.float32),
            pltpu.VMEM(plan.strip, jnp.float32),
            pltpu.VMEM(plan.strip, jnp.float32),
            pltpu.VMEM(plan.parts, jnp.float32),
        ],
        name="selective_scan_forward",
        **plan.call(),
    )(x.bits, x.u, x.dt, *gate, x.a, x.b, x.c, x.d, x.bias, x.initial, x.reset_state)
    return y, final, starts[0] if save else None


def _kernel(plan: Plan, save: bool, bits_ref, u_ref, dt_ref, *refs) -> None:
    z_ref, refs = (refs[0], refs[1:]) if plan.gated else (None, refs)
    a_ref, b_ref, c_ref, d_ref, bias_ref, initial_ref, reset_ref, y_ref, state_ref, *refs = refs
    starts_ref, refs = (refs[0], refs[1:]) if save else (None, refs)
    b_TxNxL, c_TxNxL, s_strip, su_strip, parts = refs
    t, tile = pl.program_id(1), pl.program_id(2)

    @pl.when(tile == 0)
    def _() -> None:
        spread_lanes([(b_ref, b_TxNxL), (c_ref, c_TxNxL)], plan.unroll)

    @pl.when(t == 0)
    def _() -> None:
        state_ref[0, tile] = initial_ref[0, tile]

    if save:
        starts_ref[0, 0, 0] = state_ref[0, tile]
    a_NxW = a_ref[tile] * LOG2_E

    def group(index: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(index * GROUP, GROUP), GROUP)
        bits = bits_ref[0, 0, 0, index] if plan.resets else None

        def body(bits: Array | None) -> None:
            u = u_ref[0, rows].astype(jnp.float32)
            s = softplus(dt_ref[0, rows].astype(jnp.float32) + bias_ref[tile])
            store_rows(s_strip, s)
            store_rows(su_strip, s * u)

            def token(i: Array, h_NxW: Array) -> Array:
                if bits is not None:
                    h_NxW = jnp.where(starts_here(bits, i), reset_ref[tile], h_NxW)
                decay_NxW = jnp.exp2(row_on_sublanes(s_strip, i, plan.states) * a_NxW)
                su_NxW = row_on_sublanes(su_strip, i, plan.states)
                h_NxW = decay_NxW * h_NxW + su_NxW * across(b_TxNxL[index * GROUP + i], plan.width)
                store_part(parts, i, fold_states(h_NxW * across(c_TxNxL[index * GROUP + i], plan.width)))
                return h_NxW

            state_ref[0, tile] = plan.tokens(token, state_ref[0, tile], unroll=GROUP)
            y = sum_parts(parts) + d_ref[tile] * u
            if plan.gated:
                z = z_ref[0, rows].astype(jnp.float32)
                y = y * (z * sigmoid(z))
            y_ref[0, rows] = y.astype(y_ref.dtype)

        in_both_cases(bits, body)

    jax.lax.fori_loop(0, plan.chunk // GROUP, group, None)
