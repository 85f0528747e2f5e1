"""The decoder language model: embeddings, a stack of layers, a final norm and the head.

A model is a pytree of float32 parameters. Positions, segments and meta-token positions are inputs from the data pipeline. The
forward pass is a pure function of the model and these inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.config import Imported, MetaTokens, Model, Runtime
from metajax.core.errors import UserError, nearest, require
from metajax.core.fields import override
from metajax.distributed.rules import COLUMN_AXES, EXCHANGE_AXES, RESIDUAL_AXES, constrain
from metajax.models.layer import LAYER_CAPTURES, Left, Streams, apply_group, make_group
from metajax.models.layers import Norm, as_rows, gather_rows, normal_param, scan_layers
from metajax.models.masks import meta_flags
from metajax.models.mixers import MIXERS, LayerInputs
from metajax.models.rotary import rotary_table
from metajax.models.specs import layer_runs, layer_specs

# Norm scales, biases and Mamba's A do not decay (the last as in its authors' code). Matrices and embeddings decay, as in nanoGPT.
UNDECAYED_AXES = frozenset({"norm", "rate"})
FROZEN_SEED = 20_250_916  # of the embedding that is never trained; the same for all runs
PREFIX_STD = 1.0  # of the initial prefix (Hymba's released code)
Caches = tuple[tuple[Left, ...], ...]  # cache entries, by run and by layer of its group, stacked over the groups of the run


class LM(nnx.Module):
    """A decoder LM assembled from `cfg`; `meta` adds meta-attention to every layer.

    vocab_size: rows of the embedding, including the caller's padding. max_length: rows of a learned position table.
    imported: which rows an imported checkpoint has; the logits of the others are -inf. None: every row has a logit.
    Initialisation: N(0, init_std); projections into the residual stream use `LayerSpec.residual_std`; scales are 1, biases 0.
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
        self.cfg, self.meta, self.imported = cfg, meta, imported
        self.remat, self.unroll = runtime.remat, runtime.unroll or cfg.layers
        self.embedding = normal_param(keys[0], (vocab_size, cfg.width), cfg.init_std, ("vocab", "embed"))
        learned = cfg.position == "learned"
        self.positions = normal_param(keys[1], (max_length, cfg.width), cfg.init_std, ("positions", "embed")) if learned else None
        runs = layer_runs(cfg, meta)
        split = runs[0][0][0].split_keys
        prefix_key, *run_keys = jax.random.split(keys[2], 1 + len(runs)) if split else (keys[2], keys[2])
        count = cfg.prefix_tokens
        self.prefix = normal_param(prefix_key, (count, cfg.width), PREFIX_STD, ("prefix", "embed")) if count else None
        self.blocks = nnx.List()
        for (group, n), run_key in zip(runs, run_keys, strict=True):
            make = functools.partial(make_group, cfg, group, runtime.implementation)
            self.blocks.append(jax.vmap(make)(jax.random.split(run_key, n)))
        self.final_norm = Norm(cfg)
        self.unembedding = None if cfg.tied else normal_param(keys[3], (vocab_size, cfg.width), cfg.init_std, ("vocab", "embed"))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        meta_positions: Int[Array, "B M"] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Float[Array, "B T vocab"] | tuple[Float[Array, "B T vocab"], dict[str, Any]]:
        """Logits, float32[B, T, vocab]; with `capture`, (logits, {name: intermediate}) for names in `capturable`.

        positions: index of each token in its document; negative for none (no learned vector, rotary angle 0).
        segment_ids: equal inside a document, 0 for padding. Attention stays inside a run of equal ids.
        meta_positions: sorted positions of the meta-tokens in the row, >= T if unused; ignored by models that treat all tokens alike.
        Raises UserError for an unknown capture, for missing meta_positions and for rows longer than the position table.
        """
        x = self.embed(tokens, positions, meta_positions)
        x, captured = self.decode(x, positions=positions, segment_ids=segment_ids, meta_positions=meta_positions, capture=capture)
        logits = self.unembed(x)
        return (logits, captured) if capture else logits

    @property
    def output_matrix(self) -> Float[Array, "vocab width"]:
        """The matrix that maps the last residual stream to logits: the embedding's, or its own."""
        return (self.embedding if self.unembedding is None else self.unembedding)[...]

    @property
    def absent_ids(self) -> Array | None:
        """bool[vocab]: ids that every softmax leaves out, because an imported checkpoint has no rows for them; None: no id."""
        return None if self.imported is None else jnp.asarray(self.imported.absent(len(self.output_matrix)))

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], meta_positions: Int[Array, "B M"] | None = None
    ) -> Float[Array, "B T width"]:
        """Token embeddings plus learned positions, if the model has them, in the compute dtype."""
        dtype = jnp.dtype(self.cfg.compute_dtype)
        # Each device looks up its columns of all tokens, which are then exchanged. To gather the table and to add up its gradient
        # over the devices moves much more.
        x = constrain(self.embedding[...][tokens], COLUMN_AXES)
        if self.meta is not None and self.meta.embedding != "learned":
            std = self.cfg.init_std if self.meta.embedding == "frozen" else 0.0
            vector = std * np.random.default_rng(FROZEN_SEED).standard_normal(self.cfg.width).astype(np.float32)
            x = jnp.where(meta_flags(_given(meta_positions), tokens.shape[1])[..., None], vector, x)
        if self.positions is not None:
            positions = self._positions(positions, meta_positions, "both")
            table = self.positions[...]
            require(
                tokens.shape[1] <= table.shape[0],
                f"rows of {tokens.shape[1]} tokens but learned positions for {table.shape[0]}; shorten the rows or use rotary positions",
            )
            # A position beyond the table reads NaN, so that a wrong input shows at once.
            vectors = table.at[jnp.maximum(positions, 0)].get(mode="fill", fill_value=jnp.nan)
            x = x + constrain(jnp.where(positions[..., None] >= 0, vectors, 0.0), COLUMN_AXES)
        return constrain(constrain(x.astype(dtype), EXCHANGE_AXES), RESIDUAL_AXES)

    def decode(
        self,
        x: Float[Array, "B T width"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        meta_positions: Int[Array, "B M"] | None = None,
        capture: tuple[str, ...] = (),
        prefix: Caches | None = None,
        past: Caches | None = None,
        row_is_meta: Array | None = None,
    ) -> tuple[Float[Array, "B T width"], dict[str, Any]]:
        """All layers and the final norm on embeddings `x`: (normalised residual stream, captured intermediates).

        prefix: the result of `prefix_cache`, so that the learned prefix is not computed again. past: when decoding one token per
        row, the cache entries of earlier tokens. row_is_meta: when decoding, bool[B, N], which positions are meta-tokens.
        """
        known = capturable(self.cfg, self.meta)
        for name in capture:
            require(name in known, f"capture: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        inputs = self._inputs(positions, segment_ids, meta_positions)._replace(row_is_meta=row_is_meta)
        own = self.prefix[...].astype(x.dtype)[None] if self.prefix is not None and prefix is None else None
        (x, _), captured = self._layers((x, own), inputs, (prefix, past), capture)
        x = self.final_norm(x)
        return x, captured | ({"final": x} if "final" in capture else {})

    def prefix_cache(self) -> Caches | None:
        """Cache entries of the learned prefix, the same for all texts; None for a model without a prefix."""
        if self.prefix is None:
            return None
        x = self.prefix[...].astype(self.cfg.compute_dtype)[None]
        return self._layers((x, None), self._prefix_inputs(), (None, None), ("cache",))[1]["cache"]

    def _layers(
        self, streams: Streams, inputs: LayerInputs, given: tuple[Caches | None, Caches | None], capture: tuple[str, ...]
    ) -> tuple[Streams, dict[str, Any]]:
        body = functools.partial(apply_group, capture, inputs, self._prefix_inputs())
        values, caches = {}, []
        for i, run in enumerate(self.blocks):
            of_run = run, tuple(None if entries is None else entries[i] for entries in given)
            streams, captured = scan_layers(body, streams, of_run, layers=self.cfg.layers, remat=self.remat, unroll=self.unroll)
            caches.append(captured.pop("cache", None))
            for name, value in captured.items():
                values.setdefault(name, []).append(value.reshape(-1, *value.shape[2:]))
        stacked = {name: jnp.concatenate(found) for name, found in values.items()}
        return streams, stacked | ({"cache": tuple(caches)} if "cache" in capture else {})

    def unembed(self, x: Float[Array, "B T width"]) -> Float[Array, "B T vocab"]:
        """float32 logits of every row of the output matrix, tied or untied; -inf for rows that an imported checkpoint lacks."""
        matrix, absent = self.output_matrix.astype(x.dtype), self.absent_ids
        logits = jnp.einsum("...d,vd->...v", as_rows(x), matrix, preferred_element_type=jnp.float32)
        if absent is not None:
            logits = jnp.where(absent, -jnp.inf, logits)
        return logits.reshape(*x.shape[:2], -1)

    def _inputs(self, positions: Array, segment_ids: Array, meta_positions: Array | None) -> LayerInputs:
        form = "none" if self.meta is None else self.meta.attention
        metas = None if form in ("none", "causal") else _given(meta_positions)
        if metas is not None and not metas.shape[1] and form in ("gathered", "dense"):
            metas = None
        causal, count = self._positions(positions, meta_positions, "causal"), self.cfg.prefix_tokens
        rotary = rotary_table(self.cfg, jnp.where(causal < 0, causal, causal + count) if count else causal)
        meta_rotary = None
        if form != "none":
            meta_rotary = rotary_table(self.cfg, self._positions(positions, meta_positions, "meta"))
            if form == "gathered" and metas is not None and meta_rotary is not None:
                meta_rotary = gather_rows(meta_rotary[0], metas), gather_rows(meta_rotary[1], metas)
        return LayerInputs(segment_ids, rotary, metas, meta_rotary)

    def _prefix_inputs(self) -> LayerInputs:
        """Inputs of the learned prefix: positions 0 to M - 1 of every document."""
        count = self.cfg.prefix_tokens
        rotary = rotary_table(self.cfg, jnp.arange(count)[None])
        return LayerInputs(jnp.ones((1, count), jnp.int32), rotary, is_prefix=True)

    def _positions(self, positions: Array, meta_positions: Array | None, scope: str) -> Array:
        """`positions`, negative (none) at the meta-tokens if `zero_position` is "both" or `scope`."""
        if self.meta is None or self.meta.zero_position not in ("both", scope):
            return positions
        return jnp.where(meta_flags(_given(meta_positions), positions.shape[1]), -1, positions)


def capturable(cfg: Model, meta: MetaTokens | None) -> tuple[str, ...]:
    """Names of the intermediates that a model can return, stacked over the layers that have them; see each mixer's `captures`.

    "final" is the residual stream after the final norm, [B, T, width]. "cache" is the cache entries of the tokens (`Caches`).
    With a learned prefix, "prefix_NAME" is NAME for the M prefix tokens, with B = 1 and T = M.
    """
    of_mixers = [name for spec in layer_specs(cfg, meta) for mixer in spec.all_mixers for name in MIXERS[mixer].captures]
    of_layers = tuple(dict.fromkeys((*LAYER_CAPTURES, *of_mixers)))
    return (*of_layers, *(f"prefix_{name}" for name in of_layers if cfg.prefix_tokens), "final", "cache")


def _given(meta_positions: Array | None) -> Array:
    if meta_positions is None:
        raise UserError("a model that tells meta-tokens apart needs meta_positions (int32[B, M])")
    return meta_positions


def with_intervention(model: LM, **changes: Any) -> LM:
    """A copy of a trained model with other static fields of `MetaTokens`, for interventions at its meta-tokens.

    The copy shares the parameters. Intended for `zero_position` and `embedding`. Raises UserError for a model without
    meta-tokens, for a value without meaning under its position scheme, and for `attention`, on which the parameters depend.
    """
    if model.meta is None:
        raise UserError("an intervention at meta-tokens needs a model with meta-tokens; its meta_tokens is null")
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
    """Parameters by dotted path ("blocks.0.0.mlp.up.w": run, layer in its group), in pytree order; stacked over equal layers."""
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_param)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def decay_mask(model: Any) -> Any:
    """The model's pytree with a bool per parameter: whether weight decay applies, by its logical axes. Scalars do not decay."""

    def decays(param: nnx.Variable) -> bool:
        axes = set(param.get_metadata()["axes"])
        return bool(axes) and not UNDECAYED_AXES & axes

    return jax.tree.map(lambda p: p.replace(decays(p)), model, is_leaf=_is_param)


def param_count(model: Any) -> dict[str, int]:
    """Number of parameters by part and "total"; `model` may be abstract (jax.eval_shape). A tied head is counted once."""
    parts: dict[str, int] = {}
    for path, param in named_params(model).items():
        *names, array = [name for name in path.split(".") if name != "mixer" and not name.isdigit()]
        inside = len(names) > 1 and names[0] == "blocks"
        part = names[-1] if array in ("scale", "bias") else names[1] if inside else path
        parts[part] = parts.get(part, 0) + param.size
    return {**parts, "total": sum(parts.values())}
