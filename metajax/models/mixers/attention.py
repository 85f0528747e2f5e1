"""Causal softmax attention with grouped heads, an optional window, shared keys and values, and an always-visible prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from kernels_pallas.prefix_window_attention.reference import masked_softmax, with_prefix
from metajax.config import Model
from metajax.models import ops
from metajax.models.layers import Linear, residual_std
from metajax.models.masks import Mask
from metajax.models.mixers.base import Batch, Cache, Captures, KeyValues, LayerInputs, LayerSpec, Mixer, mixer
from metajax.models.rotary import Table, apply_rotary


class QueryKeyValue(nnx.Module):
    """Query, key and value maps, [B, T, width] -> heads; grouped if kv_heads < heads. owns_kv False: only the query map."""

    def __init__(self, cfg: Model, key: PRNGKeyArray, *, owns_kv: bool = True):
        keys = jax.random.split(key, 3)
        self.heads, self.kv_heads = cfg.heads, cfg.num_kv_heads

        def make(key: PRNGKeyArray, inner: int, axis: str) -> Linear:
            return Linear(key, (cfg.width, inner), std=cfg.init_std, bias=cfg.bias, axes=("embed", axis))

        self.query = make(keys[0], cfg.heads * cfg.head_dim, "heads")
        self.key = make(keys[1], cfg.num_kv_heads * cfg.head_dim, "kv_heads") if owns_kv else None
        self.value = make(keys[2], cfg.num_kv_heads * cfg.value_dim, "kv_heads") if owns_kv else None

    def split(self, h: Float[Array, "B T width"], rotary: Table | None) -> tuple[Array, Array | None, Array | None]:
        """(queries, keys, values), [B, T, heads, D] each; a rotary table rotates queries and keys."""
        q = self.query(h).reshape(*h.shape[:2], self.heads, -1)
        q = q if rotary is None else apply_rotary(q, *rotary)
        if self.key is None or self.value is None:
            return q, None, None
        k, v = (y.reshape(*h.shape[:2], self.kv_heads, -1) for y in (self.key(h), self.value(h)))
        return q, k if rotary is None else apply_rotary(k, *rotary), v


class Projections(QueryKeyValue):
    """Query, key and value maps with an output map from all heads to the width of the model."""

    def __init__(self, cfg: Model, key: PRNGKeyArray):
        super().__init__(cfg, key)
        inner, last = cfg.heads * cfg.head_dim, jax.random.split(key, 4)[3]
        self.output = Linear(last, (inner, cfg.width), std=residual_std(cfg), bias=cfg.bias, axes=("heads", "embed"))

    def merge(self, out: Float[Array, "B T H D"]) -> Float[Array, "B T width"]:
        """Apply the output map."""
        return self.output(out.reshape(*out.shape[:2], -1))


@mixer("attention")
class Attention(QueryKeyValue, Mixer):
    """Causal attention inside segments, [B, T, width] -> [B, T, heads * value_dim]. A query sees `spec.window` earlier keys."""

    in_hybrid = False
    captures = (
        "attention_branch",  # [L, B, T, heads * value_dim], before its norm and the output map
        "attention_lse",  # float32[L, B, T, heads]
        "attention_probabilities",  # float32[L, B, heads, query, M + key], computed by a separate dense softmax
        "keys",  # [owners, B, T, kv_heads, head_dim], rotated; owners are the layers with `owns_kv`
        "values",  # [owners, B, T, kv_heads, value_dim]
    )

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        super().__init__(cfg, key, owns_kv=spec.owns_kv)
        self.mask, self.implementation = Mask(window=spec.window), implementation

    def __call__(
        self, h: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T HD"], KeyValues | None]:
        (q, k, v), left = self.split(h, inputs.rotary), None
        if k is None or v is None:
            k, v, _ = cache.group["attention"]
        else:
            left = KeyValues(k, v, inputs.segment_ids > 0)
            captures.record("keys", k)
            captures.record("values", v)
        prefix_k, prefix_v = (x[0] for x in cache.prefix["attention"][:2]) if "attention" in cache.prefix else (None, None)
        mask = Mask() if inputs.is_prefix else self.mask
        options = {"segment_ids": inputs.segment_ids, "implementation": self.implementation}
        out, lse = ops.attention(q, k, v, mask=mask, prefix_k=prefix_k, prefix_v=prefix_v, **options)
        if "attention" in cache.past:
            out, lse = ops.join_past(out, lse, q, *cache.past["attention"], implementation=self.implementation)
        captures.record("attention_lse", lse)
        if captures.wants("attention_probabilities"):
            allow, keys = mask.dense(inputs.segment_ids), k
            if prefix_k is not None:
                allow = jnp.pad(allow, ((0, 0), (0, 0), (len(prefix_k), 0)), constant_values=True)
                keys = with_prefix(prefix_k, k)
            captures.record("attention_probabilities", masked_softmax(q, keys, allow, scale=q.shape[-1] ** -0.5)[0])
        out = out.reshape(*out.shape[:2], -1)
        captures.record("attention_branch", out)
        return out, left

    @staticmethod
    def channels(cfg: Model) -> int:
        return cfg.heads * cfg.value_dim

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        kv = cfg.num_kv_heads * (cfg.head_dim + cfg.value_dim)
        return {"attention": 2 * cfg.width * (cfg.heads * cfg.head_dim + spec.owns_kv * kv)}

    @staticmethod
    def pair_flops(cfg: Model) -> int:
        return 2 * cfg.heads * (cfg.head_dim + cfg.value_dim)  # scores and weighted sum of all heads

    @staticmethod
    def pairs(spec: LayerSpec, batch: Batch, prefix: int) -> int:
        earlier = batch["positions"][batch["segment_ids"] > 0]
        reach = earlier if spec.window is None else np.minimum(earlier, spec.window)
        return int(reach.sum()) + earlier.size * (1 + prefix)

    @staticmethod
    def kept_positions(spec: LayerSpec, tokens: int, metas: int) -> int:
        return (tokens if spec.window is None else min(tokens, spec.window)) * spec.owns_kv

    @staticmethod
    def cache_bytes(cfg: Model, spec: LayerSpec, tokens: int) -> dict[str, int]:
        width = cfg.num_kv_heads * (cfg.head_dim + cfg.value_dim) * jnp.dtype(cfg.compute_dtype).itemsize
        part = "full" if spec.window is None else "window"
        return {part: width * Attention.kept_positions(spec, tokens, 0)}
