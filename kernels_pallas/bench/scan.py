"""Programs of the selective scan and the causal convolution, compared with XLA on the plain recurrences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.bench.programs import PASSES, Kernel, Program, array, loop, when, with_passes
from kernels_pallas.bench.schedule import Visits
from kernels_pallas.selective_scan.backward import WALK
from kernels_pallas.selective_scan.conv import GROUP as CONV_GROUP
from kernels_pallas.selective_scan.conv import causal_conv_tpu
from kernels_pallas.selective_scan.reference import selective_scan_reference
from kernels_pallas.selective_scan.tiling import GROUP, LANES, SPREAD, columns_of
from kernels_pallas.selective_scan.tpu import selective_scan_tpu
from kernels_pallas.selective_scan.xla import causal_conv_xla, selective_scan_xla

CHUNK, CONV_CHUNK = 128, 256  # for rows of at least this length
SEGMENTS = 8  # documents of a row
# Operations per (token, channel, state) that the recurrence needs, counted in README.md.
NECESSARY = {"forward": 7, "both": 7 + 19}


class Shape(NamedTuple):
    length: int
    channels: int
    states: int
    segments: int = SEGMENTS
    dtype: str = "bfloat16"

    @property
    def width(self) -> int:
        return LANES * columns_of(-(-self.channels // LANES))

    @property
    def tiles(self) -> int:
        return -(-self.channels // self.width)


SHAPES = {"Hymba-1.5B": Shape(8192, 3200, 16), "Hymba-300M": Shape(8192, 2048, 16)}
WITH_RIVALS = ("Hymba-1.5B",)  # scan shapes compared with XLA, which compiles slowly; the ratio does not depend on the width


def programs() -> Iterator[Program]:
    """Every measured scan and convolution program."""
    for name, shape in SHAPES.items():
        for passes in PASSES:
            with_rivals = name in WITH_RIVALS
            yield from (ours(op, name, shape, passes) for op in ("selective_scan", "causal_conv"))
            for implementation, function in RIVALS.items() if with_rivals else ():
                build = functools.partial(_build_scan, shape, passes, function)
                yield Program("selective_scan", name, implementation, passes, build, necessary=_necessary(shape, passes))
            if with_rivals:
                yield Program("causal_conv", name, "xla", passes, functools.partial(_build_conv, shape, passes, causal_conv_xla))


def ours(op: str, name: str, shape: Shape, passes: str) -> Program:
    """Our kernels for one of the two operations."""
    if op == "causal_conv":
        build = functools.partial(_build_conv, shape, passes, causal_conv_tpu)
        return Program(op, name, "pallas_tpu", passes, build, _conv_kernels(shape, passes))
    build = functools.partial(_build_scan, shape, passes, _segmented(selective_scan_tpu))
    return Program(op, name, "pallas_tpu", passes, build, _scan_kernels(shape, passes), necessary=_necessary(shape, passes))


def _necessary(shape: Shape, passes: str) -> int:
    return NECESSARY[passes] * shape.length * shape.channels * shape.states


def associative(u: Array, dt: Array, A: Array, B: Array, C: Array, D: Array, dt_bias: Array, z: Array) -> Array:
    """The whole row in one `jax.lax.associative_scan`, like a simple JAX version of Mamba; without segments."""
    u32, z32 = u.astype(jnp.float32), z.astype(jnp.float32)
    s = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias)
    decay, value = jnp.exp(s[..., None] * A), (s * u32)[..., None] * B.astype(jnp.float32)[:, :, None]
    _, h = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, value), axis=1)
    y = jnp.einsum("btcn,btn->btc", h, C.astype(jnp.float32)) + D * u32
    return (y * jax.nn.silu(z32)).astype(u.dtype)


def _segmented(function: Callable) -> Callable:
    return lambda *arrays: function(*arrays[:-1], segment_ids=arrays[-1])


RIVALS: dict[str, Callable] = {
    "xla": _segmented(selective_scan_xla),
    "lax.scan": _segmented(selective_scan_reference),
    "associative_scan": lambda *arrays: associative(*arrays[:-1]),
}


def _build_scan(shape: Shape, passes: str, function: Callable) -> tuple[Callable, tuple]:
    token = array(1, shape.length, shape.channels, dtype=shape.dtype)
    per_state = array(1, shape.length, shape.states, dtype=shape.dtype)
    per_channel = array(shape.channels)
    arrays = (token, token, array(shape.channels, shape.states), per_state, per_state, per_channel, per_channel, token)

    def run(segments: Array, *arrays: Array) -> Array:
        return with_passes(passes, lambda *arrays: function(*arrays, segments))(*arrays)

    return run, (array(1, shape.length, dtype="int32"), *arrays)


def _build_conv(shape: Shape, passes: str, function: Callable) -> tuple[Callable, tuple]:
    arrays = (array(1, shape.length, shape.channels, dtype=shape.dtype), array(shape.channels, 4), array(shape.channels))

    def run(segments: Array, *arrays: Array) -> Array:
        return with_passes(passes, lambda x, w, b: function(x, w, b, segment_ids=segments)[0])(*arrays)

    return run, (array(1, shape.length, dtype="int32"), *arrays)


# ---------------------------------------------------------------------------------------------------------- visits


def _scan_kernels(shape: Shape, passes: str) -> tuple[Kernel, ...]:
    """The kernels with the visits of each `pl.when` and loop, in the order of forward.py and backward.py."""
    chunk = min(CHUNK, shape.length)
    chunks, spread = shape.length // chunk, loop(shape.length // SPREAD)
    steps = chunks * shape.tiles
    groups, marked = steps * (chunk // GROUP), shape.segments * shape.tiles
    quiet = groups - marked
    token, per_state = shape.length * shape.channels * 2, shape.length * shape.states * 4
    starts = chunks * shape.channels * shape.states * 4
    per_group = (loop(groups), when(quiet), when(marked))
    moved = 4 * token + 2 * per_state + (starts if passes == "both" else 0)
    forward = Kernel("selective_scan_forward", steps, (when(chunks), spread, *per_group), moved)
    if passes == "forward":
        return (forward,)
    walks = GROUP // WALK
    walk_back = (loop(groups), when(quiet), loop(quiet * walks), when(marked), loop(marked * walks))
    last = _when_of_several(shape, chunks)
    inside = (when(chunks), spread, *last, *per_group, *walk_back, when(chunks), spread, spread)
    return forward, Kernel("selective_scan_backward", steps, inside, 7 * token + 4 * per_state + starts)


def _conv_kernels(shape: Shape, passes: str) -> tuple[Kernel, ...]:
    chunk = min(CONV_CHUNK, shape.length)
    steps = shape.length // chunk * shape.tiles
    groups, marked = steps * (chunk // CONV_GROUP), shape.segments * shape.tiles
    token = shape.length * shape.channels * 2
    per_group = (loop(groups), when(groups - marked), when(marked))
    forward = Kernel("causal_conv_forward", steps, per_group, 2 * token)
    if passes == "forward":
        return (forward,)
    inside = (*_when_of_several(shape, shape.length // chunk), loop(groups), *per_group)
    return forward, Kernel("causal_conv_backward", steps, inside, 3 * token)


def _when_of_several(shape: Shape, chunks: int) -> tuple[Visits, ...]:
    """Visits of a region that only the first or last chunk runs; with a single chunk there is no such branch."""
    return (when(shape.tiles),) if chunks > 1 else ()
