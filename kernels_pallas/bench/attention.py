"""Programs of prefix-window attention and of meta-attention, compared with splash attention and XLA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.bench import splash
from kernels_pallas.bench.programs import PASSES, Kernel, Program, array, loop, when, with_passes
from kernels_pallas.prefix_window_attention.blocks import Lists, block_lists, inner, is_full, outer
from kernels_pallas.prefix_window_attention.tiles import UNROLLED_TILES
from kernels_pallas.prefix_window_attention.tpu import Tiling, attention_tpu, kept, tiling_of
from kernels_pallas.prefix_window_attention.xla import attention_xla


class Shape(NamedTuple):
    """One row: `length` tokens in `documents` of equal length, after `meta` tokens that all of them see."""

    length: int
    window: int | None
    meta: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    documents: int = 1
    dtype: str = "bfloat16"


SHAPES = {
    "Hymba-1.5B": Shape(8192, 1024, 128, 25, 5, 64, 128),
    "one head": Shape(8192, 1024, 128, 1, 1, 64, 128),
    "Hymba-300M": Shape(1024, 256, 128, 16, 4, 64, 128),
    "GPT-2, T 1024": Shape(1024, None, 0, 12, 12, 64, 64),
    "GPT-2, T 8192": Shape(8192, None, 0, 12, 12, 64, 64),
    "GPT-2, 8 documents": Shape(8192, None, 0, 12, 12, 64, 64, documents=8),
}
FORWARD_ALONE = ("Hymba-1.5B", "one head", "GPT-2, T 8192")  # forward also measured separately; other shapes behave alike
WITH_XLA = ("Hymba-1.5B", "GPT-2, T 1024")  # both passes; slow to compile, and the result is the same at all shapes
# Splash's best pairs of 128, 256, 512, 1024 and 2048 for each of its kernels, by the schedule for v5e.
SMALL = splash.Blocks(forward=(512, 512), dq=(512, 512), dkv=(512, 512))
LARGE = splash.Blocks(forward=(512, 512), dq=(1024, 1024), dkv=(1024, 1024))
BEST = {"GPT-2, T 8192": LARGE, "GPT-2, 8 documents": LARGE}  # SMALL for all others
META_SHARE = 0.1  # share of meta-tokens in a row, for meta-attention
META_LENGTHS = (2048, 4096, 8192)


def programs() -> Iterator[Program]:
    """Every measured attention program."""
    for name, shape in SHAPES.items():
        for passes in PASSES if name in FORWARD_ALONE else ("both",):
            yield ours("attention", name, shape, passes)
            widths, heads = (shape.key_width, shape.value_width), (shape.heads, shape.kv_heads)
            blocks, documents = BEST.get(name, SMALL), shape.documents
            yield splash.program(name, passes, shape.length, shape.window, shape.meta, widths, heads, blocks, documents)
        if name in WITH_XLA:
            yield Program("attention", name, "xla", "both", functools.partial(_build, shape, "both", attention_xla))
    for length in META_LENGTHS:
        shape = Shape(int(META_SHARE * length), None, 0, 12, 12, 64, 64)
        name = f"T {length}, M {shape.length}"
        yield ours("meta_attention", name, shape, "both")
        yield Program("meta_attention", name, "xla", "both", functools.partial(_build, shape, "both", attention_xla))


def _build(shape: Shape, passes: str, function: Callable) -> tuple[Callable, tuple]:
    def of(*sizes: int) -> jax.ShapeDtypeStruct:
        return array(*sizes, dtype=shape.dtype)

    keys, values = (shape.kv_heads, shape.key_width), (shape.kv_heads, shape.value_width)
    arrays = [of(1, shape.length, shape.heads, shape.key_width), of(1, shape.length, *keys), of(1, shape.length, *values)]
    metas = [of(shape.meta, *keys), of(shape.meta, *values)] if shape.meta else []

    def run(expiry: Array, *arrays: Array) -> Array:
        def call(q: Array, k: Array, v: Array, *metas: Array) -> Array:
            names = dict(zip(("prefix_k", "prefix_v"), metas, strict=False))
            return function(q, k, v, expiry, scale=shape.key_width**-0.5, window=shape.window, **names)[0]

        return with_passes(passes, call)(*arrays)

    return run, (array(1, shape.length, dtype="int32"), *arrays, *metas)


def _expiry(shape: Shape) -> Array:
    """int32[1, T]: the end of a key's document, or of its window if that is earlier."""
    index = jnp.arange(shape.length, dtype=jnp.int32)
    each = shape.length // shape.documents
    end = (index // each + 1) * each
    return (end if shape.window is None else jnp.minimum(index + shape.window + 1, end))[None].astype(jnp.int32)


def ours(op: str, name: str, shape: Shape, passes: str) -> Program:
    """Our kernels, with the visits from their lists for this mask."""
    tiling = tiling_of((1, shape.length, shape.length), (shape.heads, shape.kv_heads), shape.dtype, 0, shape.window)
    q, k = tiling.block_q, tiling.block_k
    blocks, key_blocks = -(-shape.length // q), -(-shape.length // k)
    with jax.default_device(jax.devices("cpu")[0]):
        lists = block_lists(_expiry(shape), 0, shape.length, q, k, shape.window, tiling.border_k)
        visits = lists.by_query[: int(lists.count)]
        full, parts = int(jnp.sum(is_full(visits))), _parts(tiling, lists, visits[~is_full(visits)])
    keys, values = ((1, shape.length, shape.kv_heads, width) for width in (shape.key_width, shape.value_width))
    per_step, places = kept(keys, values, shape.heads // shape.kv_heads, k, shape.window)
    lines = shape.kv_heads // per_step  # the grid's outer axis repeats the whole list this often
    steps, cut, each = lines * len(visits), lines * (len(visits) - full), q * k // (tiling.border_q * tiling.border_k)
    at_once = min(k, UNROLLED_TILES * tiling.tile_k)
    tiles = [when(lines * full), *([loop(lines * full * k // at_once)] if at_once < k else []), when(cut)]
    if each > 1:
        tiles += [loop(cut * each), when(lines * parts)]
    row_q, row_k = (2 * (shape.key_width + shape.value_width) * heads for heads in (shape.heads, shape.kv_heads))
    by_query = shape.length * row_q + len(visits) * k * row_k
    by_key = 2 * shape.length * row_k + len(visits) * q * row_q
    start, end = when(lines * blocks), when(lines * blocks)
    kernels = [Kernel("prefix_window_attention_forward", steps, (start, *tiles, end), by_query)]
    if passes == "both":
        zeroed, slight = (when(lines),) if shape.meta else (), when(lines * blocks, slight=True)
        by_query += shape.length * row_q
        of_key, once = when(lines * key_blocks), lines * min(key_blocks, 2)
        if places:
            ring = (of_key, when(of_key.times, slight=True), when(lines), loop(once))
            inside = (start, *zeroed, of_key, *tiles, *ring, slight)
            kernels += [Kernel("prefix_window_attention_backward", steps, inside, by_query + shape.length * row_k)]
        else:
            inside = (start, *zeroed, *tiles, slight), (of_key, *tiles, of_key)
            kernels += [
                Kernel("prefix_window_attention_backward_q", steps, inside[0], by_query),
                Kernel("prefix_window_attention_backward_kv", steps, inside[1], by_key),
            ]
    allowed = shape.documents * splash.allowed_pairs(shape.length // shape.documents, shape.window, 0)
    computed = full * q * k + parts * tiling.border_q * tiling.border_k + blocks * q * shape.meta
    build = functools.partial(_build, shape, passes, attention_tpu)
    return Program(op, name, "pallas_tpu", passes, build, tuple(kernels), (allowed + shape.length * shape.meta) / computed)


def _parts(tiling: Tiling, lists: Lists, visits: Array) -> int:
    """Number of parts of these visits that the kernels compute, by the rule of `tiles.each_tile`."""
    query, key = outer(visits)[:, None, None] * tiling.block_q, inner(visits)[:, None, None]
    row = jnp.arange(tiling.block_k // tiling.border_k)[:, None]
    query = query + jnp.arange(0, tiling.block_q, tiling.border_q)
    first, ends = lists.first[key] + row * tiling.border_k, lists.last_end[key * row.size + row]
    return int(jnp.sum((first < query + tiling.border_q) & (ends > query)))
