"""Sequence mixers made of softmax attention: causal attention, and meta-attention in its several forms."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from kernels_pallas.prefix_window_attention.reference import masked_attention, masked_softmax
from metajax.config import MetaTokens, Model
from metajax.models import ops
from metajax.models.layers import Linear, gather_rows, residual_std
from metajax.models.masks import Mask, gathered_expiry, meta_dense, meta_flags
from metajax.models.rotary import Table, apply_rotary


class Rows(NamedTuple):
    """What a batch says about its rows, the same for every layer; all of it comes from the data."""

    segment_ids: Array  # int32[B, T]
    rotary: Table | None  # of every position, as causal attention reads it; None without rotary embeddings
    meta_rotary: Table | None  # as meta-attention reads it: at the slots alone where it is gathered
    slots: Array | None  # int32[B, M], sorted indices of the meta-tokens, >= T where unused; None where nothing reads them


class Past(NamedTuple):
    """What earlier tokens left behind in one attention, for rows of one token each; the layers' are stacked."""

    k: Array  # [B, S, KV, Dq], rotated
    v: Array  # [B, S, KV, Dv]
    visible: Array  # bool[B, S]


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

    def __call__(
        self, x: Float[Array, "B T width"], rows: Rows, taps: Taps, past: Past | None = None
    ) -> Float[Array, "B T width"]:
        q, k, v = self.projections.split(x, rows.rotary)
        out, lse = ops.attention(q, k, v, mask=self.mask, segment_ids=rows.segment_ids, implementation=self.implementation)
        if past is not None:
            out, lse = ops.join_past(out, lse, q, *past, implementation=self.implementation)
        taps.record("keys", k)
        taps.record("values", v)
        taps.record("attention_lse", lse)
        if taps.wants("attention_probabilities"):
            allow = self.mask.dense(rows.segment_ids)
            taps.record("attention_probabilities", masked_softmax(q, k, allow, scale=q.shape[-1] ** -0.5)[0])
        return self.projections.merge(out)


class MetaAttention(nnx.Module):
    """Attention among the meta-tokens of a segment, with weights of its own (learned meta-tokens, arXiv 2509.16278).

    The form is `MetaTokens.attention`. "gathered" reads and writes the M meta-tokens alone, at M / T of the cost of "dense",
    whose rows of ordinary tokens are for the caller to drop. The rows of "dense_uniform", "dense_causal" and "causal" all count.
    """

    def __init__(self, cfg: Model, meta: MetaTokens, implementation: str, key: PRNGKeyArray):
        self.form, self.writes_everywhere, self.implementation = meta.attention, meta.writes_everywhere, implementation
        self.projections = Projections(cfg, key)

    def __call__(
        self, x: Float[Array, "B N width"], rows: Rows, taps: Taps, past: Past | None = None
    ) -> Float[Array, "B N width"]:
        """x: rows of the (normalised) residual stream, those gathered at `rows.slots` (N = M) or all (N = T)."""
        q, k, v = self.projections.split(x, rows.meta_rotary)
        if self.form == "gathered":
            out, lse = ops.meta_attention(
                q, k, v, slots=rows.slots, segment_ids=rows.segment_ids, implementation=self.implementation
            )
        elif self.form == "causal":
            out, lse = ops.attention(q, k, v, mask=Mask(), segment_ids=rows.segment_ids, implementation=self.implementation)
        else:
            q, allow = self._dense_mask(q, rows)
            out, lse = masked_attention(q, k, v, allow, scale=q.shape[-1] ** -0.5)
        if past is not None:
            out, lse = ops.join_past(out, lse, q, *past, implementation=self.implementation)
        if taps.wants("meta_probabilities"):
            taps.record("meta_probabilities", self._probabilities(q, k, rows))
        for name, value in (("meta_keys", k), ("meta_values", v)):
            if taps.wants(name):
                taps.record(name, gather_rows(value, rows.slots) if self.form == "dense" else value)
        return self.projections.merge(out)

    def _probabilities(self, q: Float[Array, "B N H D"], k: Float[Array, "B N KV D"], rows: Rows) -> Float[Array, "B H N N"]:
        """What the attention weighs its keys with, computed densely; q and k as `__call__` has them."""
        if self.form == "gathered":
            index = jnp.arange(q.shape[1])
            expiry = gathered_expiry(rows.segment_ids, rows.slots)
            allow = Mask.allow(index[None, :, None], index[None, None, :], expiry[:, None, :])
        elif self.form == "causal":
            allow = Mask().dense(rows.segment_ids)
        else:  # the mask has been applied to q before; again changes nothing
            q, allow = self._dense_mask(q, rows)
        return masked_softmax(q, k, allow, scale=q.shape[-1] ** -0.5)[0]

    def _dense_mask(self, q: Float[Array, "B T H D"], rows: Rows) -> tuple[Array, Array]:
        """(queries, bool[B, T, T]): meta-tokens see meta-tokens; ordinary ones nothing, or their past, with scores of 0 if "uniform".

        A constant added to the scores where the mask forbids all keys of a row cancels in its softmax ("dense_causal"), or, when it is
        so great that float32 forgets the scores beside it, leaves equal weights ("dense_uniform").
        """
        allow = meta_dense(rows.segment_ids, rows.slots)
        if self.writes_everywhere:
            ordinary = ~meta_flags(rows.slots, q.shape[1])
            allow = allow | (Mask().dense(rows.segment_ids) & ordinary[:, :, None])
            if self.form == "dense_uniform":
                q = jnp.where(ordinary[:, :, None, None], 0, q)
        return q, allow
