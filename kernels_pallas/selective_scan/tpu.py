"""Wrapper of the Pallas TPU kernels with the contract of `reference.py`: padding, tiling and the gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.selective_scan.backward import backward
from kernels_pallas.selective_scan.forward import forward
from kernels_pallas.selective_scan.reference import resolve_resets, resolve_states
from kernels_pallas.selective_scan.tiling import GROUP, LANES, SUBLANES, Operands, Plan, columns_of, pad, round_up

NO_STEP = -1e30  # a dt whose softplus is 0: decay 1 and input 0, so padding does not change the state


def selective_scan_tpu(
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
    chunk: int = 128,
    columns: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C N"]]:
    """Same contract as `selective_scan_reference` for float32 and bfloat16 inputs, as two TPU kernels.

    A state is saved for the backward pass every `chunk` tokens (a multiple of 16). A tile has `columns` x 128 channels
    (None: the number up to 5 that pads least, the largest on a tie). `interpret` runs the kernels on a CPU. Raises
    ValueError for a dtype or chunk that the kernels do not support.
    """
    if u.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"selective_scan_tpu takes float32 or bfloat16 inputs, not {u.dtype}: use the xla implementation")
    if chunk % GROUP:
        raise ValueError(f"chunk = {chunk}: the kernel works on groups of {GROUP} tokens, so it must be a multiple of {GROUP}")
    A = A.astype(jnp.float32)
    initial_state, reset_state = resolve_states(initial_state, reset_state, u.shape[0], A)
    reset = resolve_resets(reset, segment_ids)
    plan = _plan(u, z, reset, A.shape[1], chunk, columns, interpret)
    y, state = _scan(
        plan,
        Operands(
            u=pad(u, plan.length, plan.channels),
            dt=pad(dt, plan.length, plan.channels, fill=NO_STEP),
            z=None if z is None else pad(z, plan.length, plan.channels),
            a=_tile(plan, A, fill=-1.0),
            b=_chunked(plan, B),
            c=_chunked(plan, C),
            d=_tile(plan, D[:, None], rows=1),
            bias=_tile(plan, dt_bias[:, None], rows=1),
            initial=_tile(plan, initial_state),
            reset_state=_tile(plan, reset_state),
            bits=_bits(plan, reset),
        ),
    )
    state = jnp.moveaxis(state, 2, 3).reshape(plan.batch, plan.channels, plan.states)
    return y[:, : u.shape[1], : u.shape[2]], state[:, : u.shape[2], : A.shape[1]]


def _plan(
    u: Array,
    z: Array | None,
    reset: Array | None,
    states: int,
    chunk: int,
    columns: int | None,
    interpret: bool | pltpu.InterpretParams,
) -> Plan:
    batch, length, channels = u.shape
    chunk = min(chunk, round_up(length, GROUP))
    width = LANES * (columns or columns_of(-(-channels // LANES)))
    return Plan(
        batch=batch,
        chunks=-(-length // chunk),
        chunk=chunk,
        tiles=-(-channels // width),
        width=width,
        states=round_up(states, SUBLANES),
        gated=z is not None,
        resets=reset is not None,
        interpret=interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    y, state, _ = forward(plan, operands, save=False)
    return y, state


def _scan_forward(plan: Plan, operands: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array]]:
    y, state, starts = forward(plan, operands, save=True)
    return (y, state), (operands, starts)


def _scan_backward(plan: Plan, saved: tuple[Operands, Array], cotangents: tuple[Array, Array]) -> tuple[Operands]:
    operands, starts = saved
    d_u, d_dt, d_z, d_b, d_c, d_a, d_d, d_bias, d_state, d_reset = backward(plan, operands, starts, *cotangents)
    return (
        Operands(
            u=d_u,
            dt=d_dt,
            z=d_z,
            a=d_a.sum(0),
            b=d_b,
            c=d_c,
            d=d_d.sum((0, 2))[:, None],
            bias=d_bias.sum((0, 2))[:, None],
            initial=d_state,
            reset_state=d_reset.sum(0),
            bits=None,
        ),
    )


_scan.defvjp(_scan_forward, _scan_backward)


def _tile(plan: Plan, x: Array, rows: int | None = None, fill: float = 0.0) -> Array:
    """[..., C, N] -> [..., tiles, rows, width], float32, padded; `rows` None: the plan's states."""
    x = pad(x.astype(jnp.float32), plan.channels, rows or plan.states, fill=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:-2], plan.tiles, plan.width, x.shape[-1]), -1, -2)


def _chunked(plan: Plan, x: Array) -> Array:
    """[B, T, N] -> [B, chunks, N, chunk], float32, padded."""
    x = pad(x.astype(jnp.float32), plan.length, plan.states)
    return jnp.moveaxis(x.reshape(plan.batch, plan.chunks, plan.chunk, plan.states), 3, 2)


def _bits(plan: Plan, reset: Array | None) -> Array:
    """bool[B, T] -> int32[B, chunks, 1, chunk / GROUP], one bit per token."""
    if reset is None:
        return jnp.zeros((plan.batch, plan.chunks, 1, plan.chunk // GROUP), jnp.int32)
    reset = pad(reset.astype(jnp.int32), plan.length)
    groups = reset.reshape(plan.batch, plan.chunks, 1, plan.chunk // GROUP, GROUP)
    return jnp.sum(groups << jnp.arange(GROUP, dtype=jnp.int32), axis=-1)
