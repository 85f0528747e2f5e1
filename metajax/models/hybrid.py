"""Hybrid layers: softmax attention beside Mamba, learned meta tokens in front of every document, keys and values shared by layers.

Hymba (arXiv 2411.13676). A prefix of meta tokens is causal and comes first, so what it leaves in a layer does not depend on the
document: it goes through the stack as one short row beside the batch, and every packed segment starts from what it left.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from kernels_pallas.prefix_window_attention.reference import masked_softmax, with_meta
from metajax.config import Model, Runtime
from metajax.distributed.rules import RESIDUAL_AXES, constrain
from metajax.models import ops
from metajax.models.attention import Past, Taps
from metajax.models.layers import Linear, Mlp, Norm, normal_param
from metajax.models.mamba import Mamba
from metajax.models.mamba2 import Mamba2
from metajax.models.masks import Mask
from metajax.models.rotary import Table, apply_rotary, rotary_table

# What can be captured, stacked over the layers that have it. With "prefix_" in front: the same of the M meta tokens, B = 1, T = M.
_OF_LAYERS = (
    "residual",  # [L, B, T, width], the input of each layer
    "mixer_out",  # [L, B, T, width], what attention and Mamba add to the residual stream
    "mlp_out",  # [L, B, T, width], what the feed-forward network adds
    "attention_branch",  # [L, B, T, heads * value_dim], before its norm and the fusion
    "ssm_branch",  # [L, B, T, C], before its norm and the fusion
    "attention_lse",  # float32[L, B, T, heads]
    "attention_probabilities",  # float32[L, B, heads, query, M + key], computed densely beside the model's own attention
    "keys",  # [owners, B, T, kv_heads, head_dim], rotated; of the layers with keys of their own
    "values",  # [owners, B, T, kv_heads, value_dim]
    "conv_tail",  # [L, B, d_conv - 1, C], last inputs of the convolution
    "ssm_state",  # float32[L, B, C, N], after the last token
    "ssm_step",  # float32[L, B, T, C], step sizes
    "ssm_b",  # [L, B, T, N], what a token writes into the state
    "ssm_c",  # [L, B, T, N], what it reads from it
)
# "left" is what caches are made of: a tuple over the runs, of tuples over the layers of their groups, of what the layer leaves.
CAPTURABLE = (*_OF_LAYERS, *(f"prefix_{name}" for name in _OF_LAYERS), "final", "left")
Scan = Callable[..., tuple[Any, Any]]
META_STD = 1.0  # of the initial meta tokens (released code)


class Kind(NamedTuple):
    """What a layer is made of."""

    attends: bool
    scans: bool
    owns_kv: bool
    window: int | None


# What rows of tokens leave in a layer, for the tokens after them and for the layers that share keys and values: of "attention", if the keys
# are its own, (rotated k [B, T, KV, head_dim], v [B, T, KV, value_dim]); of "mamba" (tail [B, d_conv - 1, C], state [B, C, N]).
Left = dict[str, tuple[Array, Array]]
Earlier = dict[str, Past | tuple[Array, Array]]  # of "attention" what `Past` has, of "mamba" (tail, state)


class Before(NamedTuple):
    """What a layer finds. Where it shares keys, "attention" is what the layer has that owns them."""

    prefix: Left  # of the meta tokens, B = 1
    past: Earlier  # of the tokens before, for rows of one token
    group: Left  # of these tokens in the earlier layers of the group


class Known(NamedTuple):
    """What a group, or a run of them, need not compute: for each of its layers."""

    prefix: tuple[Left, ...] | None  # what the meta tokens left
    past: tuple[Earlier, ...] | None


class Row(NamedTuple):
    """What the layers read beside the residual stream."""

    segment_ids: Int[Array, "B T"]
    rotary: Table | None
    is_prefix: bool  # the meta tokens themselves, which see each other in any window


def layer_groups(cfg: Model) -> list[tuple[Kind, ...]]:
    """The layers in order, in groups that share keys and values; sequential layers in pairs."""
    fusion = cfg.hybrid.fusion
    scans = [fusion in ("mean", "concat", "mamba") or (fusion == "sequential" and i % 2 == 0) for i in range(cfg.layers)]
    attends = [fusion != "mamba" and not (fusion == "sequential" and scan) for scan in scans]
    sizes = cfg.hybrid.kv_groups or (1,) * cfg.layers
    groups, start = [], 0
    for size in (2,) * (cfg.layers // 2) if fusion == "sequential" else sizes:
        layers = range(start, start + size)
        owners = attends if fusion == "sequential" else [a and i == start for i, a in enumerate(attends)]
        groups.append(tuple(Kind(attends[i], scans[i], owners[i], cfg.layer_window(i) if attends[i] else None) for i in layers))
        start += size
    return groups


def layer_runs(cfg: Model) -> list[tuple[tuple[Kind, ...], int]]:
    """(group, how many alike follow each other): each run is stacked and scanned."""
    return [(group, len(list(alike))) for group, alike in itertools.groupby(layer_groups(cfg))]


class Heads(nnx.Module):
    """The attention branch, [B, T, width] -> [B, T, heads * value_dim]; without keys of its own it reads those of its group's first."""

    def __init__(self, cfg: Model, kind: Kind, implementation: str, key: PRNGKeyArray):
        keys, kv_heads = jax.random.split(key, 3), cfg.num_kv_heads
        self.heads, self.mask, self.implementation = cfg.heads, Mask(window=kind.window), implementation
        make = functools.partial(Linear, std=cfg.init_std, bias=False)
        self.query = make(keys[0], (cfg.width, cfg.heads * cfg.head_dim), axes=("embed", "heads"))
        self.key = make(keys[1], (cfg.width, kv_heads * cfg.head_dim), axes=("embed", "kv_heads")) if kind.owns_kv else None
        self.value = make(keys[2], (cfg.width, kv_heads * cfg.value_dim), axes=("embed", "kv_heads")) if kind.owns_kv else None
        self.kv_heads = kv_heads

    def __call__(
        self, h: Float[Array, "B T width"], row: Row, before: Before, taps: Taps
    ) -> tuple[Float[Array, "B T HD"], tuple[Array, Array]]:
        """(out, (keys, values))."""
        q = self._split(self.query(h), self.heads, row.rotary)
        if self.key is None:
            k, v = before.group["attention"]
        else:
            k, v = self._split(self.key(h), self.kv_heads, row.rotary), self._split(self.value(h), self.kv_heads, None)
            taps.record("keys", k)
            taps.record("values", v)
        meta_k, meta_v = (x[0] for x in before.prefix["attention"]) if before.prefix else (None, None)
        mask = Mask() if row.is_prefix else self.mask
        options = {"mask": mask, "segment_ids": row.segment_ids, "implementation": self.implementation}
        out, lse = ops.attention(q, k, v, meta_k=meta_k, meta_v=meta_v, **options)
        if "attention" in before.past:
            out, lse = ops.join_past(out, lse, q, *before.past["attention"], implementation=self.implementation)
        taps.record("attention_lse", lse)
        if taps.wants("attention_probabilities"):
            allow, keys = mask.dense(row.segment_ids), k
            if meta_k is not None:
                allow, keys = jnp.pad(allow, ((0, 0), (0, 0), (len(meta_k), 0)), constant_values=True), with_meta(meta_k, k)
            taps.record("attention_probabilities", masked_softmax(q, keys, allow, scale=q.shape[-1] ** -0.5)[0])
        return out.reshape(*out.shape[:2], -1), (k, v)

    @staticmethod
    def _split(x: Array, heads: int, rotary: Table | None) -> Float[Array, "B T H D"]:
        x = x.reshape(*x.shape[:2], heads, -1)
        return x if rotary is None else apply_rotary(x, *rotary)


