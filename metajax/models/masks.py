"""Attention masks as one predicate, shared by the reference, the kernels, the FLOP counter and the caches.

Every mask is one number per key, its expiry: key k is visible to the queries k <= q < expiry[k]. The end of a document and a
sliding window differ only in that number, so no kernel needs a T x T array.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from metajax.core.errors import require


@dataclass(frozen=True)
class Mask:
    """Causal attention inside segments, which are runs of equal ids, padding included.

    A subclass with another `expiry` leaves `window` None if some keys are visible for longer: implementations rely on it.
    """

    window: int | None = None  # a query sees itself and this many earlier keys; None: all of its segment

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 0, f"window = {self.window}: a number of earlier keys, not negative")

    def expiry(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """int32[B, T]: the first query index that no longer sees each key."""
        end = segment_end(segment_ids)
        if self.window is None:
            return end
        return jnp.minimum(end, jnp.arange(segment_ids.shape[1], dtype=jnp.int32) + self.window + 1)

    def dense(self, segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
        """The whole mask, bool[B, query, key]. Only the reference and the analyses build it."""
        return dense_mask(self.expiry(segment_ids))

    def pairs(self, length: int) -> int:
        """Number of allowed (query, key) pairs in a segment; a key is visible to min(tokens left, window + 1) queries."""
        reach = length if self.window is None else min(length, self.window + 1)
        return reach * (reach + 1) // 2 + (length - reach) * reach


def dense_mask(expiry: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """bool[B, query, key]: the predicate, evaluated for all pairs."""
    index = jnp.arange(expiry.shape[1])
    query, key = index[None, :, None], index[None, None, :]
    return (key <= query) & (query < expiry[:, None, :])


def segment_end(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """int32[B, T]: for each position, one past the last index of its run of equal ids."""
    length = segment_ids.shape[1]
    index = jnp.arange(1, length + 1, dtype=jnp.int32)
    last = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], axis=1)
    return jax.lax.cummin(jnp.where(last, index, length), axis=1, reverse=True)


# ------------------------------------------------------------------------------------------------- inserted meta-tokens


def gathered_expiry(segment_ids: Int[Array, "B T"], positions: Int[Array, "B M"]) -> Int[Array, "B M"]:
    """Expiry among the gathered meta-tokens, int32[B, M] in gathered indices: causal, inside one segment.

    positions: sorted row indices of the meta-tokens. A position >= T is unused: it sees no key and no query sees it.
    (Learned meta-tokens, arXiv 2509.16278: the meta mask P combined with the causal mask.)
    """
    end = jax.vmap(lambda e, s: e.at[s].get(mode="fill", fill_value=0))(segment_end(segment_ids), positions)
    return jax.vmap(jnp.searchsorted)(positions, end).astype(jnp.int32)


def meta_flags(positions: Int[Array, "B M"], length: int) -> Bool[Array, "B T"]:
    """bool[B, length]: True at the positions of meta-tokens."""
    return jax.vmap(lambda s: jnp.zeros(length, bool).at[s].set(True, mode="drop"))(positions)


def meta_dense(segment_ids: Int[Array, "B T"], positions: Int[Array, "B M"]) -> Bool[Array, "B T T"]:
    """The meta mask over the whole row, bool[B, query, key]: query and key are both meta-tokens, causal, one segment."""
    is_meta = meta_flags(positions, segment_ids.shape[1])
    return Mask().dense(segment_ids) & is_meta[:, :, None] & is_meta[:, None, :]
