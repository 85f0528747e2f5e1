"""For tests of prefix-and-window attention: shapes, random lifetimes, and outputs with all gradients of one implementation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from kernels_pallas.prefix_window_attention.reference import attention_reference
from kernels_pallas.prefix_window_attention.tpu import attention_tpu
from kernels_pallas.prefix_window_attention.xla import attention_xla

BLOCK = 16  # small, so that a short row has several
SCALE = 0.3
IMPLEMENTATIONS = {
    "reference": attention_reference,
    "xla": functools.partial(attention_xla, block=BLOCK),
    "tpu": functools.partial(attention_tpu, block_q=BLOCK, block_k=2 * BLOCK, interpret=True),
    "parts": functools.partial(attention_tpu, block_q=2 * BLOCK, block_k=4 * BLOCK, border=BLOCK, interpret=True),
}


class Shape(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    widths: tuple[int, int]
    metas: int


# Lengths that are no multiple of a block, blocks of queries 1 to 5, groups of 1, 2 and 5, none, few and many meta keys.
SHAPES = (
    Shape(2, 70, 70, 4, 2, (8, 16), 5),
    Shape(1, 40, 75, 5, 1, (16, 16), 0),
    Shape(2, 37, 20, 2, 2, (5, 7), 19),
)


def make_arrays(shape, seed):
    """q, k, v, prefix_k and prefix_v by name, float32."""
    rng = np.random.default_rng(seed)
    width, values = shape.widths
    sizes = {
        "q": (shape.batch, shape.queries, shape.heads, width),
        "k": (shape.batch, shape.keys, shape.kv_heads, width),
        "v": (shape.batch, shape.keys, shape.kv_heads, values),
    }
    if shape.metas:
        sizes |= {"prefix_k": (shape.metas, shape.kv_heads, width), "prefix_v": (shape.metas, shape.kv_heads, values)}
    return {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}


def cotangents(shape, seed):
    rng = np.random.default_rng(seed + 1000)
    sizes = ((shape.batch, shape.queries, shape.heads, shape.widths[1]), (shape.batch, shape.queries, shape.heads))
    return tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)


@functools.cache
def compiled(implementation, wrap=lambda f: f, window=None):
    """jitted (arrays, expiry, q_offset, cotangents) -> (out, lse, gradients by name)."""
    attend = functools.partial(IMPLEMENTATIONS[implementation], scale=SCALE, window=window)

    @jax.jit
    def run(arrays, expiry, offset, weights):
        (out, lse), pull = jax.vjp(wrap(lambda arrays: attend(**arrays, expiry=expiry, q_offset=offset)), arrays)
        return out, lse, pull((weights[0].astype(out.dtype), weights[1].astype(lse.dtype)))[0]

    return run


def run(implementation, arrays, expiry, offset, weights, window=None):
    """Numpy (out, lse, gradients by name)."""
    return jax.tree.map(np.asarray, compiled(implementation, window=window)(arrays, expiry, offset, weights))


def oracle(arrays, expiry, offset, weights):
    """(out, lse, gradients by name) in float64: dense softmax and its derivative, written out in numpy.

    d lse / d score is P, so with a row term d_lse - sum(d_out out) the cotangent of a score is P (d_out v + row term).
    """
    x = {name: np.asarray(array).astype(np.float64) for name, array in arrays.items()}
    d_out, d_lse = (np.asarray(w).astype(np.float64) for w in weights)
    metas = len(x["prefix_k"]) if "prefix_k" in x else 0
    batch, queries, heads, _ = x["q"].shape
    keys, kv_heads = x["k"].shape[1:3]
    k, v = (x[name] for name in "kv")
    if metas:
        k, v = (np.concatenate([np.stack([x[f"prefix_{n}"]] * batch), y], axis=1) for n, y in (("k", k), ("v", v)))
    k, v = (np.repeat(y, heads // kv_heads, axis=2) for y in (k, v))
    q_index = np.arange(queries)[:, None] + int(offset)
    allow = (np.arange(keys) <= q_index) & (q_index < np.asarray(expiry)[:, None, :])
    allow = np.pad(allow, ((0, 0), (0, 0), (metas, 0)), constant_values=True)[:, None]
    s = np.where(allow, np.einsum("bthd,bshd->bhts", x["q"], k) * SCALE, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.logaddexp.reduce(s, axis=3, initial=-np.inf)
    p = np.where(allow, np.exp(s - np.where(np.isinf(lse), 0, lse)[..., None]), 0)
    out = np.einsum("bhts,bshd->bthd", p, v)
    row = np.moveaxis(d_lse - np.sum(d_out * out, axis=3), 1, 2)[..., None]
    d_s = p * (np.einsum("bthd,bshd->bhts", d_out, v) + row) * SCALE
    ungroup = lambda y: y.reshape(*y.shape[:2], kv_heads, -1, y.shape[3]).sum(3)  # noqa: E731
    d_k, d_v = (ungroup(np.einsum("bhts,bthd->bshd", a, b)) for a, b in ((d_s, x["q"]), (p, d_out)))
    gradients = {"q": np.einsum("bhts,bshd->bthd", d_s, k), "k": d_k[:, metas:], "v": d_v[:, metas:]}
    if metas:
        gradients |= {"prefix_k": d_k[:, :metas].sum(0), "prefix_v": d_v[:, :metas].sum(0)}
    return out, np.moveaxis(lse, 1, 2), gradients


def error(ours, exact):
    """Largest deviation relative to the largest exact value; infinite where one alone is -inf."""
    ours, exact = np.asarray(ours).astype(np.float64), np.asarray(exact)
    empty = np.isneginf(exact)
    if not np.array_equal(np.isneginf(ours), empty):
        return np.inf
    ours, exact = (np.where(empty, 0, x) for x in (ours, exact))
    return np.max(np.abs(ours - exact)) / max(np.max(np.abs(exact)), 1e-30)


def errors(ours, exact):
    """(of out and lse, of the gradients): the largest of `error`."""
    outputs = max(error(a, b) for a, b in zip(ours[:2], exact[:2], strict=True))
    return outputs, max(error(ours[2][name], exact[2][name]) for name in exact[2])


def races_found():
    """Races found by the detector in the last interpreted kernel."""
    return interpret_pallas_call.races.races_found