class Mixer(nnx.Module):
    """Attention, Mamba, or both fused (arXiv 2411.13676, equation 3), [B, T, width] -> [B, T, width].

    The mean is W((norm(attention) + norm(ssm)) / 2): the equation leaves the half to the text. A branch that is narrower is filled with
    zeros, and one that is alone has no norm; neither is stated in the paper.
    """

    def __init__(self, cfg: Model, kind: Kind, implementation: str, key: PRNGKeyArray):
        keys, hybrid = jax.random.split(key, 3), cfg.hybrid
        self.joins, self.concat = kind.attends and kind.scans, hybrid.fusion == "concat"
        self.attention = Heads(cfg, kind, implementation, keys[0]) if kind.attends else None
        self.mamba = {"mamba": Mamba, "mamba2": Mamba2}[hybrid.ssm](cfg, implementation, keys[1]) if kind.scans else None
        widths = (cfg.heads * cfg.value_dim if kind.attends else 0, cfg.ssm_width if kind.scans else 0)
        normed = self.joins and hybrid.branch_norm != "none"
        self.attention_norm, self.ssm_norm = (
            Norm(cfg, width=width, scaled=hybrid.branch_norm == "scaled") if normed else None for width in widths
        )
        self.inner = sum(widths) if self.concat else max(widths)
        self.output = Linear(keys[2], (self.inner, cfg.width), std=cfg.init_std, bias=False, axes=("ssm", "embed"))

    def __call__(
        self, h: Float[Array, "B T width"], row: Row, before: Before, taps: Taps
    ) -> tuple[Float[Array, "B T width"], Left]:
        branches, left = [], {}
        if self.attention is not None:
            out, keys_values = self.attention(h, row, before, taps)
            taps.record("attention_branch", out)
            branches.append(out if self.attention_norm is None else self.attention_norm(out))
            if self.attention.key is not None:
                left["attention"] = keys_values
        if self.mamba is not None:
            start = [x[0] for x in before.prefix["mamba"]] if before.prefix else (None, None)
            y, left["mamba"] = self.mamba(h, row.segment_ids, taps, *start, *before.past.get("mamba", (None, None)))
            for name, value in zip(("ssm_branch", "conv_tail", "ssm_state"), (y, *left["mamba"]), strict=True):
                taps.record(name, value)
            branches.append(y if self.ssm_norm is None else self.ssm_norm(y))
        return self.output(self._fuse(branches)), left

    def _fuse(self, branches: list[Array]) -> Float[Array, "B T inner"]:
        if not self.joins:
            return branches[0]
        if self.concat:
            return jnp.concatenate(branches, axis=-1)
        attention, ssm = (jnp.pad(x, ((0, 0), (0, 0), (0, self.inner - x.shape[-1]))) for x in branches)
        return (attention + ssm) / 2


