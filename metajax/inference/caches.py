"""Caches for decoding: a ring of the newest keys and values, or a mixer's recurrent state.

A cache is created from the cache entries of the prompt and updated with those of each further token. Its arrays are stacked over
equal layers. Each row has its own length; padding is never stored.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metajax.models.mixers import KeyValues


@struct.dataclass
class Ring:
    """Ring buffer of rotated keys and values of the newest S tokens of each row, for one attention mixer.

    Token t of a row is at index t mod S. A query also attends to itself, so S = W serves a window of W earlier keys. The ring
    excludes the learned prefix, whose keys are the same for all rows and never expire.
    """

    k: Float[Array, "L B S KV Dq"]
    v: Float[Array, "L B S KV Dv"]
    length: Int[Array, " B"]  # tokens so far

    @classmethod
    def create(cls, left: KeyValues, capacity: int) -> Ring:
        """A ring from the keys and values [L, B, T, ...] of a prompt, whose real tokens are contiguous; S = capacity >= 1."""
        length, first = jnp.sum(left.real[0], axis=1), jnp.argmax(left.real[0], axis=1)
        newest = length[:, None] - 1
        token = newest - (newest - jnp.arange(capacity)) % capacity  # [B, S]; negative if the entry is empty
        at = first[:, None] + jnp.maximum(token, 0)
        pick = jax.vmap(lambda x, t: x[:, t], in_axes=(1, 0), out_axes=1)
        return cls(pick(left.k, at), pick(left.v, at), length)

    def past(self) -> KeyValues:
        """Keys and values in the form that the layers read."""
        filled = jnp.arange(self.k.shape[2]) < self.length[:, None]
        return KeyValues(self.k, self.v, jnp.broadcast_to(filled, (self.k.shape[0], *filled.shape)))

    def append(self, left: KeyValues) -> Ring:
        """Append one token in the rows that have a real one; a full ring overwrites its oldest token."""
        present, size = left.real[0, :, 0], self.k.shape[2]
        at = jnp.where(present, self.length % size, size)  # an index out of range is dropped
        rows = jnp.arange(len(self.length))
        k, v = (old.at[:, rows, at].set(new[:, :, 0], mode="drop") for old, new in ((self.k, left.k), (self.v, left.v)))
        return Ring(k, v, self.length + present)


Kept = dict[str, Any]  # of one layer: mixer -> `Ring` or the mixer's state


def past(kept: Kept) -> Kept:
    """The cached entries in the form that a layer reads."""
    return {name: cache.past() if isinstance(cache, Ring) else cache for name, cache in kept.items()}


def append(kept: Kept, left: Kept, present: Bool[Array, " B"]) -> Kept:
    """The cache of a layer after one more token in the rows that are `present`."""

    def replaced(old: Array, new: Array) -> Array:
        return jnp.where(present.reshape(1, -1, *(1,) * (old.ndim - 2)), new, old)

    return {
        name: cache.append(left[name]) if isinstance(cache, Ring) else jax.tree.map(replaced, cache, left[name])
        for name, cache in kept.items()
    }
