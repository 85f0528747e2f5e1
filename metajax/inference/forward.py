"""Forward passes with a cache: prompts in one ordinary pass, then a token at a time.

Two caches of keys and values stand beside each other in a model with learned meta-tokens (arXiv 2509.16278; the layout is ours): one of all
tokens for causal attention, and a smaller one of the meta-tokens alone for meta-attention, which ordinary tokens skip. A hybrid (Hymba,
arXiv 2411.13676) has what its mixers need in each layer, keys and values where a layer has its own; what its meta tokens leave is computed
once for all prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from metajax.core.errors import require
from metajax.inference.caches import Cache, KeyValues, Kinds, Recurrence
from metajax.models.hybrid import Kind, Left, layer_runs
from metajax.models.lm import LM

CAPTURED = ("keys", "values", "meta_keys", "meta_values")
# Keys of a window of W that a drawn token sees, its own among them: as in training, and as Hymba's released code has it with its cache.
DECODE_WINDOWS = {"W+1": 1, "W": 0}


@struct.dataclass
class Ready:
    """A model ready to generate."""

    model: LM
    prefix: Any  # what a hybrid's meta tokens leave in its layers
    decode_window: str = struct.field(pytree_node=False)

    def reach(self, window: int | None, capacity: int) -> int:
        """Earlier keys that a drawn token sees in a layer, of at most `capacity`."""
        return capacity if window is None else min(capacity, max(window + DECODE_WINDOWS[self.decode_window] - 1, 0))


def prepare(model: LM, decode_window: str = "W+1") -> Ready:
    """What its meta tokens leave in a hybrid is computed here. decode_window: a key of `DECODE_WINDOWS`, for layers with a window."""
    known = " or ".join(DECODE_WINDOWS)
    require(
        decode_window in DECODE_WINDOWS, f"decode_window = {decode_window!r}: {known}, the newest keys that a drawn token sees"
    )
    return Ready(model, jax.jit(LM.meta_prefix)(model), decode_window)


def prefill(
    ready: Ready,
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
    model = ready.model
    if model.cfg.hybrid is not None:
        return _prefill_hybrid(ready, tokens, length, meta_slots, capacity)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inputs = {"positions": positions, "segment_ids": (positions < length[:, None]).astype(jnp.int32), "meta_slots": meta_slots}
    capture = CAPTURED if model.meta is not None and model.meta.attention != "none" else CAPTURED[:2]
    x, captured = model.decode(model.embed(tokens, positions, meta_slots), **inputs, capture=capture)
    logits = model.unembed(jnp.take_along_axis(x, length[:, None, None] - 1, axis=1))[:, 0]
    cache, reach = {}, ready.reach(model.cfg.window, capacity)
    if reach:
        cache["attention"] = KeyValues.create(captured["keys"], captured["values"], length, reach)
    everywhere = model.meta is not None and model.meta.writes_everywhere
    if "meta_keys" in captured and (everywhere or meta_capacity):
        count = length if everywhere else jnp.sum(meta_slots < length[:, None], axis=1)
        size = capacity if everywhere else meta_capacity
        cache["meta_attention"] = KeyValues.create(captured["meta_keys"], captured["meta_values"], count, size)
    return logits, cache


def step(
    ready: Ready,
    cache: Cache,
    tokens: Int[Array, " B"],
    at: Int[Array, " B"],
    is_meta: Bool[Array, "B N"],
    present: Bool[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """(logits, cache) after one more token of each row, at slot `at` of its N; a row that is not `present` keeps its cache."""
    model = ready.model
    now = jnp.take_along_axis(is_meta, at[:, None], axis=1)
    slots = jnp.where(now, 0, 1)  # in a row of one token slot 1 is unused
    if model.cfg.hybrid is not None:
        return _step_hybrid(ready, cache, tokens, at, slots, present)
    past = {name: kind.past() for name, kind in cache.items()}
    meta, second = model.meta, past.get("meta_attention")
    sparse = meta is not None and meta.attention in ("gathered", "dense")
    if second is not None and meta.attention in ("dense_uniform", "dense_causal"):  # a meta-token sees meta-tokens alone
        past["meta_attention"] = second._replace(visible=second.visible & (is_meta[:, : second.k.shape[2]] | ~now))

    def forward(slots: Array) -> tuple[Array, dict[str, Array]]:
        return _one_token(model, tokens, at, slots, capture=CAPTURED, past=past)

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


def _one_token(model: LM, tokens: Array, at: Array, slots: Array, **options: Any) -> tuple[Array, dict[str, Any]]:
    """(final residual stream [B, 1, width], captured) of one token of each row."""
    inputs = {"positions": at[:, None], "meta_slots": slots}
    return model.decode(model.embed(tokens[:, None], **inputs), **inputs, segment_ids=jnp.ones_like(at)[:, None], **options)


# ------------------------------------------------------------------------------------------------- hybrids


def _prefill_hybrid(ready: Ready, tokens: Array, length: Array, meta_slots: Array, capacity: int) -> tuple[Array, Cache]:
    """Padding goes to the left: what a Mamba remembers at the end of a row is then that of its last token."""
    model, width = ready.model, tokens.shape[1]
    first = width - length
    positions = jnp.arange(width) - first[:, None]
    tokens = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)
    slots = jnp.where(meta_slots < length[:, None], meta_slots + first[:, None], width)
    inputs = {"positions": positions, "segment_ids": (positions >= 0).astype(jnp.int32), "meta_slots": slots}
    x, captured = model.decode(model.embed(tokens, positions, slots), **inputs, capture=("left",), prefix=ready.prefix)

    def keep(kind: Kind, left: Left) -> Kinds:
        kinds, reach = {}, ready.reach(kind.window, capacity)
        if "attention" in left and reach:
            kinds["attention"] = KeyValues.create(*left["attention"], length, reach, first)
        if "mamba" in left:
            kinds["mamba"] = Recurrence(*left["mamba"])
        return kinds

    groups = tuple(group for group, _ in layer_runs(model.cfg))
    return model.unembed(x[:, -1:])[:, 0], _by_layer(keep, groups, captured["left"])


def _step_hybrid(ready: Ready, cache: Cache, tokens: Array, at: Array, slots: Array, present: Array) -> tuple[Array, Cache]:
    model, past = ready.model, _by_layer(lambda kinds: {name: kind.past() for name, kind in kinds.items()}, cache)
    x, captured = _one_token(model, tokens, at, slots, capture=("left",), past=past, prefix=ready.prefix)
    append = lambda kinds, left: {name: kind.append(*left[name], present) for name, kind in kinds.items()}  # noqa: E731
    return model.unembed(x)[:, 0], _by_layer(append, cache, captured["left"])


def _by_layer(function: Callable[..., Any], *runs: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
    """`function` of what each of `runs` has for a layer, run by run and layer by layer of its groups."""
    return tuple(tuple(function(*layer) for layer in zip(*groups, strict=True)) for groups in zip(*runs, strict=True))
