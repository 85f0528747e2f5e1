"""Cached decoding on arrays: the prompt through the ordinary forward pass, then a token at a time.

Two caches stand beside each other (Language Modeling with Learned Meta-Tokens, arXiv 2509.16278; the layout is ours): keys and values of
all tokens for causal attention, and a smaller one of the meta-tokens alone for meta-attention, which ordinary tokens skip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metajax.config import require
from metajax.inference.caches import Cache, KeyValues, Text
from metajax.models.lm import LM

CAPTURED = ("keys", "values", "meta_keys", "meta_values")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the most likely one; of the top_k most likely (0: all), the fewest that have top_p."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature = {self.temperature}: not negative")
        require(self.top_k >= 0, f"top_k = {self.top_k}: a number of tokens, or 0 for all")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p}: a share of the probability, 0 < top_p <= 1")

    def draw(self, logits: Float[Array, " V"], key: Array) -> Int[Array, ""]:
        """One token."""
        if self.temperature == 0:
            return jnp.argmax(logits)
        logits = logits / self.temperature
        if self.top_k == 0 and self.top_p == 1:
            return jax.random.categorical(key, logits)
        order = jnp.argsort(-logits)
        logits = logits[order][: self.top_k or None]
        chances = jax.nn.softmax(logits)
        before = jnp.cumsum(chances) - chances
        return order[jax.random.categorical(key, jnp.where(before < self.top_p, logits, -jnp.inf))]


@struct.dataclass
class Decoding:
    """Rows in the making. N slots each; `at` is the slot to be read next, which is filled while tokens are `left` to be drawn."""

    cache: Cache
    tokens: Int[Array, "B N"]  # meta-tokens and prompt from the start, -1 where nothing is drawn yet
    is_meta: Bool[Array, "B N"]
    at: Int[Array, " B"]
    left: Int[Array, " B"]  # ordinary tokens still to be drawn; 0 after the end-of-text token
    logits: Float[Array, "B V"]  # what the next ordinary token is drawn from


@struct.dataclass
class Rules:
    """What holds for every draw. key: a row's draw depends on it, on the row's number and on the slot alone."""

    banned: Bool[Array, " V"]  # never drawn
    eos: Int[Array, ""]
    key: Array
    sampling: Sampling = struct.field(pytree_node=False)
    ask_real: bool = struct.field(pytree_node=False)  # the ordinary token before asks, not the meta-token between


def prefill(
    model: LM,
    tokens: Int[Array, "B T"],
    length: Int[Array, " B"],
    meta_slots: Int[Array, "B M"],
    *,
    capacity: int,
    meta_capacity: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """(logits after the last token of each row, cache) of prompts that are padded on the right; jit it.

    Args:
      length: tokens of each row, at least 1.
      meta_slots: where they are meta-tokens, sorted, >= T where unused; M >= 1 where `meta_capacity` is.
      capacity: tokens that a row will ever have; a window keeps fewer. meta_capacity: meta-tokens among them.
    """
    if model.cfg.hybrid is not None:
        text = Text.create(tokens, length, capacity)
        return _read_whole(model, text), text
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inputs = {"positions": positions, "segment_ids": (positions < length[:, None]).astype(jnp.int32), "meta_slots": meta_slots}
    capture = CAPTURED if model.meta is not None and model.meta.attention != "none" else CAPTURED[:2]
    x, captured = model.decode(model.embed(tokens, positions, meta_slots), **inputs, capture=capture)
    logits = model.unembed(jnp.take_along_axis(x, length[:, None, None] - 1, axis=1))[:, 0]
    cache, window = {}, model.cfg.window
    reach = capacity if window is None else min(capacity, window)
    if reach:
        cache["attention"] = KeyValues.create(captured["keys"], captured["values"], length, reach)
    everywhere = model.meta is not None and model.meta.writes_everywhere
    if "meta_keys" in captured and (everywhere or meta_capacity):
        count = length if everywhere else jnp.sum(meta_slots < length[:, None], axis=1)
        size = capacity if everywhere else meta_capacity
        cache["meta_attention"] = KeyValues.create(captured["meta_keys"], captured["meta_values"], count, size)
    return logits, cache


def step(
    model: LM,
    cache: Cache,
    tokens: Int[Array, " B"],
    at: Int[Array, " B"],
    is_meta: Bool[Array, "B N"],
    present: Bool[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """(logits, cache) after one more token of each row, at slot `at` of its N; a row that is not `present` keeps its cache."""
    if isinstance(cache, Text):
        text = cache.append(tokens, present)
        return _read_whole(model, text), text
    now = jnp.take_along_axis(is_meta, at[:, None], axis=1)
    past = {name: kind.past() for name, kind in cache.items()}
    meta, second = model.meta, past.get("meta_attention")
    sparse = meta is not None and meta.attention in ("gathered", "dense")
    if second is not None and meta.attention in ("dense_uniform", "dense_causal"):  # a meta-token sees meta-tokens alone
        past["meta_attention"] = second._replace(visible=second.visible & (is_meta[:, : second.k.shape[2]] | ~now))

    def forward(slots: Array) -> tuple[Array, dict[str, Array]]:
        inputs = {"positions": at[:, None], "meta_slots": slots}
        x = model.embed(tokens[:, None], **inputs)
        segment_ids = jnp.ones_like(at)[:, None]
        return model.decode(x, **inputs, segment_ids=segment_ids, capture=CAPTURED, past=past)

    slots = jnp.where(now, 0, 1)  # in a row of one token slot 1 is unused
    if sparse and second is None:
        x, captured = forward(slots[:, :0])
    elif sparse:
        shapes = jax.eval_shape(forward, slots)[1]

        def skip(slots: Array) -> tuple[Array, dict[str, Array]]:
            x, captured = forward(slots[:, :0])
            return x, {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()} | captured

        x, captured = jax.lax.cond(jnp.any(now), forward, skip, slots)
    else:
        x, captured = forward(slots)
    new = {}
    for name, prefix in (("attention", ""), ("meta_attention", "meta_")):
        if name in cache:
            kept = present & now[:, 0] if prefix and sparse else present
            new[name] = cache[name].append(captured[prefix + "keys"], captured[prefix + "values"], kept)
    return model.unembed(x)[:, 0], new


def _read_whole(model: LM, text: Text) -> Float[Array, "B V"]:
    """Logits after the last token of each row."""
    positions = jnp.broadcast_to(jnp.arange(text.tokens.shape[1]), text.tokens.shape)
    segment_ids = (positions < text.length[:, None]).astype(jnp.int32)
    x, _ = model.decode(model.embed(text.tokens, positions), positions=positions, segment_ids=segment_ids)
    return model.unembed(jnp.take_along_axis(x, text.length[:, None, None] - 1, axis=1))[:, 0]


@partial(jax.jit, static_argnames=("capacity", "meta_capacity"))
def start(
    model: LM, tokens: Int[Array, "B N"], is_meta: Bool[Array, "B N"], prompt: Int[Array, "B T"], length: Int[Array, " B"],
    meta_slots: Int[Array, "B M"], count: Int[Array, ""], rules: Rules, *, capacity: int, meta_capacity: int,
) -> Decoding:  # fmt: skip
    """Rows after their prompts (see `prefill`), with the first token drawn; `count` are to be drawn in all."""
    logits, cache = prefill(model, prompt, length, meta_slots, capacity=capacity, meta_capacity=meta_capacity)
    return _draw(Decoding(cache, tokens, is_meta, length, jnp.full_like(length, count), logits), rules)


@partial(jax.jit, donate_argnames="state")
def advance(model: LM, state: Decoding, rules: Rules, slots: Int[Array, ""]) -> Decoding:
    """At most `slots` tokens more in every row, meta-tokens included; fewer when all rows are complete."""

    def body(carry: tuple[Array, Decoding]) -> tuple[Array, Decoding]:
        i, state = carry
        active, at = state.left > 0, state.at[:, None]
        token = jnp.take_along_axis(state.tokens, at, axis=1)[:, 0]
        logits, cache = step(model, state.cache, token, state.at, state.is_meta, active)
        asks = active & ~(jnp.take_along_axis(state.is_meta, at, axis=1)[:, 0] & rules.ask_real)
        logits = jnp.where(asks[:, None], logits, state.logits)
        return i + 1, _draw(state.replace(cache=cache, at=state.at + active, logits=logits), rules)

    going = lambda carry: (carry[0] < slots) & jnp.any(carry[1].left > 0)  # noqa: E731
    return jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state))[1]


def _draw(state: Decoding, rules: Rules) -> Decoding:
    """Fill the slot to be read next, unless it holds a meta-token."""
    rows, slots = jnp.arange(len(state.at)), state.tokens.shape[1]
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(rules.key, row), at))(rows, state.at)
    drawn = jax.vmap(rules.sampling.draw)(jnp.where(rules.banned, -jnp.inf, state.logits), keys).astype(state.tokens.dtype)
    draws = (state.left > 0) & ~jnp.take_along_axis(state.is_meta, state.at[:, None], axis=1)[:, 0]
    tokens = state.tokens.at[rows, jnp.where(draws, state.at, slots)].set(drawn, mode="drop")
    left = jnp.where(draws, jnp.where(drawn == rules.eos, 0, state.left - 1), state.left)
    return state.replace(tokens=tokens, left=left)
