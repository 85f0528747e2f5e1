"""Sequence mixers made of softmax attention: causal attention and meta-attention, which has a dense twin."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from kernels_pallas.prefix_window_attention.reference import masked_attention, masked_softmax
from metajax import ops
from metajax.config import Model
from metajax.models.layers import Linear, gather_rows, residual_std
from metajax.models.masks import Mask, meta_dense
from metajax.models.rotary import Table, apply_rotary


class Rows(NamedTuple):
    """What a batch says about its rows, the same for every layer; all of it comes from the data."""

    segment_ids: Array  # int32[B, T]
    rotary: Table | None  # of every position; None without rotary embeddings
    slots: Array | None  # int32[B, M], sorted indices of the meta-tokens, >= T where unused; None without meta-attention
    slot_rotary: Table | None  # the rotary table at the slots


def make_rows(segment_ids: Array, rotary: Table | None, slots: Array | None) -> Rows:
    """The rows of a batch, with the rotary table gathered at the meta-tokens once for all layers."""
    both = rotary is not None and slots is not None
    slot_rotary = (gather_rows(rotary[0], slots), gather_rows(rotary[1], slots)) if both else None
    return Rows(segment_ids, rotary, slots, slot_rotary)


class Taps:
    """Collects the intermediates asked for by name while one layer is traced; the layer returns `values`."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.values: dict[str, Array] = {}

    def wants(self, name: str) -> bool:
        return name in self.names

    def record(self, name: str, value: Array) -> None:
        if self.wants(name):
            self.values[name] = value


class Projections(nnx.Module):
    """Query, key, value and output maps of one attention, [B, T, width] <-> heads; grouped when kv_heads < heads."""

    def __init__(self, cfg: Model, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.heads, self.kv_heads = cfg.heads, cfg.num_kv_heads
        inner, kv_inner = cfg.heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        std, bias = cfg.init_std, cfg.bias
        self.query = Linear(keys[0], (cfg.width, inner), std=std, bias=bias, axes=("embed", "heads"))
        self.key = Linear(keys[1], (cfg.width, kv_inner), std=std, bias=bias, axes=("embed", "kv_heads"))
        self.value = Linear(keys[2], (cfg.width, kv_inner), std=std, bias=bias, axes=("embed", "kv_heads"))
        self.output = Linear(keys[3], (inner, cfg.width), std=residual_std(cfg), bias=bias, axes=("heads", "embed"))

    def split(self, x: Float[Array, "B T width"], rotary: Table | None) -> tuple[Array, Array, Array]:
        """(q [B, T, H, D], k [B, T, KV, D], v [B, T, KV, D]), q and k rotated when there is a rotary table."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        q = q.reshape(*x.shape[:2], self.heads, -1)
        k, v = (y.reshape(*x.shape[:2], self.kv_heads, -1) for y in (k, v))
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return q, k, v

    def merge(self, out: Float[Array, "B T H D"]) -> Float[Array, "B T width"]:
        """The output projection of all heads."""
        return self.output(out.reshape(*out.shape[:2], -1))


class CausalAttention(nnx.Module):
    """Causal attention inside segments, [B, T, width] -> [B, T, width]; `cfg.window` bounds how far back a query sees."""

    def __init__(self, cfg: Model, implementation: str, key: PRNGKeyArray):
        self.mask, self.implementation = Mask(window=cfg.window), implementation
        self.projections = Projections(cfg, key)

    def __call__(self, x: Float[Array, "B T width"], rows: Rows, taps: Taps) -> Float[Array, "B T width"]:
        q, k, v = self.projections.split(x, rows.rotary)
        out, lse = ops.attention(q, k, v, mask=self.mask, segment_ids=rows.segment_ids, implementation=self.implementation)
        taps.record("attention_lse", lse)
        if taps.wants("attention_probabilities"):
            allow = self.mask.dense(rows.segment_ids)
            taps.record("attention_probabilities", masked_softmax(q, k, allow, scale=q.shape[-1] ** -0.5)[0])
        return self.projections.merge(out)


class MetaAttention(nnx.Module):
    """Attention among the meta-tokens of a segment, with weights of its own (learned meta-tokens, arXiv 2509.16278).

    `gathered` reads and writes the M meta-tokens alone: cost M / T of the dense form. `dense` is its twin over the
    whole row, as the paper's mask is written; its rows that are no meta-token are for the caller to drop.
    """

    def __init__(self, cfg: Model, implementation: str, key: PRNGKeyArray):
        self.implementation = implementation
        self.projections = Projections(cfg, key)

    def gathered(self, x: Float[Array, "B M width"], rows: Rows) -> Float[Array, "B M width"]:
        """x: the meta-tokens' own rows of the (normalised) residual stream, gathered at `rows.slots`."""
        q, k, v = self.projections.split(x, rows.slot_rotary)
        out, _ = ops.meta_attention(q, k, v, slots=rows.slots, segment_ids=rows.segment_ids, implementation=self.implementation)
        return self.projections.merge(out)

    def dense(self, x: Float[Array, "B T width"], rows: Rows) -> Float[Array, "B T width"]:
        """x: every row of the (normalised) residual stream."""
        q, k, v = self.projections.split(x, rows.rotary)
        out, _ = masked_attention(q, k, v, meta_dense(rows.segment_ids, rows.slots), scale=q.shape[-1] ** -0.5)
        return self.projections.merge(out)
