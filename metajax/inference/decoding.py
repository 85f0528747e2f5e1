"""Sampling of one token, and batched token-by-token decoding on arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metajax.config import Temperature, TopK, TopP
from metajax.core.fields import Part
from metajax.inference.forward import Cache, Ready, prefill, step


@dataclass(frozen=True)
class Sampling(Part):
    """Sampling parameters. Temperature 0 is greedy. Candidates are the top_k tokens (0: all), then the fewest with mass top_p."""

    temperature: Temperature = 0.8
    top_k: TopK = 0
    top_p: TopP = 1.0

    def draw(self, logits: Float[Array, " V"], key: Array) -> Int[Array, ""]:
        """Draw one token."""
        if self.temperature == 0:
            return jnp.argmax(logits)
        # With the maximum at 0, a temperature close to 0 gives the others -inf and no NaN. Below 1e-30 float32 flushes to 0.
        logits = (logits - jnp.max(logits)) / max(self.temperature, 1e-30)
        if self.top_k == 0 and self.top_p == 1:
            return jax.random.categorical(key, logits)
        order = jnp.argsort(-logits)
        logits = logits[order][: self.top_k or None]
        chances = jax.nn.softmax(logits)
        before = jnp.cumsum(chances) - chances
        return order[jax.random.categorical(key, jnp.where(before < self.top_p, logits, -jnp.inf))]


@struct.dataclass
class Decoding:
    """State of rows being generated, N positions each. `at` is the next position to read; it is filled while `left` > 0."""

    cache: Cache
    tokens: Int[Array, "B N"]  # meta-tokens and prompt are filled at the start; -1: not drawn yet
    is_meta: Bool[Array, "B N"]
    at: Int[Array, " B"]
    left: Int[Array, " B"]  # ordinary tokens still to draw; 0 after a token that ends the text
    logits: Float[Array, "B V"]  # of the next ordinary token


@struct.dataclass
class Rules:
    """Rules of every draw. The randomness of a draw depends only on `key`, the row's number and the position."""

    banned: Bool[Array, " V"]  # never drawn
    ends: Int[Array, " E"]  # ids that end a row
    key: Array
    # Guidance strength g of `guided`. The first half of the rows then has a context, and the second half repeats them without it.
    guidance: Float[Array, ""] | None
    sampling: Sampling = struct.field(pytree_node=False)
    ask_real: bool = struct.field(pytree_node=False)  # use the logits of the last ordinary token, not of a meta-token after it


@partial(jax.jit, static_argnames=("capacity", "meta_capacity"))
def start(
    ready: Ready,
    tokens: Int[Array, "B N"],
    is_meta: Bool[Array, "B N"],
    prompt: Int[Array, "B T"],
    length: Int[Array, " B"],
    meta_positions: Int[Array, "B M"],
    count: Int[Array, ""],
    rules: Rules,
    *,
    capacity: int,
    meta_capacity: int,
) -> Decoding:
    """Read the prompts (see `prefill`) and draw the first of `count` tokens."""
    logits, cache = prefill(ready, prompt, length, meta_positions, capacity=capacity, meta_capacity=meta_capacity)
    return _draw(Decoding(cache, tokens, is_meta, length, jnp.full_like(length, count), logits), rules)


@partial(jax.jit, donate_argnames="state")
def advance(ready: Ready, state: Decoding, rules: Rules, positions: Int[Array, ""]) -> Decoding:
    """Decode at most `positions` more tokens in every row, meta-tokens included; stops when all rows are complete."""

    def body(carry: tuple[Array, Decoding]) -> tuple[Array, Decoding]:
        i, state = carry
        active, at = state.left > 0, state.at[:, None]
        token = jnp.take_along_axis(state.tokens, at, axis=1)[:, 0]
        logits, cache = step(ready, state.cache, token, state.at, state.is_meta, active)
        asks = active & ~(jnp.take_along_axis(state.is_meta, at, axis=1)[:, 0] & rules.ask_real)
        logits = jnp.where(asks[:, None], logits, state.logits)
        return i + 1, _draw(state.replace(cache=cache, at=state.at + active, logits=logits), rules)

    going = lambda carry: (carry[0] < positions) & jnp.any(carry[1].left > 0)  # noqa: E731
    return jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state))[1]


def guided(with_context: Float[Array, "B V"], without: Float[Array, "B V"], guidance: Float[Array, ""]) -> Float[Array, "B V"]:
    """z_empty + g (z_context - z_empty) (arXiv 2505.16570), written so that g = 0 and g = 1 are exact."""
    return (1 - guidance) * without + guidance * with_context


def _draw(state: Decoding, rules: Rules) -> Decoding:
    """Fill the next position, unless it holds a meta-token."""
    rows, positions, logits = jnp.arange(len(state.at)), state.tokens.shape[1], state.logits
    drawn_by = rows
    if rules.guidance is not None:  # a pair draws one token
        half = len(rows) // 2
        drawn_by = rows % half
        logits = jnp.tile(guided(logits[:half], logits[half:], rules.guidance), (2, 1))
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(rules.key, row), at))(drawn_by, state.at[drawn_by])
    drawn = jax.vmap(rules.sampling.draw)(jnp.where(rules.banned, -jnp.inf, logits), keys).astype(state.tokens.dtype)
    draws = (state.left > 0) & ~jnp.take_along_axis(state.is_meta, state.at[:, None], axis=1)[:, 0]
    tokens = state.tokens.at[rows, jnp.where(draws, state.at, positions)].set(drawn, mode="drop")
    left = jnp.where(draws, jnp.where(jnp.isin(drawn, rules.ends), 0, state.left - 1), state.left)
    return state.replace(tokens=tokens, left=left)
