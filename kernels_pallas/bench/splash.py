"""JAX's splash attention with our masks in its fastest form: the mask is computed in the kernel, the backward is unfused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from kernels_pallas.bench.programs import Kernel, Program, array, when, with_passes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """(query, key) rows of a tile in each of the three kernels."""

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]

    def splash(self) -> splash.BlockSizes:
        (q, kv), (q_dq, kv_dq), (q_dkv, kv_dkv) = self.forward, self.dq, self.dkv
        return splash.BlockSizes(q, kv, kv, q_dkv, kv_dkv, kv_dkv, q_dq, kv_dq)


class PrefixWindowMask(splash_attention_mask._ComputableMask):
    """The mask k <= q and (q - k <= window or k < prefix), evaluated in the kernel without a stored array."""

    def __init__(self, length: int, window: int | None, prefix: int):
        self.window, self.prefix = window, prefix
        super().__init__((length, length), self._allow)

    def _allow(self, q, k):
        near = (k <= q) if self.window is None else (k <= q) & ((q - k <= self.window) | (k < self.prefix))
        return near

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple:
        return self.shape, self.window, self.prefix


@functools.cache
def _kernel(length: int, window: int | None, prefix: int, heads: int, blocks: Blocks) -> splash.SplashAttentionKernel:
    mask = splash_attention_mask.MultiHeadMask([PrefixWindowMask(length, window, prefix)] * heads)
    return splash.make_splash_mha_single_device(mask, block_sizes=blocks.splash())


def program(
    shape: str,
    passes: str,
    length: int,
    window: int | None,
    prefix: int,
    widths: tuple[int, int],
    heads: tuple[int, int],
    blocks: Blocks,
    documents: int = 1,
) -> Program:
    """Splash attention for `heads` (query, KV) heads. The prefix is the first `prefix` of the `length` keys, as in our own op.

    Several `documents` of equal length are given by segment ids, which it compares in every tile that its mask visits.
    """
    made = _kernel(length, window, prefix, heads[0], blocks)

    def run(q: Array, k: Array, v: Array) -> Array:
        ids = jnp.arange(length) // (length // documents)
        segments = splash.SegmentIds(ids, ids) if documents > 1 else None
        return jnp.moveaxis(made(*(jnp.moveaxis(x[0], 1, 0) for x in (q, k, v)), segments), 0, 1)[None]

    def build() -> tuple[Callable, tuple]:
        (key, value), (h, kv) = widths, heads
        arrays = (array(1, length, n, width, dtype="bfloat16") for n, width in ((h, key), (kv, key), (kv, value)))
        return with_passes(passes, run), tuple(arrays)

    kernels = [_visits("splash_mha_fwd", made.fwd_mask_info, blocks.forward, length, widths, heads[0], by_key=False)]
    if passes == "both":
        kernels += [
            _visits("splash_mha_dq", made.dq_mask_info, blocks.dq, length, widths, heads[0], by_key=False),
            _visits("splash_mha_dkv", made.dkv_mask_info, blocks.dkv, length, widths, heads[0], by_key=True),
        ]
    note = "blocks " + ", ".join(f"{q} x {k}" for q, k in dict.fromkeys(dataclasses.astuple(blocks)))
    tiles = np.count_nonzero(made.fwd_mask_info.block_mask[0]) * blocks.forward[0] * blocks.forward[1]
    share = documents * allowed_pairs(length // documents, window, prefix) / tiles
    return Program("attention", shape, "splash", passes, build, tuple(kernels), share, note=note)


def allowed_pairs(length: int, window: int | None, prefix: int) -> int:
    """Pairs (q, k) of one row whose first `prefix` keys are always visible."""
    q = np.arange(length)
    reach = q + 1 if window is None else np.minimum(q + 1, window + 1)
    outside = 0 if window is None else np.clip(np.minimum(q - window, prefix), 0, None)
    return int(np.sum(reach + outside))


def _visits(
    name: str, info: MaskInfo, blocks: tuple[int, int], length: int, widths: tuple[int, int], heads: int, by_key: bool
) -> Kernel:
    """A kernel with three regions: start of an outer block, tile, end of the block. The grid is as wide as its fullest line."""
    steps, active = info.block_mask[0].size, int(np.count_nonzero(info.block_mask[0]))
    outer, inner = length // blocks[by_key], blocks[not by_key]
    row = sum(widths) * 2
    moved = length * row * (1 if by_key else 2) + active * inner * row * (2 if by_key else 1)
    return Kernel(name, heads * steps, (when(heads * outer), when(heads * active), when(heads * outer)), heads * moved)
