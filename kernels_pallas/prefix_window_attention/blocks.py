"""The lists of blocks that a kernel visits, made on the device from the keys' expiries and read from SMEM, one int32 per visit.

A visit is a block of queries and a block of keys of the same row with at least one allowed pair. Blocks are numbered over all
rows, so that a kernel's grid is one flat list, even if the rows differ.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

BITS = 15  # of a block's number in a visit: outer << (BITS + 1) | inner << 1 | full
SMEM_WORDS = 200_000  # of the 262,144 that a core has; the compiler needs some for itself
PAST_END = 2**31 - 1


class Lists(NamedTuple):
    """Visits in two orders, and the inputs of the mask arithmetic of a block.

    by_query, by_key: int32[visits + 1]; sorted, then `PAST_END`. count: int32[], number of valid visits, the same in both.
    first: int32[key blocks], the first (flat) query index that sees the block's first key; it grows by one per key.
    end: int32[1, keys], the first (flat) query index that no longer sees the key.
    """

    by_query: Array
    by_key: Array
    query_count: Array
    key_count: Array
    first: Array
    end: Array


def block_lists(expiry: Int[Array, "B S"], offset: int | Int[Array, ""], queries: int, block_q: int, block_k: int) -> Lists:
    """The lists of a call. Raises ValueError when they do not fit into SMEM."""
    batch, keys = expiry.shape
    query_blocks, key_blocks = -(-queries // block_q), -(-keys // block_k)
    size = batch * _most(query_blocks, key_blocks, offset, queries, block_q, block_k)
    if size + batch * key_blocks > SMEM_WORDS or batch * max(query_blocks, key_blocks) >= 1 << BITS:
        raise ValueError(
            f"{batch} rows of {queries} queries and {keys} keys may need {size} visits of blocks {block_q} x {block_k}, which do not "
            f"fit into the {SMEM_WORDS} words of scalar memory: use larger blocks (block_q, block_k) or fewer rows in a call"
        )
    # In query rows: key k is seen by the rows begin <= t < end.
    begin = jnp.pad(jnp.arange(keys, dtype=jnp.int32) - offset, (0, key_blocks * block_k - keys), constant_values=queries)
    end = jnp.clip(jnp.minimum(expiry, queries + offset) - offset, 0, queries)
    end = jnp.pad(end, ((0, 0), (0, key_blocks * block_k - keys)))
    active, full = _active(begin, end, queries, query_blocks, block_q, block_k)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    query = jnp.broadcast_to(row * query_blocks + jnp.arange(query_blocks)[:, None], active.shape)
    key = jnp.broadcast_to(row * key_blocks + jnp.arange(key_blocks), active.shape)
    row_start = jnp.arange(batch, dtype=jnp.int32)[:, None] * (query_blocks * block_q)
    by_query = _sorted(_with_empty(active, axis=2), query, key, full, size)
    by_key = _sorted(_with_empty(active, axis=1), key, query, full, size)
    return Lists(
        by_query=by_query,
        by_key=by_key,
        query_count=jnp.sum(by_query != PAST_END, dtype=jnp.int32),
        key_count=jnp.sum(by_key != PAST_END, dtype=jnp.int32),
        first=(row_start + (jnp.arange(key_blocks, dtype=jnp.int32) * block_k - offset)).reshape(-1),
        end=(row_start + end).reshape(1, -1),
    )


def _most(query_blocks: int, key_blocks: int, offset: int | Array, queries: int, block_q: int, block_k: int) -> int:
    """Most visits of one row: the blocks at or below the diagonal if `offset` is static, and at least one per block."""
    if not isinstance(offset, int):
        return query_blocks * key_blocks + query_blocks + key_blocks
    lasts = (min((i + 1) * block_q, queries) - 1 + offset for i in range(query_blocks))
    return sum(min(max(last // block_k + 1, 1), key_blocks) for last in lasts) + key_blocks


def _active(
    begin: Array, end: Array, queries: int, query_blocks: int, block_q: int, block_k: int
) -> tuple[Bool[Array, "B QB KB"], Bool[Array, "B QB KB"]]:
    """(blocks with at least one allowed pair, blocks whose pairs are all allowed, ignoring padded queries)."""
    begin, end = begin.reshape(-1, block_k), end.reshape(end.shape[0], 1, -1, block_k)
    first = jnp.arange(query_blocks, dtype=jnp.int32)[:, None, None] * block_q
    last = jnp.minimum(first + block_q, queries) - 1
    active = jnp.any((begin <= last) & (end > first) & (begin < end), axis=3)
    return active, jnp.all((begin <= first) & (end > last), axis=3)


def _with_empty(active: Array, axis: int) -> Array:
    """Add the first block of each line without a visit. Its mask hides everything, so the kernel writes zeros."""
    first = jnp.arange(active.shape[axis]) == 0
    first = first.reshape([-1 if i == axis else 1 for i in range(3)])
    return active | (first & ~jnp.any(active, axis=axis, keepdims=True))


def _sorted(active: Array, outer: Array, inner: Array, full: Array, size: int) -> Int[Array, " visits"]:
    """Visits in the order of `outer`, then `inner`."""
    packed = (outer << (BITS + 1)) | (inner << 1) | full.astype(jnp.int32)
    packed = jnp.sort(jnp.where(active, packed, PAST_END).reshape(-1))[:size]
    return jnp.pad(packed, (0, size + 1 - packed.shape[0]), constant_values=PAST_END)


# ------------------------------------------------------------------------------------------------- inside the kernels


def outer(visit: Array) -> Array:
    """The block that stays fixed while the kernel accumulates."""
    return visit >> (BITS + 1)


def inner(visit: Array) -> Array:
    return (visit >> 1) & ((1 << BITS) - 1)


def is_full(visit: Array) -> Array:
    return (visit & 1) == 1


def is_first(visits_ref: object, step: Array) -> Array:
    """Whether this step is the first of its outer block."""
    return (step == 0) | (outer(visits_ref[jax.lax.max(step - 1, 0)]) != outer(visits_ref[step]))


def is_last(visits_ref: object, step: Array) -> Array:
    return outer(visits_ref[step + 1]) != outer(visits_ref[step])
