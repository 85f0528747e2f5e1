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
TABLES = 8  # words of a block of keys beside its visits: `first`, `opens`, `closes`, and `last_end` of its parts
PAST_END = 2**31 - 1


class Lists(NamedTuple):
    """Visits in two orders, and what the kernels need of each block of keys.

    by_query, by_key: int32[visits + 1]; sorted, then `PAST_END`. count: int32[], number of valid visits, the same in both.
    first: int32[key blocks], the first (flat) query index that sees the block's first key; it grows by one per key.
    end: int32[1, keys], the first (flat) query index that no longer sees the key.
    last_end: int32[keys / border], the largest `end` of each `border` keys.
    opens, closes: int32[key blocks], the first and the last (flat) block of queries that visits the block.
    """

    by_query: Array
    by_key: Array
    count: Array
    first: Array
    end: Array
    last_end: Array
    opens: Array
    closes: Array


def block_lists(
    expiry: Int[Array, "B S"],
    offset: int | Int[Array, ""],
    queries: int,
    block_q: int,
    block_k: int,
    window: int | None = None,
    border: int | None = None,
) -> Lists:
    """The lists of a call; `border` divides `block_k` (None: equals it). Raises ValueError when they do not fit into SMEM."""
    batch, keys = expiry.shape
    query_blocks, key_blocks = -(-queries // block_q), -(-keys // block_k)
    size = batch * visits_of_row(queries, keys, offset, block_q, block_k, window)
    if not fits(batch, queries, keys, offset, block_q, block_k, window):
        raise ValueError(
            f"{batch} rows of {queries} queries and {keys} keys may need {size} visits of blocks {block_q} x {block_k}, which do not "
            f"fit into the {SMEM_WORDS} words of scalar memory: use larger blocks (block_q, block_k) or fewer rows in a call"
        )
    # In query rows: key k is seen by the rows begin <= t < end.
    begin = jnp.pad(jnp.arange(keys, dtype=jnp.int32) - offset, (0, key_blocks * block_k - keys), constant_values=queries)
    end = jnp.clip(jnp.minimum(expiry, queries + offset) - offset, 0, queries)
    end = jnp.pad(end, ((0, 0), (0, key_blocks * block_k - keys)))
    active, full = _active(begin, end, queries, query_blocks, block_q, block_k)
    active = _with_empty(active, offset, block_q, block_k)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    query = jnp.broadcast_to(row * query_blocks + jnp.arange(query_blocks)[:, None], active.shape)
    key = jnp.broadcast_to(row * key_blocks + jnp.arange(key_blocks), active.shape)
    by_query, by_key = (_sorted(active, *order, full, size) for order in ((query, key), (key, query)))
    row_start = jnp.arange(batch, dtype=jnp.int32)[:, None] * (query_blocks * block_q)
    return Lists(
        by_query=by_query,
        by_key=by_key,
        count=jnp.sum(by_query != PAST_END, dtype=jnp.int32),
        first=(row_start + (jnp.arange(key_blocks, dtype=jnp.int32) * block_k - offset)).reshape(-1),
        end=(row_start + end).reshape(1, -1),
        last_end=jnp.max((row_start + end).reshape(-1, border or block_k), axis=1),
        opens=jnp.min(jnp.where(active, query, PAST_END), axis=1).reshape(-1),
        closes=jnp.max(jnp.where(active, query, -1), axis=1).reshape(-1),
    )


def fits(batch: int, queries: int, keys: int, offset: int | Array, block_q: int, block_k: int, window: int | None) -> bool:
    """Whether scalar memory holds the visits of `batch` rows, and a visit the numbers of their blocks."""
    query_blocks, key_blocks = -(-queries // block_q), -(-keys // block_k)
    size = visits_of_row(queries, keys, offset, block_q, block_k, window) + TABLES * key_blocks
    return batch * size <= SMEM_WORDS and batch * max(query_blocks, key_blocks) < 1 << BITS


def visits_of_row(queries: int, keys: int, offset: int | Array, block_q: int, block_k: int, window: int | None) -> int:
    """Most visits of one row: at least one of each block; at or below the diagonal if `offset` is static; in the window."""
    query_blocks, key_blocks = -(-queries // block_q), -(-keys // block_k)
    across = key_blocks if window is None else min(key_blocks, (block_q + window - 1) // block_k + 2)
    if not isinstance(offset, int):
        return query_blocks * across + query_blocks + key_blocks
    lasts = (min((i + 1) * block_q, queries) - 1 + offset for i in range(query_blocks))
    return sum(min(max(last // block_k + 1, 1), across) for last in lasts) + key_blocks


def open_blocks(block_k: int, window: int) -> int:
    """Places that hold the blocks of keys which later blocks of queries of this window also visit, in `by_query` order."""
    return (window + block_k - 2) // block_k + 1


def _active(
    begin: Array, end: Array, queries: int, query_blocks: int, block_q: int, block_k: int
) -> tuple[Bool[Array, "B QB KB"], Bool[Array, "B QB KB"]]:
    """(blocks with at least one allowed pair, blocks whose pairs are all allowed, ignoring padded queries)."""
    begin, end = begin.reshape(-1, block_k), end.reshape(end.shape[0], 1, -1, block_k)
    first = jnp.arange(query_blocks, dtype=jnp.int32)[:, None, None] * block_q
    last = jnp.minimum(first + block_q, queries) - 1
    active = jnp.any((begin <= last) & (end > first) & (begin < end), axis=3)
    return active, jnp.all((begin <= first) & (end > last), axis=3)


def _with_empty(active: Array, offset: int | Array, block_q: int, block_k: int) -> Array:
    """Add a visit to each block without any: on the diagonal, so that no block of keys is visited later than in its window.

    The mask of such a visit hides everything, so the kernel writes zeros.
    """
    queries, keys = (jnp.arange(n, dtype=jnp.int32) for n in active.shape[1:])
    of_query = jnp.clip((queries * block_q + offset) // block_k, 0, keys.size - 1)
    of_key = jnp.clip((keys * block_k - offset) // block_q, 0, queries.size - 1)
    active |= (of_query[:, None] == keys) & ~jnp.any(active, axis=2, keepdims=True)
    return active | ((of_key == queries[:, None]) & ~jnp.any(active, axis=1, keepdims=True))


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
