"""What decoding keeps of the tokens before: one kind of cache for each kind of mixer.

A kind is a pytree whose arrays are stacked over alike layers. It is made from what the prompt's forward pass left, `past` is what the
layers read of it, and `append` takes in what they left of one more token. Rows have lengths of their own; what stands beside their tokens
is padding and never kept. A model's cache is a dict, mixer -> kind; a hybrid's has one for every layer of its groups, run by run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metajax.models.attention import Past


@struct.dataclass
class KeyValues:
    """Rotated keys and values of the newest S tokens of each row in one attention, all of them while there are no more.

    A ring buffer: token t of a row lies at slot t mod S. A query attends to itself besides, so S = W serves a window of W earlier keys.
    A hybrid's meta tokens are not in it: their keys are the same for all rows and never leave.
    """

    k: Float[Array, "L B S KV Dq"]
    v: Float[Array, "L B S KV Dv"]
    length: Int[Array, " B"]  # tokens so far

    @classmethod
    def create(
        cls,
        k: Float[Array, "L B T KV Dq"],
        v: Float[Array, "L B T KV Dv"],
        length: Int[Array, " B"],
        capacity: int,
        first: int | Int[Array, " B"] = 0,
    ) -> KeyValues:
        """Of `length` tokens of each row, from slot `first` on; S = capacity >= 1."""
        newest = length[:, None] - 1
        token = newest - (newest - jnp.arange(capacity)) % capacity  # [B, S]; negative where a slot is empty
        at = jnp.reshape(first, (-1, 1)) + jnp.maximum(token, 0)
        pick = jax.vmap(lambda x, t: x[:, t], in_axes=(1, 0), out_axes=1)
        return cls(pick(k, at), pick(v, at), length)

    def past(self) -> Past:
        """What a layer's attention reads, visible where a slot is filled."""
        filled = jnp.arange(self.k.shape[2]) < self.length[:, None]
        return Past(self.k, self.v, jnp.broadcast_to(filled, (self.k.shape[0], *filled.shape)))

    def append(self, k: Float[Array, "L B 1 KV Dq"], v: Float[Array, "L B 1 KV Dv"], present: Bool[Array, " B"]) -> KeyValues:
        """With one token more in the rows where there is one, in place of the oldest when the ring is full."""
        slots = self.k.shape[2]
        at = jnp.where(present, self.length % slots, slots)  # a slot out of range is dropped
        rows = jnp.arange(len(self.length))
        k, v = (old.at[:, rows, at].set(new[:, :, 0], mode="drop") for old, new in ((self.k, k), (self.v, v)))
        return KeyValues(k, v, self.length + present)


@struct.dataclass
class Recurrence:
    """What a Mamba remembers of each row, whatever its length."""

    tail: Float[Array, "L B tail D"]  # last inputs of the convolution
    state: Float[Array, "L B C N"]  # float32

    def past(self) -> tuple[Array, Array]:
        """What a layer's Mamba goes on from."""
        return self.tail, self.state

    def append(self, tail: Float[Array, "L B tail D"], state: Float[Array, "L B C N"], present: Bool[Array, " B"]) -> Recurrence:
        """What the rows remember after one token more, where there is one."""
        there = present[:, None, None]
        return Recurrence(jnp.where(there, tail, self.tail), jnp.where(there, state, self.state))


Kinds = dict[str, KeyValues | Recurrence]
Cache = Kinds | tuple[tuple[Kinds, ...], ...]
