"""The decoder language model: embeddings, a scanned stack of blocks (equal ones, or hybrid ones of several kinds), a final norm and the head.

A model is a pytree of float32 parameters. Positions, segments and meta-token slots are inputs, decided in the
data; the forward pass is a pure function of the model and of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.config import ROTARY, Imported, MetaTokens, Model, Runtime
from metajax.core.errors import nearest, require
from metajax.core.fields import override
from metajax.distributed.rules import RESIDUAL_AXES, constrain
from metajax.models import hybrid
from metajax.models.attention import CausalAttention, MetaAttention, Past, Rows, Taps
from metajax.models.layers import Mlp, Norm, as_rows, gather_rows, normal_param, scan_layers, scatter_add_rows
from metajax.models.masks import meta_flags
from metajax.models.rotary import rotary_table

# What `LM.__call__` can return besides the logits; all but "final" are stacked over the layers.
CAPTURABLE = (
    "residual",  # [L, B, T, width], the input of each block
    "attention_out",  # [L, B, T, width], what causal attention adds to the residual stream
    "meta_out",  # [L, B, T, width], what meta-attention adds, 0 where it adds nothing; absent without meta-tokens
    "mlp_out",  # [L, B, T, width], what the feed-forward network adds
    "attention_lse",  # float32[L, B, T, heads]
    "attention_probabilities",  # float32[L, B, heads, query, key], computed densely beside the model's own attention
    "meta_probabilities",  # float32[L, B, heads, query, key] of meta-attention: M of each where it is gathered, otherwise T
    "keys",  # [L, B, T, kv_heads, head_dim], rotated, of causal attention
    "values",  # [L, B, T, kv_heads, head_dim]
    "meta_keys",  # [L, B, M, kv_heads, head_dim], of meta-attention; T of them where it writes to all tokens
    "meta_values",
    "final",  # [B, T, width], after the final norm
)
# Norm scales, every bias and the rates of Mamba (as in its authors' code); matrices and embeddings decay, as in nanoGPT.
UNDECAYED_AXES = frozenset({"norm", "rate"})
FROZEN_SEED = 20_250_916  # of the embedding that is never trained: one for all runs


class Block(nnx.Module):
    """x += Attention(norm x); x += MetaAttention(norm x) at the meta-tokens; x += Mlp(norm x). "post" norms the sums instead.

    The place of meta-attention is that of "Language Modeling with Learned Meta-Tokens" (arXiv 2509.16278, section 3); the place
    of its norm is not stated in the paper.
    """

    def __init__(self, cfg: Model, meta: MetaTokens | None, implementation: str, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.pre_norm = cfg.norm_position == "pre"
        self.attention = CausalAttention(cfg, implementation, keys[0])
        self.attention_norm = Norm(cfg)
        self.mlp = Mlp(cfg, keys[1])
        self.mlp_norm = Norm(cfg)
        has_meta = meta is not None and meta.attention != "none"
        self.meta_attention = MetaAttention(cfg, meta, implementation, keys[2]) if has_meta else None
        self.meta_norm = Norm(cfg) if has_meta else None

    def __call__(self, x: Float[Array, "B T width"], rows: Rows, taps: Taps, past: dict[str, Past]) -> Float[Array, "B T width"]:
        taps.record("residual", x)
        change = self._change(x, self.attention_norm, lambda h: self.attention(h, rows, taps, past.get("attention")))
        taps.record("attention_out", change)
        x = x + change
        if self.meta_attention is not None and (rows.slots is not None or self.meta_attention.writes_everywhere):
            x = self._add_meta(x, rows, taps, past.get("meta_attention"))
        change = self._change(x, self.mlp_norm, self.mlp)
        taps.record("mlp_out", change)
        return constrain(x + change, RESIDUAL_AXES)

    def _change(self, x: Array, norm: Norm, branch: Callable[[Array], Array]) -> Array:
        """What a branch adds to the residual stream: branch(norm x), or norm(x + branch x) - x for post-norm."""
        return branch(norm(x)) if self.pre_norm else norm(x + branch(x)) - x

    def _add_meta(self, x: Array, rows: Rows, taps: Taps, past: Past | None) -> Array:
        gathered = self.meta_attention.form == "gathered"
        read = gather_rows(x, rows.slots) if gathered else x
        change = self._change(read, self.meta_norm, lambda h: self.meta_attention(h, rows, taps, past))
        if gathered:
            if taps.wants("meta_out"):
                taps.record("meta_out", scatter_add_rows(jnp.zeros_like(x), rows.slots, change))
            return scatter_add_rows(x, rows.slots, change)
        if not self.meta_attention.writes_everywhere:
            change = jnp.where(meta_flags(rows.slots, x.shape[1])[..., None], change, 0)
        taps.record("meta_out", change)
        return x + change


class LM(nnx.Module):
    """A decoder LM assembled from `cfg`; `meta` adds meta-attention to every block.

    vocab_size: rows of the embedding, padded as the caller wants. max_length: rows of a learned position table.
    imported: which of the rows a checkpoint has; the logits of the others are -inf, None: all have one.
    Initialisation: N(0, init_std), projections into the residual stream init_std / sqrt(2 layers), scales 1, biases 0.
    """

    def __init__(
        self,
        cfg: Model,
        *,
        vocab_size: int,
        max_length: int,
        meta: MetaTokens | None,
        runtime: Runtime,
        key: PRNGKeyArray,
        imported: Imported | None = None,
    ):
        keys = jax.random.split(key, 4)
        self.imported = imported
        self.cfg, self.meta, self.remat, self.unroll = cfg, meta, runtime.remat, runtime.unroll or cfg.layers
        self.embedding = normal_param(keys[0], (vocab_size, cfg.width), cfg.init_std, ("vocab", "embed"))
        learned = cfg.position == "learned"
        self.positions = normal_param(keys[1], (max_length, cfg.width), cfg.init_std, ("positions", "embed")) if learned else None
        if cfg.hybrid is not None:
            self.blocks = hybrid.HybridStack(cfg, runtime, keys[2])
        else:
            make_block = functools.partial(Block, cfg, meta, runtime.implementation)
            self.blocks = jax.vmap(make_block)(jax.random.split(keys[2], cfg.layers))
        self.final_norm = Norm(cfg)
        self.unembedding = None if cfg.tied else normal_param(keys[3], (vocab_size, cfg.width), cfg.init_std, ("vocab", "embed"))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        meta_slots: Int[Array, "B M"] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Float[Array, "B T vocab"] | tuple[Float[Array, "B T vocab"], dict[str, Any]]:
        """Logits, float32[B, T, vocab]; with `capture`, (logits, {name: intermediate}) for names in `CAPTURABLE`.

        positions: index of each token in its document, negative for none (no learned vector, rotary angle 0).
        segment_ids: equal inside a document, 0 for padding; attention never leaves a run of equal ids.
        meta_slots: sorted row indices of the meta-tokens, >= T where unused; models that do not tell them apart ignore it.
        Raises UserError for an unknown capture, for missing slots and for rows longer than the position table.
        """
        x = self.embed(tokens, positions, meta_slots)
        x, captured = self.decode(x, positions=positions, segment_ids=segment_ids, meta_slots=meta_slots, capture=capture)
        logits = self.unembed(x)
        return (logits, captured) if capture else logits

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], meta_slots: Int[Array, "B M"] | None = None
    ) -> Float[Array, "B T width"]:
        """Token embeddings plus learned positions, where there are any, in the compute dtype."""
        dtype = jnp.dtype(self.cfg.compute_dtype)
        # Each device looks its own tokens up: spread over the width, the table would give every device a slice of all tokens.
        x = constrain(self.embedding[...], ("vocab", None))[tokens]
        if self.meta is not None and self.meta.embedding != "learned":
            std = self.cfg.init_std if self.meta.embedding == "frozen" else 0.0
            vector = std * np.random.default_rng(FROZEN_SEED).standard_normal(self.cfg.width).astype(np.float32)
            x = jnp.where(meta_flags(_given(meta_slots), tokens.shape[1])[..., None], vector, x)
        if self.positions is not None:
            positions = self._positions(positions, meta_slots, "both")
            table = self.positions[...]
            require(
                tokens.shape[1] <= table.shape[0],
                f"rows of {tokens.shape[1]} tokens but learned positions for {table.shape[0]}; shorten the rows or use rotary positions",
            )
            # A position beyond the table reads NaN: a wrong input shows at once instead of borrowing the last row.
            vectors = table.at[jnp.maximum(positions, 0)].get(mode="fill", fill_value=jnp.nan)
            x = x + jnp.where(positions[..., None] >= 0, vectors, 0.0)
        return constrain(x.astype(dtype), RESIDUAL_AXES)

    def decode(
        self,
        x: Float[Array, "B T width"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        meta_slots: Int[Array, "B M"] | None = None,
        capture: tuple[str, ...] = (),
        past: Any = None,
        prefix: Any = None,
    ) -> tuple[Float[Array, "B T width"], dict[str, Any]]:
        """All blocks and the final norm on embeddings `x`: (normalised residual stream, captured intermediates).

        past: for rows of one token, what the tokens before it left in "attention" and "meta_attention" (`Past`), stacked over the layers;
        of a hybrid in "attention" (`Past`) and "mamba" (conv tail, state), by run and layer as the capture "left" is.
        prefix: what `meta_prefix` gave, so that a hybrid's meta tokens are not read again.
        """
        known = CAPTURABLE if self.cfg.hybrid is None else hybrid.CAPTURABLE
        for name in capture:
            require(name in known, f"capture: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        if self.cfg.hybrid is not None:
            positions = self._positions(positions, meta_slots, "causal")
            inputs = {"positions": positions, "segment_ids": segment_ids, "prefix": prefix, "past": past}
            return self._finish(*self.blocks(x, **inputs, capture=capture, scan=self._scan), capture)
        rows = self._rows(positions, segment_ids, meta_slots)

        def body(x: Array, layer: tuple[Block, dict[str, Past]]) -> tuple[Array, dict[str, Array]]:
            block, earlier = layer
            taps = Taps(capture)
            x = block(x, rows, taps, earlier)
            return x, taps.values

        return self._finish(*self._scan(body, x, (self.blocks, past or {})), capture)

    def meta_prefix(self) -> Any:
        """What the meta tokens of a hybrid leave in its layers, the same for all texts; None for a model without any."""
        return self.blocks.prefix(jnp.dtype(self.cfg.compute_dtype), self._scan) if self.cfg.hybrid is not None else None

    def _scan(self, body: Callable[..., Any], carry: Any, stacked: Any) -> tuple[Any, Any]:
        """`body` over stacked layers, unrolled and rematerialised as the run has it."""
        return scan_layers(body, carry, stacked, layers=self.cfg.layers, remat=self.remat, unroll=self.unroll)

    def _finish(
        self, x: Float[Array, "B T width"], captured: dict[str, Any], capture: tuple[str, ...]
    ) -> tuple[Float[Array, "B T width"], dict[str, Any]]:
        x = self.final_norm(x)
        return x, {**captured, "final": x} if "final" in capture else captured

    def unembed(self, x: Float[Array, "B T width"]) -> Float[Array, "B T vocab"]:
        """float32 logits of every row of the (tied or own) output matrix; -inf for rows that an imported checkpoint does not have."""
        matrix = self.embedding if self.unembedding is None else self.unembedding
        logits = jnp.einsum("...d,vd->...v", as_rows(x), matrix[...].astype(x.dtype), preferred_element_type=jnp.float32)
        if self.imported is not None:
            logits = jnp.where(self.imported.absent(logits.shape[-1]), -jnp.inf, logits)
        return logits.reshape(*x.shape[:2], -1)

    def _rows(self, positions: Array, segment_ids: Array, meta_slots: Array | None) -> Rows:
        """What all layers read beside the residual stream; without meta-tokens in any row there are no slots."""
        form = "none" if self.meta is None else self.meta.attention
        slots = None if form in ("none", "causal") else _given(meta_slots)
        if form in ("gathered", "dense") and not slots.shape[1]:
            slots = None
        if self.cfg.position not in ROTARY:
            return Rows(segment_ids, None, None, slots)
        rotary, meta_rotary = (
            rotary_table(self.cfg, self._positions(positions, meta_slots, scope)) for scope in ("causal", "meta")
        )
        if form == "gathered" and slots is not None:
            meta_rotary = (gather_rows(meta_rotary[0], slots), gather_rows(meta_rotary[1], slots))
        return Rows(segment_ids, rotary, meta_rotary, slots)

    def _positions(self, positions: Array, meta_slots: Array | None, scope: str) -> Array:
        """`positions`, negative (none) at the meta-tokens where `zero_position` is "both" or `scope`."""
        if self.meta is None or self.meta.zero_position not in ("both", scope):
            return positions
        return jnp.where(meta_flags(_given(meta_slots), positions.shape[1]), -1, positions)


def _given(meta_slots: Array | None) -> Array:
    require(meta_slots is not None, "a model that tells meta-tokens apart needs meta_slots (int32[B, M])")
    return meta_slots


def with_intervention(model: LM, **changes: Any) -> LM:
    """The same parameters under other static fields of `MetaTokens`: interventions at the meta-tokens of a trained model.

    Made for `zero_position` and `embedding`. Raises UserError for a model without meta-tokens, for a value that means nothing under its
    position scheme, and for `attention`, which the parameters are made for.
    """
    require(model.meta is not None, "an intervention at meta-tokens needs a model with meta-tokens; its meta_tokens is null")
    meta = override(model.meta, changes)
    require(meta.attention == model.meta.attention, "meta_tokens.attention is part of the trained model; it cannot be changed")
    meta.check_position(model.cfg.position)
    changed = jax.tree.map(lambda leaf: leaf, model)  # a new object that shares the arrays
    changed.meta = meta
    return changed


# ------------------------------------------------------------------------------------------------- parameters


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def named_params(model: Any) -> dict[str, nnx.Param]:
    """Parameters by dotted path ("blocks.mlp.up.w"), in the order of the pytree; blocks are stacked over the layers."""
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_param)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def decay_mask(model: Any) -> Any:
    """The model's pytree with a bool for each parameter: weight decay applies to it. Decided by logical axes alone; a scalar has none."""

    def decays(param: nnx.Variable) -> bool:
        axes = set(param.get_metadata()["axes"])
        return bool(axes) and not UNDECAYED_AXES & axes

    return jax.tree.map(lambda p: p.replace(decays(p)), model, is_leaf=_is_param)


def param_count(model: Any) -> dict[str, int]:
    """Parameters by part and "total"; `model` may be abstract (jax.eval_shape). A tied head is counted once."""
    parts: dict[str, int] = {}
    for path, param in named_params(model).items():
        *names, array = [name for name in path.split(".") if name not in ("runs", "layers", "mixer") and not name.isdigit()]
        inside = len(names) > 1 and names[0] == "blocks"
        part = names[-1] if array in ("scale", "bias") else names[1] if inside else path
        parts[part] = parts.get(part, 0) + param.size
    return {**parts, "total": sum(parts.values())}
