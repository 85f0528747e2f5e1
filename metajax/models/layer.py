"""One layer of any model, and groups of layers, which are stacked and scanned.

Training, prefill and decoding call the same `Layer`. A learned prefix (Hymba, arXiv 2411.13676: "meta tokens") is causal and
comes first, so its cache entries do not depend on the document. It passes through the layers once as a separate short row, and
every packed segment starts from its cache entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from metajax.config import Model
from metajax.distributed.rules import RESIDUAL_AXES, constrain
from metajax.models.layers import Linear, Mlp, Norm, gather_rows, scatter_add_rows
from metajax.models.masks import meta_flags
from metajax.models.mixers import MIXERS, Cache, Captures, LayerInputs, LayerSpec
from metajax.models.mixers.meta_attention import MetaAttention

LAYER_CAPTURES = (
    "residual",  # [L, B, T, width], the input of each layer
    "mixer_out",  # [L, B, T, width], what the mixers add to the residual stream
    "mlp_out",  # [L, B, T, width], what the feed-forward network adds
)
Left = dict[str, Any]  # cache entries that tokens leave in a layer, by mixer; see `Cache`
# Residual streams of the tokens, [B, T, width], and of the learned prefix, [1, M, width]; None: none, or its entries are given.
Streams = tuple[Array, Array | None]
Given = tuple[tuple[Left, ...] | None, ...]  # entries of the learned prefix and, when decoding, of earlier tokens, by layer


class Joined(nnx.Module):
    """The mixers of a layer on the same input, joined by an output map, [B, T, width] -> [B, T, width].

    mean: W((norm(a) + norm(b)) / 2) (Hymba, equation 3; only the text states the half). A narrower output is padded with zeros,
    which is not stated in the paper. concat: W [norm(a), norm(b)]. A single mixer has no norm.
    """

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        self.names, self.join = spec.mixers, spec.join
        widths = [MIXERS[name].channels(cfg) for name in self.names]
        first, other, last = jax.random.split(key, 3) if spec.split_keys else (key, key, jax.random.split(key, 4)[3])
        for name, width in zip(self.names, widths, strict=True):
            setattr(self, name, MIXERS[name](cfg, spec, implementation, first if name == "attention" else other))
            if spec.branch_norm != "none":
                setattr(self, f"{name}_norm", Norm(cfg, width=width, scaled=spec.branch_norm == "scaled"))
        self.inner = sum(widths) if spec.join == "concat" else max(widths)
        axes = ("heads" if spec.mixers == ("attention",) else "ssm", "embed")
        self.output = Linear(last, (self.inner, cfg.width), std=spec.residual_std, bias=cfg.bias, axes=axes)

    def __call__(
        self, h: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T width"], Left]:
        branches, left = [], {}
        for name in self.names:
            out, kept = getattr(self, name)(h, inputs, cache, captures)
            norm = getattr(self, f"{name}_norm", None)
            branches.append(out if norm is None else norm(out))
            left |= {} if kept is None else {name: kept}
        if self.join == "mean":
            first, second = (jnp.pad(x, ((0, 0), (0, 0), (0, self.inner - x.shape[-1]))) for x in branches)
            return self.output((first + second) / 2), left
        return self.output(jnp.concatenate(branches, axis=-1) if self.join == "concat" else branches[0]), left


class Layer(nnx.Module):
    """x += Mixers(norm x); x += MetaAttention(norm x) at the meta-tokens; x += Mlp(norm x). norm_position "post" norms the sums instead.

    Meta-attention is placed as in "Language Modeling with Learned Meta-Tokens" (arXiv 2509.16278, section 3). The paper does not
    state where its norm is.
    """

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.pre_norm, has_meta = cfg.norm_position == "pre", spec.meta_attention != "none"
        self.mixer, self.mixer_norm = Joined(cfg, spec, implementation, keys[0]), Norm(cfg)
        self.mlp, self.mlp_norm = (Mlp(cfg, keys[1], spec.residual_std), Norm(cfg)) if spec.mlp else (None, None)
        self.meta_attention = MetaAttention(cfg, spec, implementation, keys[2]) if has_meta else None
        self.meta_norm = Norm(cfg) if has_meta else None

    def __call__(
        self, x: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T width"], Left]:
        """(residual stream, cache entries of these tokens by mixer)."""
        captures.record("residual", x)
        change, left = self.mixer(self._read(x, self.mixer_norm), inputs, cache, captures)
        change = self._change(x, self.mixer_norm, change)
        captures.record("mixer_out", change)
        x, of_meta = self._add_meta(x + change, inputs, cache, captures)
        if self.mlp is not None and self.mlp_norm is not None:
            change = self._change(x, self.mlp_norm, self.mlp(self._read(x, self.mlp_norm)))
            captures.record("mlp_out", change)
            x = x + change
        return constrain(x, RESIDUAL_AXES), left | of_meta

    def _read(self, x: Array, norm: Norm) -> Array:
        return norm(x) if self.pre_norm else x

    def _change(self, x: Array, norm: Norm, out: Array) -> Array:
        """What a branch with output `out` adds to the residual stream `x`."""
        return out if self.pre_norm else norm(x + out) - x

    def _add_meta(self, x: Array, inputs: LayerInputs, cache: Cache, captures: Captures) -> tuple[Array, Left]:
        """(residual stream after meta-attention, its keys and values). Ordinary tokens skip it unless its form writes to all."""
        meta = self.meta_attention
        if meta is None:
            return x, {}
        decoding = inputs.row_is_meta is not None
        if meta.writes_everywhere or (not decoding and inputs.meta_positions is not None):
            return self._attend_meta(meta, x, inputs, cache, captures)
        if not decoding or "meta_attention" not in cache.past:  # no row has a meta-token, or will ever have one
            return x, {}
        attend = lambda x: self._attend_meta(meta, x, inputs, cache, Captures())  # noqa: E731
        nothing = lambda x: (x, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(attend, x)[1]))  # noqa: E731
        return jax.lax.cond(jnp.any(inputs.metas < x.shape[1]), attend, nothing, x)

    def _attend_meta(
        self, meta: MetaAttention, x: Array, inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Array, Left]:
        assert self.meta_norm is not None
        gathered = meta.form == "gathered"
        read = gather_rows(x, inputs.metas) if gathered else x
        out, kept = meta(self._read(read, self.meta_norm), inputs, cache, captures)
        change = self._change(read, self.meta_norm, out)
        if gathered:
            if captures.wants("meta_out"):
                captures.record("meta_out", scatter_add_rows(jnp.zeros_like(x), inputs.metas, change))
            return scatter_add_rows(x, inputs.metas, change), {"meta_attention": kept}
        if not meta.writes_everywhere:
            change = jnp.where(meta_flags(inputs.metas, x.shape[1])[..., None], change, 0)
        captures.record("meta_out", change)
        return x + change, {"meta_attention": kept}


def make_group(cfg: Model, specs: tuple[LayerSpec, ...], implementation: str, key: PRNGKeyArray) -> Sequence[Layer]:
    """Consecutive layers that are stacked as one unit."""
    keys = jax.random.split(key, len(specs)) if specs[0].split_keys else [key]
    return nnx.List([Layer(cfg, spec, implementation, k) for spec, k in zip(specs, keys, strict=True)])


def apply_group(
    capture: tuple[str, ...],
    inputs: LayerInputs,
    prefix_inputs: LayerInputs,
    streams: Streams,
    group: tuple[Sequence[Layer], Given],
) -> tuple[Streams, dict[str, Any]]:
    """(streams, captures) after the layers of a group; each capture is stacked over the layers that record it."""
    (layers, given), (x, prefix) = group, streams
    of_prefix = tuple(name.removeprefix("prefix_") for name in capture if name.startswith("prefix_"))
    values: dict[str, list[Array]] = {}
    cache, lefts = Cache({}, {}, {}), []
    for i, layer in enumerate(layers):
        prefix_captures, captures = Captures(of_prefix), Captures(capture)
        before, past = ({} if entries is None else entries[i] for entries in given)
        if prefix is not None:
            prefix, before = layer(prefix, prefix_inputs, Cache({}, {}, cache.prefix), prefix_captures)
        cache = cache._replace(prefix=cache.prefix | before, past=cache.past | past)
        x, left = layer(x, inputs, cache, captures)
        cache = cache._replace(group=cache.group | left)
        lefts.append(left)
        for name, value in (captures.values | {f"prefix_{k}": v for k, v in prefix_captures.values.items()}).items():
            values.setdefault(name, []).append(value)
    stacked = {name: jnp.stack(found) for name, found in values.items()}
    return (x, prefix), stacked | ({"cache": tuple(lefts)} if "cache" in capture else {})
