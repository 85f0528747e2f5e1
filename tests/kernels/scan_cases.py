"""Shared by the tests of the selective scan: shapes, random inputs, and outputs with all gradients of one implementation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from kernels_pallas.selective_scan.reference import selective_scan_reference
from kernels_pallas.selective_scan.tpu import selective_scan_tpu
from kernels_pallas.selective_scan.xla import selective_scan_xla

CHUNK = 64  # small, so that a short sequence has several
ARRAYS = ("u", "dt", "A", "B", "C", "D", "dt_bias", "z", "initial_state", "reset_state")
IMPLEMENTATIONS = {
    "reference": selective_scan_reference,
    "sequential": functools.partial(selective_scan_xla, chunk=CHUNK, within="sequential"),
    "associative": functools.partial(selective_scan_xla, chunk=CHUNK, within="associative"),
    "tpu": functools.partial(selective_scan_tpu, chunk=CHUNK, columns=2, interpret=True),
}


class Shape(NamedTuple):
    batch: int
    length: int
    channels: int
    states: int
    gated: bool = True
    resets: bool = True


# Lengths and widths that are not multiples of a tile; chunks 1 to 3, channel tiles 1 and 2, states below, at and above 8.
# A gradient of one or two numbers may cancel to almost nothing and then has no scale to be measured by: no shape has both T and N 1.
SHAPES = (
    Shape(2, 140, 5, 4),
    Shape(1, 33, 300, 16),
    Shape(2, 7, 130, 1, gated=False),
    Shape(1, 64, 256, 9, resets=False),
    Shape(2, 1, 40, 3, gated=False, resets=False),
)


def make_inputs(shape, seed, step=1.0, state=1.0):
    """Arrays by name, float32, and the bool[B, T] resets (None without). `step` and `state` scale step sizes and states."""
    rng = np.random.default_rng(seed)
    batch, length, channels, states = shape[:4]
    sizes = {
        "u": (batch, length, channels),
        "dt": (batch, length, channels),
        "A": (channels, states),
        "B": (batch, length, states),
        "C": (batch, length, states),
        "D": (channels,),
        "dt_bias": (channels,),
        "z": (batch, length, channels),
        "initial_state": (batch, channels, states),
        "reset_state": (channels, states),
    }
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    arrays["A"] = -np.exp(arrays["A"])
    arrays["dt_bias"] += np.float32(np.log(step))
    arrays["initial_state"] *= np.float32(state)
    arrays["reset_state"] *= np.float32(state)
    if not shape.gated:
        del arrays["z"]
    if not shape.resets:
        del arrays["reset_state"]
    reset = jnp.asarray(rng.random((batch, length)) < rng.choice([0.02, 0.2, 0.9])) if shape.resets else None
    return jax.tree.map(jnp.asarray, arrays), reset


def cotangents(shape, seed):
    rng = np.random.default_rng(seed + 1000)
    sizes = ((shape.batch, shape.length, shape.channels), (shape.batch, shape.channels, shape.states))
    return tuple(rng.normal(size=size).astype(np.float32) for size in sizes)


@functools.cache
def compiled(implementation, wrap=lambda f: f):
    """jitted (arrays, resets, cotangents) -> (y, state, gradients by name)."""
    scan = wrap(lambda arrays, reset: IMPLEMENTATIONS[implementation](**arrays, reset=reset))

    @jax.jit
    def run(arrays, reset, weights):
        (y, state), pull = jax.vjp(lambda arrays: scan(arrays, reset), arrays)
        return y, state, pull((weights[0].astype(y.dtype), weights[1].astype(state.dtype)))[0]

    return run


def run(implementation, arrays, reset, weights):
    """Numpy (y, state, gradients by name)."""
    return jax.tree.map(np.asarray, compiled(implementation)(arrays, reset, weights))


def oracle(arrays, reset, weights):
    """The reference in float64, on inputs as they are."""
    with jax.enable_x64(True):
        arrays, weights = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float64)), (arrays, weights))
        return run("reference", arrays, reset, weights)


def error(ours, exact):
    """Largest deviation relative to the largest exact value."""
    ours, exact = np.asarray(ours).astype(np.float64), np.asarray(exact)
    return np.max(np.abs(ours - exact)) / max(np.max(np.abs(exact)), 1e-30)


def races_found():
    """Races found by the detector in the last interpreted kernel."""
    return interpret_pallas_call.races.races_found
