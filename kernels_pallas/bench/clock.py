"""Wall-clock times on the local accelerator."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bench.programs import Program

REPEATS, CALLS = 7, 10


def measure(program: Program) -> dict[str, Any]:
    """Median and range of milliseconds per call, over REPEATS batches of CALLS calls each, after one call that compiles."""
    function, shapes = program.build()
    rng = np.random.default_rng(0)
    arguments = [_fill(shape, rng) for shape in shapes]
    run = jax.jit(function)
    try:
        jax.block_until_ready(run(*arguments))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).partition("\n")[0]}
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            outputs = run(*arguments)
        jax.block_until_ready(outputs)
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    return {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def runs_here(program: Program) -> bool:
    """Whether the local accelerator can run the program: Pallas TPU kernels need a TPU."""
    return jax.default_backend() == "tpu" or not program.kernels


def _fill(shape: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    """Small normal numbers; integer arrays are the segment ids or expiries of a row that is one document."""
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jnp.full(shape.shape, shape.shape[-1], shape.dtype)
    return jnp.asarray(rng.normal(size=shape.shape) * 0.1, shape.dtype)
