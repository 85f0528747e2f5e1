"""Forward passes with a cache: prompts in one pass, then one token of each row at a time.

The cache of a learned prefix (Hymba, arXiv 2411.13676) is computed once for all prompts. Meta-attention (arXiv 2509.16278) has
its own cache, in our layout: if its form keeps ordinary tokens unchanged, it stores only meta-tokens and ordinary tokens skip it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from metajax.core.errors import require
from metajax.models.lm import LM, Caches
from metajax.models.mixers import MIXERS, KeyValues, LayerSpec
from metajax.models.specs import layer_runs

# Keys that a drawn token sees in a window of W, itself included: W+1 as in training, W as in Hymba's released code with a cache.
DECODE_WINDOWS = {"W+1": 1, "W": 0}
Kept = dict[str, Any]  # of one layer: mixer -> `Ring` or the mixer's state
Cache = tuple[tuple[Kept, ...], ...]  # by run of equal groups, then by layer of the group


@struct.dataclass
class Ring:
    """Ring buffer of rotated keys and values of the newest S tokens of each row, for one attention mixer.

    Token t of a row is at index t mod S. A query also attends to itself, so S = W serves a window of W earlier keys. The learned
    prefix is not in it, because its keys never expire. Arrays are stacked over equal layers. Padding is never stored.
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


@struct.dataclass
class Ready:
    """A model ready to generate."""

    model: LM
    prefix: Caches | None  # cache entries of the learned prefix
    decode_window: str = struct.field(pytree_node=False)

    def decoding(self, spec: LayerSpec) -> LayerSpec:
        """The layer spec with the window that applies when decoding."""
        if spec.window is None:
            return spec
        return spec._replace(window=max(spec.window + DECODE_WINDOWS[self.decode_window] - 1, 0))


def prepare(model: LM, decode_window: str = "W+1") -> Ready:
    """Compute the cache of the learned prefix. decode_window: a key of `DECODE_WINDOWS`, for layers with a window."""
    known = " or ".join(DECODE_WINDOWS)
    require(
        decode_window in DECODE_WINDOWS, f"decode_window = {decode_window!r}: {known}, the newest keys that a drawn token sees"
    )
    if model.unroll >= model.cfg.layers:
        model = _layers_apart(model)
    return Ready(model, jax.jit(LM.prefix_cache)(model), decode_window)


def _layers_apart(model: LM) -> LM:
    """The model with equal groups of layers no longer stacked. A loop over tokens would copy each layer's weights and cache out of
    the stack for every token."""
    apart = jax.tree.map(lambda leaf: leaf, model)  # a new object
    apart.blocks = nnx.List([jax.tree.map(lambda x, i=i: x[i : i + 1], run) for run, n in _runs(model) for i in range(n)])
    return apart


def _runs(model: LM) -> list[tuple[Any, int]]:
    """(stacked groups of layers, their number) for each run."""
    return [(run, len(jax.tree.leaves(run)[0])) for run in model.blocks]


def prefill(
    ready: Ready,
    tokens: Int[Array, "B T"],
    length: Int[Array, " B"],
    meta_positions: Int[Array, "B M"],
    *,
    capacity: int,
    meta_capacity: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """(logits after the last token of each row, cache) of prompts that are padded on the right. Call it under jit.

    The padding is moved to the left, so that the recurrent state at the end of a row is that of its last token.

    Args:
      length: tokens of each row, at least 1.
      meta_positions: of the meta-tokens, sorted, >= T if unused; M >= 1 if `meta_capacity` >= 1.
      capacity: the most tokens that a row will have; a window keeps fewer. meta_capacity: meta-tokens among them.
    """
    model, width = ready.model, tokens.shape[1]
    first = width - length
    positions = jnp.arange(width) - first[:, None]
    tokens = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    metas = jnp.where(meta_positions < length[:, None], meta_positions + first[:, None], width)
    x, left = _forward(ready, tokens, positions, positions >= 0, metas)

    def keep(spec: LayerSpec, left: Kept) -> Kept:
        kept = {}
        for name, values in left.items():
            size = MIXERS[name].kept_positions(ready.decoding(spec), capacity, meta_capacity)
            if not isinstance(values, KeyValues):
                kept[name] = values
            elif size:
                kept[name] = Ring.create(values, size)
        return kept

    groups = [group for group, n in layer_runs(model.cfg, model.meta) for _ in range(n)]
    firsts = itertools.accumulate((n for _, n in _runs(model)), initial=0)  # the groups of a run are equal
    groups = tuple(groups[first] for first, _ in zip(firsts, model.blocks, strict=False))
    return model.unembed(x[:, -1:])[:, 0], _by_layer(keep, groups, left)


def step(
    ready: Ready,
    cache: Cache,
    tokens: Int[Array, " B"],
    at: Int[Array, " B"],
    is_meta: Bool[Array, "B N"],
    present: Bool[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """(logits, cache) after one more token of each row, at position `at` of N. A row that is not `present` keeps its cache."""

    def replaced(old: Array, new: Array) -> Array:
        return jnp.where(present.reshape(1, -1, *(1,) * (old.ndim - 2)), new, old)

    def append(kept: Kept, left: Kept) -> Kept:
        return {
            name: entry.append(left[name]) if isinstance(entry, Ring) else jax.tree.map(replaced, entry, left[name])
            for name, entry in kept.items()
        }

    metas = jnp.where(jnp.take_along_axis(is_meta, at[:, None], axis=1), 0, 1)  # in a row of one token, position 1 means unused
    is_ring = lambda entry: isinstance(entry, Ring)  # noqa: E731
    past = jax.tree.map(lambda entry: entry.past() if is_ring(entry) else entry, cache, is_leaf=is_ring)
    x, left = _forward(ready, tokens[:, None], at[:, None], present[:, None], metas, past=past, row_is_meta=is_meta)
    return ready.model.unembed(x)[:, 0], _by_layer(append, cache, left)


def _forward(
    ready: Ready, tokens: Array, positions: Array, real: Array, metas: Array, **of_past: Any
) -> tuple[Float[Array, "B T width"], Caches]:
    """(residual stream, cache entries of the tokens)."""
    model = ready.model
    inputs = {"positions": positions, "segment_ids": real.astype(jnp.int32), "meta_positions": metas, "prefix": ready.prefix}
    x, captured = model.decode(model.embed(tokens, positions, metas), **inputs, **of_past, capture=("cache",))
    return x, captured["cache"]


def _by_layer(function: Callable[..., Any], *runs: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
    """Apply `function` to each layer's part of `runs`, for every run and every layer of its groups."""
    return tuple(tuple(function(*layer) for layer in zip(*groups, strict=True)) for groups in zip(*runs, strict=True))
