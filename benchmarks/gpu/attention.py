"""Attention only: the implementation that `metajax.models.ops` picks, jax.nn's on cuDNN, and PyTorch's FlexAttention and SDPA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu.clock import Case, Side, compile_all, compiled
from kernels_pallas.bench.attention import META_SHARE, SHAPES, Shape
from kernels_pallas.bench.programs import PASSES
from kernels_pallas.prefix_window_attention.xla import attention_xla
from metajax.models import ops
from metajax.models.masks import Mask

BLOCKS = (128, 512, 1024, 2048)  # query rows of a block, in addition to the 256 that dispatch uses


class Setting(NamedTuple):
    """A shape in a batch. `among`: number of tokens of a row in which only `shape.length` meta-tokens take part."""

    shape: Shape
    rows: int
    among: int = 0

    @property
    def mask(self) -> Mask:
        return Mask(window=self.shape.window)

    def flops(self, passes: str) -> int:
        """FLOPs of the allowed pairs: two products forward, five backward (scores are recomputed)."""
        keys, values = self.shape.key_width, self.shape.value_width
        pairs = self.mask.pairs(self.shape.length) + self.shape.length * self.shape.meta
        each = (keys + values) + (3 * keys + 2 * values if passes == "both" else 0)
        return 2 * each * pairs * self.shape.heads * self.rows


def settings(tiny: bool) -> dict[str, Setting]:
    if tiny:
        return {
            "window after meta tokens": Setting(Shape(64, 16, 8, 10, 2, 16, 32), 2),
            "causal": Setting(Shape(64, None, 0, 2, 2, 16, 16), 2),
            "meta-attention": Setting(Shape(6, None, 0, 2, 2, 16, 16), 2, among=64),
        }
    heads = SHAPES["GPT-2, T 1024"]
    among = heads._replace(length=int(META_SHARE * heads.length))
    return {
        "Hymba-1.5B: T 8192, window 1024, 128 meta tokens, batch 2": Setting(SHAPES["Hymba-1.5B"], 2),
        "GPT-2: T 1024, causal, batch 16": Setting(heads, 16),
        "GPT-2: T 8192, causal, batch 2": Setting(SHAPES["GPT-2, T 8192"], 2),
        f"meta-attention: {among.length} of T 1024, batch 16": Setting(among, 16, among=heads.length),
    }


def inputs(setting: Setting) -> dict[str, Array]:
    """Normal bfloat16 q, k, v [B, T, heads, width], with meta tokens prefix_k, prefix_v [M, ...], cotangent like the output."""
    s = setting.shape
    sizes = {
        "q": (setting.rows, s.length, s.heads, s.key_width),
        "k": (setting.rows, s.length, s.kv_heads, s.key_width),
        "v": (setting.rows, s.length, s.kv_heads, s.value_width),
    }
    if s.meta:
        sizes |= {"prefix_k": (s.meta, s.kv_heads, s.key_width), "prefix_v": (s.meta, s.kv_heads, s.value_width)}
    sizes["cotangent"] = (setting.rows, s.length, s.heads, s.value_width)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {name: jax.random.normal(key, size, jnp.bfloat16) for (name, size), key in zip(sizes.items(), keys, strict=True)}


def programs(setting: Setting, blocks: tuple[int, ...]) -> Iterator[tuple[str, Callable, bool]]:
    """(name, function of q, k, v and optionally prefix_k, prefix_v, whether it computes the same function); ours first."""
    shape, mask = setting.shape, setting.mask
    segments = jnp.ones((setting.rows, shape.length), jnp.int32)

    def ours(q: Array, k: Array, v: Array, prefix_k: Array | None = None, prefix_v: Array | None = None) -> Array:
        return ops.attention(q, k, v, mask=mask, segment_ids=segments, prefix_k=prefix_k, prefix_v=prefix_v)[0]

    def in_blocks(q: Array, k: Array, v: Array, *metas: Array, block: int) -> Array:
        names = dict(zip(("prefix_k", "prefix_v"), metas, strict=False))
        return attention_xla(q, k, v, mask.expiry(segments), scale=shape.key_width**-0.5, block=block, **names)[0]

    yield "ours (auto)", ours, True
    if setting.among:
        return
    for block in blocks:
        if block <= shape.length:
            yield f"ours, blocks of {block}", functools.partial(in_blocks, block=block), True
    library = functools.partial(library_attention, window=shape.window)
    cudnn = "xla" if jax.default_backend() == "cpu" else "cudnn"
    if shape.meta:
        name = f"jax.nn, {cudnn}: without meta tokens, q and k padded to {shape.value_width}"
        yield name, lambda q, k, v, *metas: library(q, k, v, implementation=cudnn), False
    else:
        yield f"jax.nn, {cudnn}", functools.partial(library, implementation=cudnn), True


def library_attention(q: Array, k: Array, v: Array, *, window: int | None, implementation: str) -> Array:
    """jax.nn's attention, for causal masks and windows. Queries must be as wide as values; padding zeros do not change scores."""
    scale, gap = q.shape[-1] ** -0.5, v.shape[-1] - q.shape[-1]
    q, k = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, gap))) for x in (q, k))
    reach = None if window is None else (window, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=reach, implementation=implementation
    )


def with_cotangent(function: Callable, passes: str) -> Callable:
    """(cotangent, *arrays) -> [out], followed by the gradients of all arrays if both passes run."""

    def run(cotangent: Array, *arrays: Array) -> list[Array]:
        if passes == "forward":
            return [function(*arrays)]
        out, pull = jax.vjp(function, *arrays)
        return [out, *pull(cotangent)]

    return run


def measure(tiny: bool, rivals: Any) -> Iterator[Case]:
    """Yield every case when it is done. rivals: the module benchmarks.gpu.rivals, None without PyTorch."""
    chosen = {(name, passes): setting for name, setting in settings(tiny).items() for passes in PASSES}
    given = {setting: inputs(setting) for setting in chosen.values()}
    blocks, jobs, same = (32,) if tiny else BLOCKS, {}, {}
    for (name, passes), setting in chosen.items():
        arrays = [x for key, x in given[setting].items() if key != "cotangent"]
        for side, function, alike in programs(setting, blocks if passes == "both" else ()):
            run = with_cotangent(function, passes)
            jobs[name, passes, side] = functools.partial(compiled, run, given[setting]["cotangent"], *arrays)
            same[name, passes, side] = alike
    print(f"attention: compiling {len(jobs)} programs", flush=True)
    ready = compile_all(jobs)
    for (name, passes), setting in chosen.items():
        case = Case("attention", f"{name}; {passes}", {"flops": setting.flops(passes)})
        cotangent, *arrays = (given[setting][key] for key in ("cotangent", *(k for k in given[setting] if k != "cotangent")))
        makers = {
            side: functools.partial(_side, side, program, cotangent, arrays, same[n, p, side])
            for (n, p, side), program in ready.items()
            if (n, p) == (name, passes)
        }
        if rivals is not None:
            makers |= rivals.attention_sides(setting, passes, {key: as_numpy(x) for key, x in given[setting].items()})
        case.race(makers)
        yield case


def _side(name: str, program: Callable[[], Any], cotangent: Array, arrays: list[Array], alike: bool) -> Side:
    run = program()
    facts = {"temporary_bytes": run.memory_analysis().temp_size_in_bytes}
    return Side(
        name,
        lambda: run(cotangent, *arrays),
        jax.block_until_ready,
        (lambda made: [as_numpy(x) for x in made]) if alike else None,
        facts,
    )


def as_numpy(x: Array) -> np.ndarray:
    return np.asarray(x).astype(np.float32)
