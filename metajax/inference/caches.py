"""What decoding keeps of the tokens before: one kind of cache for each kind of mixer.

A kind is a pytree whose arrays are stacked over the layers. It is made from what the prompt's forward pass captured, `past` is what the
layers read of it, and `append` takes in what they captured for one more token. Rows have lengths of their own: prompts are padded on
the right, and what a shorter row would keep of its padding is never kept. A model's cache is a dict, mixer -> kind.
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
    """

    k: Float[Array, "L B S KV Dq"]
    v: Float[Array, "L B S KV Dv"]
    length: Int[Array, " B"]  # tokens so far

    @classmethod
    def create(
        cls, k: Float[Array, "L B T KV Dq"], v: Float[Array, "L B T KV Dv"], length: Int[Array, " B"], capacity: int
    ) -> KeyValues:
        """Of the first `length` tokens of each row; S = capacity >= 1."""
        newest = length[:, None] - 1
        token = newest - (newest - jnp.arange(capacity)) % capacity  # [B, S]; negative where a slot is empty
        pick = jax.vmap(lambda x, t: x[:, jnp.maximum(t, 0)], in_axes=(1, 0), out_axes=1)
        return cls(pick(k, token), pick(v, token), length)

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
class Text:
    """The tokens themselves, of a model whose layers cannot take up from a cache: every token runs its whole row again."""

    tokens: Int[Array, "B S"]
    length: Int[Array, " B"]  # tokens so far

    @classmethod
    def create(cls, tokens: Int[Array, "B T"], length: Int[Array, " B"], capacity: int) -> Text:
        """Of rows that will have at most `capacity` tokens."""
        return cls(jnp.pad(tokens, ((0, 0), (0, max(capacity - tokens.shape[1], 0)))), length)

    def append(self, tokens: Int[Array, " B"], present: Bool[Array, " B"]) -> Text:
        """With one token more in the rows where there is one."""
        at = jnp.where(present, self.length, self.tokens.shape[1])  # a slot out of range is dropped
        return Text(self.tokens.at[jnp.arange(len(at)), at].set(tokens, mode="drop"), self.length + present)


Cache = dict[str, KeyValues] | Text
