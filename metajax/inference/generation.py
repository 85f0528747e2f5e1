"""Sampling text. Every new token runs the whole row again: exact, and fast enough for samples of a small model."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Config, Metadata, require
from metajax.data.metadata import delimiters
from metajax.data.tokenizers import Tokenizer


def meta_layout(slots: int, rate: float) -> np.ndarray:
    """Sorted int32 slots of meta-tokens in a generated row: evenly spaced at `rate`, never slot 0."""
    period = round(1 / rate) if rate else slots + 1
    return np.arange(period - 1, slots, period, dtype=np.int32) if period > 1 else np.arange(1, slots, dtype=np.int32)


@partial(jax.jit, static_argnames=("count", "ask_real"))
def _sample(
    model: Any, tokens: jax.Array, real: jax.Array, start: jax.Array, meta_slots: jax.Array | None,
    banned: jax.Array, temperature: jax.Array, key: jax.Array, *, count: int, ask_real: bool,
) -> jax.Array:  # fmt: skip
    """tokens [1, T] with `count` real slots from number `start` on filled in; `real` lists the real slots in order.

    A token is asked for at the slot before it, or with `ask_real` at the real slot before it, as its training loss did.
    """
    slots = tokens.shape[1]
    inputs = {"positions": jnp.arange(slots, dtype=jnp.int32)[None], "segment_ids": jnp.ones((1, slots), jnp.int32)}
    if meta_slots is not None:
        inputs["meta_slots"] = meta_slots[None]

    def body(i: jax.Array, tokens: jax.Array) -> jax.Array:
        slot = real[start + i]
        asked = real[start + i - 1] if ask_real else slot - 1
        logits = jnp.where(banned, -jnp.inf, model(tokens, **inputs)[0, asked])
        drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits))
        return tokens.at[0, slot].set(token.astype(tokens.dtype))

    return jax.lax.fori_loop(0, count, body, tokens)


def _layout(config: Config) -> tuple[np.ndarray | None, np.ndarray]:
    """(slots of the meta-tokens or None, all other slots) of a generated row."""
    slots = config.row_slots
    if config.meta_tokens is None or not config.meta_tokens.rate:
        return None, np.arange(slots)
    meta_slots = meta_layout(slots, config.meta_tokens.rate)
    return meta_slots, np.setdiff1d(np.arange(slots), meta_slots)


def _head(config: Config, tokenizer: Tokenizer, context: str | None) -> list[int]:
    """BOS, and the metadata between the delimiters it had in training."""
    if context is None:
        return [tokenizer.vocabulary.bos]
    before, after = delimiters(config.metadata or Metadata(), tokenizer)
    return [tokenizer.vocabulary.bos, *before, *tokenizer.encode(context), *after]


def room_for_prompt(config: Config, tokenizer: Tokenizer, context: str | None) -> int:
    """Tokens of a row that prompt and continuation can share behind `context`."""
    return len(_layout(config)[1]) - len(_head(config, tokenizer, context))


def generate(
    model: Any, config: Config, tokenizer: Tokenizer, prompt: str, *, count: int, context: str | None = None,
    temperature: float = 0.8, seed: int = 0,
) -> str:  # fmt: skip
    """The text that follows `prompt`, at most `count` tokens, cut at the end-of-text token.

    Args:
      context: metadata text put between the context delimiters in front; None for none.
      temperature: 0 takes the most likely token.

    Raises:
      UserError: prompt and continuation do not fit in a row.
    """
    vocabulary = tokenizer.vocabulary
    ids = [*_head(config, tokenizer, context), *tokenizer.encode(prompt)]
    meta_slots, real = _layout(config)
    require(
        len(ids) + count <= len(real),
        f"the prompt has {len(ids)} tokens and {count} are to follow, but a row of {config.name} holds {len(real)}; shorten either",
    )
    tokens = np.full((1, config.row_slots), vocabulary.pad, np.int32)
    if meta_slots is not None:
        tokens[0, meta_slots] = vocabulary.meta
    tokens[0, real[: len(ids)]] = ids
    banned = np.arange(vocabulary.size) >= vocabulary.base
    banned[vocabulary.eos] = False
    filled = _sample(
        model, jnp.asarray(tokens), jnp.asarray(real), jnp.asarray(len(ids)), None if meta_slots is None else jnp.asarray(meta_slots),
        jnp.asarray(banned), jnp.asarray(temperature, jnp.float32), jax.random.key(seed), count=count, ask_real=config.meta_tokens is not None and config.meta_tokens.loss == "real_only",
    )  # fmt: skip
    new = np.asarray(filled)[0, real[len(ids) : len(ids) + count]].tolist()
    return tokenizer.decode(new[: new.index(vocabulary.eos)] if vocabulary.eos in new else new)
