"""The selective scan at Hymba's widths, forward and backward: only ours, with several chunk lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.gpu.clock import Case, Side, compile_all, compiled
from kernels_pallas.bench.programs import PASSES, with_passes
from kernels_pallas.bench.scan import SHAPES, Shape
from kernels_pallas.selective_scan.xla import selective_scan_xla
from metajax.models import ops

CHUNKS = (16, 32, 64, 256, 512)  # tokens of a chunk, in addition to the 128 that dispatch uses
ARRAYS = {
    "forward": 4,
    "both": 4 + 7,
}  # [T, channels] arrays that must be read or written: u, dt, z, y; with gradients, these again


def necessary_bytes(shape: Shape, passes: str) -> int:
    """Bytes if each pass reads each bfloat16 input once and writes each output once, with B and C [T, states]."""
    each = shape.length * shape.channels * ARRAYS[passes]
    along = shape.length * shape.states * {"forward": 2, "both": 2 + 4}[passes]
    return 2 * (each + along)


def inputs(shape: Shape) -> list[Array]:
    """u, dt, A, B, C, D, dt_bias, z: bfloat16 if they have a token axis; decays as in Mamba's initialisation."""
    token, state, channels = (1, shape.length, shape.channels), (1, shape.length, shape.states), shape.channels
    u, dt, B, C, z = (
        jax.random.normal(key, size, jnp.bfloat16)
        for key, size in zip(jax.random.split(jax.random.key(0), 5), (token, token, state, state, token), strict=True)
    )
    A = -jnp.tile(jnp.arange(1, shape.states + 1, dtype=jnp.float32), (channels, 1))
    return [u, dt, A, B, C, jnp.ones(channels), jnp.full(channels, -4.0), z]


def programs(shape: Shape, chunks: tuple[int, ...]) -> dict[str, Callable]:
    segments = jnp.ones((1, shape.length), jnp.int32)
    chunked = {f"ours, chunks of {n}": lambda *x, n=n: selective_scan_xla(*x, segment_ids=segments, chunk=n)[0] for n in chunks}
    names = ["u", "dt", "A", "B", "C", "D", "dt_bias", "z"]
    auto = lambda *x: ops.selective_scan(**dict(zip(names, x, strict=True)), segment_ids=segments)[0]  # noqa: E731
    return {"ours (auto)": auto} | chunked


def measure(tiny: bool) -> Iterator[Case]:
    """Yield every case when it is done."""
    name, shape = ("tiny", Shape(64, 16, 4)) if tiny else ("Hymba-1.5B", SHAPES["Hymba-1.5B"])
    arrays = inputs(shape)
    jobs = {
        (passes, side): functools.partial(compiled, with_passes(passes, function), *arrays)
        for passes in PASSES
        for side, function in programs(shape, ((16,) if tiny else CHUNKS) if passes == "both" else ()).items()
    }
    print(f"scan: compiling {len(jobs)} programs", flush=True)
    ready = compile_all(jobs)
    for passes in PASSES:
        facts = {"necessary_bytes": necessary_bytes(shape, passes)}
        case = Case("scan", f"{name}: T {shape.length}, {shape.channels} channels, {shape.states} states; {passes}", facts)
        case.race({side: functools.partial(_side, side, run, arrays) for (p, side), run in ready.items() if p == passes})
        yield case


def _side(name: str, program: Callable, arrays: list[Array]) -> Side:
    run = program()
    facts = {"temporary_bytes": run.memory_analysis().temp_size_in_bytes}
    return Side(name, lambda: run(*arrays), jax.block_until_ready, None, facts)