class Layer(nnx.Module):
    """x += Mixer(norm x); x += Mlp(norm x), [B, T, width] -> [B, T, width]."""

    def __init__(self, cfg: Model, kind: Kind, implementation: str, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.mixer, self.mixer_norm = Mixer(cfg, kind, implementation, keys[0]), Norm(cfg)
        self.mlp, self.mlp_norm = (Mlp(cfg, keys[1]), Norm(cfg)) if cfg.mlp_width else (None, None)

    def __call__(
        self, x: Float[Array, "B T width"], row: Row, before: Before, taps: Taps
    ) -> tuple[Float[Array, "B T width"], Left]:
        taps.record("residual", x)
        change, left = self.mixer(self.mixer_norm(x), row, before, taps)
        taps.record("mixer_out", change)
        x = x + change
        if self.mlp is not None:
            change = self.mlp(self.mlp_norm(x))
            taps.record("mlp_out", change)
            x = x + change
        return constrain(x, RESIDUAL_AXES), left


class Group(nnx.Module):
    """Layers that follow each other and share the first one's keys and values."""

    def __init__(self, cfg: Model, kinds: tuple[Kind, ...], implementation: str, key: PRNGKeyArray):
        keys = jax.random.split(key, len(kinds))
        self.layers = nnx.List([Layer(cfg, kind, implementation, k) for kind, k in zip(kinds, keys, strict=True)])

    def __call__(
        self, x: Array, meta: Array | None, row: Row, meta_row: Row, known: Known, capture: tuple[str, ...]
    ) -> tuple[Array, Array | None, dict[str, Any]]:
        """Tokens and meta tokens through the layers: (x, meta, captured), captured stacked over the layers."""
        of_meta = tuple(name.removeprefix("prefix_") for name in capture if name.startswith("prefix_"))
        values: dict[str, list[Array]] = {}
        prefix, past, group, lefts = {}, {}, {}, []
        for i, layer in enumerate(self.layers):
            meta_taps, taps = Taps(of_meta), Taps(capture)
            if meta is not None:
                meta, left = layer(meta, meta_row, Before({}, {}, prefix), meta_taps)
                prefix = prefix | left
            elif known.prefix is not None:
                prefix = prefix | known.prefix[i]
            past = past | (known.past[i] if known.past is not None else {})
            x, left = layer(x, row, Before(prefix, past, group), taps)
            group = group | left
            lefts.append(left)
            for name, value in (taps.values | {f"prefix_{name}": value for name, value in meta_taps.values.items()}).items():
                values.setdefault(name, []).append(value)
        captured = {name: jnp.stack(found) for name, found in values.items()}
        return x, meta, captured | ({"left": tuple(lefts)} if "left" in capture else {})


class HybridStack(nnx.Module):
    """All layers of a hybrid model, and its meta tokens."""

    def __init__(self, cfg: Model, runtime: Runtime, key: PRNGKeyArray):
        runs, count = layer_runs(cfg), cfg.hybrid.meta_tokens
        meta_key, *keys = jax.random.split(key, 1 + len(runs))
        self.cfg = cfg
        self.meta_tokens = normal_param(meta_key, (count, cfg.width), META_STD, ("meta", "embed")) if count else None
        self.runs = nnx.List(
            [
                jax.vmap(functools.partial(Group, cfg, kinds, runtime.implementation))(jax.random.split(k, n))
                for (kinds, n), k in zip(runs, keys, strict=True)
            ]
        )

    def __call__(
        self,
        x: Float[Array, "B T width"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        capture: tuple[str, ...],
        scan: Scan,
        prefix: Any = None,
        past: Any = None,
    ) -> tuple[Float[Array, "B T width"], dict[str, Any]]:
        """(residual stream, captured). scan(body, carry, stacked): `jax.lax.scan` with the model's unrolling and rematerialisation.

        prefix: what `prefix` gave, so that the meta tokens stay out of it. past: in the same form, of what the tokens before left.
        """
        count = self.cfg.hybrid.meta_tokens
        behind = jnp.where(positions < 0, positions, positions + count)  # the meta tokens are positions 0 .. M - 1
        row = Row(segment_ids, self._rotary(behind), False)
        meta = self.meta_tokens[...].astype(x.dtype)[None] if count and prefix is None else None
        return self._through(x, meta, row, prefix, past, capture, scan)

    def prefix(self, dtype: jnp.dtype, scan: Scan) -> tuple[tuple[Left, ...], ...] | None:
        """What the meta tokens leave, by run and by layer of its group, stacked; None without meta tokens."""
        if self.meta_tokens is None:
            return None
        x = self.meta_tokens[...].astype(dtype)[None]
        return self._through(x, None, self._meta_row(), None, None, ("left",), scan)[1]["left"]

    def _through(
        self, x: Array, meta: Array | None, row: Row, prefix: Any, past: Any, capture: tuple[str, ...], scan: Scan
    ) -> tuple[Array, dict[str, Any]]:
        """All runs, with the meta tokens beside the batch where there are any: (residual stream, captured)."""
        meta_row = self._meta_row()

        def body(
            carry: tuple[Array, Array | None], run: tuple[Group, Known]
        ) -> tuple[tuple[Array, Array | None], dict[str, Any]]:
            group, known = run
            x, meta, captured = group(*carry, row, meta_row, known, capture)
            return (x, meta), captured

        carry, values, lefts = (x, meta), {}, []
        for i, run in enumerate(self.runs):
            known = Known(prefix and prefix[i], past and past[i])
            carry, captured = scan(body, carry, (run, known))
            lefts.append(captured.pop("left", None))
            for name, value in captured.items():
                values.setdefault(name, []).append(value.reshape(-1, *value.shape[2:]))
        stacked = {name: jnp.concatenate(found) for name, found in values.items()}
        return carry[0], stacked | ({"left": tuple(lefts)} if "left" in capture else {})

    def _meta_row(self) -> Row:
        count = self.cfg.hybrid.meta_tokens
        return Row(jnp.ones((1, count), jnp.int32), self._rotary(jnp.arange(count)[None]), True)

    def _rotary(self, positions: Int[Array, "B T"]) -> Table | None:
        return None if self.cfg.position == "none" else rotary_table(self.cfg, positions)
