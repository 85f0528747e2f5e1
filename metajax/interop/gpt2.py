"""GPT-2 as nanoGPT and Hugging Face name and lay it out: its tensors, and Hugging Face's config.json both ways.

nanoGPT keeps its linear maps [out, in] and uses the exact (erf) GELU; Hugging Face keeps them [in, out] and has both forms. Both fuse
query, key and value, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Model, Runtime, require
from metajax.interop.layouts import Layout, Tensor, load_model, require_fields, tensors_of
from metajax.models.lm import LM, named_params

_ATTENTION = "attention.projections"
_TABLE: dict[str, Any] = {
    "whole": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "positions",
        "transformer.ln_f.weight": "final_norm.scale",
        "transformer.ln_f.bias": "final_norm.bias",
    },
    "layer": {
        "ln_1.weight": ("attention_norm.scale",),
        "ln_1.bias": ("attention_norm.bias",),
        "attn.c_attn.weight": tuple(f"{_ATTENTION}.{part}.w" for part in ("query", "key", "value")),
        "attn.c_attn.bias": tuple(f"{_ATTENTION}.{part}.b" for part in ("query", "key", "value")),
        "attn.c_proj.weight": (f"{_ATTENTION}.output.w",),
        "attn.c_proj.bias": (f"{_ATTENTION}.output.b",),
        "ln_2.weight": ("mlp_norm.scale",),
        "ln_2.bias": ("mlp_norm.bias",),
        "mlp.c_fc.weight": ("mlp.up.w",),
        "mlp.c_fc.bias": ("mlp.up.b",),
        "mlp.c_proj.weight": ("mlp.down.w",),
        "mlp.c_proj.bias": ("mlp.down.b",),
    },
    "prefix": "transformer.h.{}.",
    "buffers": (".attn.bias", ".attn.masked_bias"),
}
LAYOUT = Layout(family="GPT-2", turned=(), **_TABLE)
LAYOUTS = {"nanogpt": Layout(family="nanoGPT", **_TABLE), "huggingface": LAYOUT}
# Hugging Face's name -> ours.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_REST = {
    "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0, "embd_pdrop": 0.0, "model_type": "gpt2", "resid_pdrop": 0.0, "use_cache": True,
}  # fmt: skip
# What this model can be told and GPT-2 cannot.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "hybrid": (None,), "window": (None,), "activation": ("gelu_tanh", "gelu", "relu"), "norm": ("layernorm",), "norm_position": ("pre",),
    "position": ("learned",), "tied": (True,),
}  # fmt: skip


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json. UserError for a setting that this model cannot follow."""
    for name, value in _FIXED.items():
        found = values.get(name, value)
        require(found == value, f"config.json: {name} = {found!r}, but only {value!r} is supported")
    activation = values.get("activation_function", "gelu_new")
    known = ", ".join(_ACTIVATIONS)
    require(activation in _ACTIVATIONS, f"config.json: activation_function = {activation!r}, but only {known} are supported")
    return Model(
        layers=values["n_layer"], width=values["n_embd"], heads=values["n_head"], mlp_width=values.get("n_inner") or 4 * values["n_embd"],
        activation=_ACTIVATIONS[activation], norm="layernorm", norm_eps=values.get("layer_norm_epsilon", 1e-5), bias=True, tied=True,
        position="learned", max_positions=values["n_positions"], init_std=values.get("initializer_range", 0.02),
    )  # fmt: skip


def hub_config(cfg: Model, length: int) -> dict[str, Any]:
    """What config.json says of a model with `length` positions. UserError for what GPT-2 does not have."""
    _require_gpt2(cfg, "GPT-2")
    name = next(name for name, ours in _ACTIVATIONS.items() if ours == cfg.activation)
    return _FIXED | _REST | {
        "activation_function": name, "initializer_range": cfg.init_std, "layer_norm_epsilon": cfg.norm_eps, "n_ctx": length,
        "n_embd": cfg.width, "n_head": cfg.heads, "n_inner": cfg.mlp_width, "n_layer": cfg.layers, "n_positions": length,
    }  # fmt: skip


def _require_gpt2(cfg: Model, what: str) -> None:
    require_fields(cfg, _KNOWN | {"num_kv_heads": (cfg.heads,)}, what)


def names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with "transformer." in front of its names (the head apart), and without the prefix of compiled models."""
    named = {}
    for name, value in state.items():
        name = name.removeprefix("_orig_mod.")
        named[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = value
    return named


def with_biases(model: LM) -> LM:
    """The model with biases of zero where it has none: the same function, and what Hugging Face's GPT-2 must have."""
    if model.cfg.bias:
        return model
    cfg, params = replace(model.cfg, bias=True), named_params(model)
    sizes = {"vocab_size": params["embedding"].shape[0], "max_length": params["positions"].shape[0]}
    biased = jax.eval_shape(lambda: LM(cfg, **sizes, meta=model.meta, runtime=Runtime(), key=jax.random.key(0)))
    leaves = [
        params[path][...] if path in params else jnp.zeros(leaf.shape, jnp.float32) for path, leaf in named_params(biased).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(biased), leaves)


def from_gpt2(state: Mapping[str, Tensor], cfg: Model, layout: str, *, runtime: Runtime | None = None) -> LM:
    """An LM with the weights of a GPT-2 state dict in one of `LAYOUTS`; rows and positions follow the dict.

    Accepts names with or without "transformer.", the prefix of compiled nanoGPT models, the causal-mask buffers of
    Hugging Face and a tied "lm_head.weight". Raises UserError naming a missing, extra or misshapen tensor, or the field of
    `cfg` that is not GPT-2's.
    """
    _check_layout(cfg, layout)
    state = names(state)
    require("transformer.wpe.weight" in state, "the checkpoint lacks transformer.wpe.weight")
    length = state["transformer.wpe.weight"].shape[0]
    return load_model(state, cfg, LAYOUTS[layout], max_length=length, runtime=runtime)


def to_gpt2(model: LM, layout: str) -> dict[str, np.ndarray]:
    """The state dict of an LM in a layout's names and shapes, without the tied head; UserError when it is not a GPT-2."""
    _check_layout(model.cfg, layout)
    return dict(tensors_of(model, LAYOUTS[layout]))


def _check_layout(cfg: Model, layout: str) -> None:
    require(layout in LAYOUTS, f"layout = {layout!r}; known: {', '.join(LAYOUTS)}")
    _require_gpt2(cfg, LAYOUTS[layout].family)
    require_fields(
        cfg, {"activation": ("gelu",) if layout == "nanogpt" else ("gelu_tanh", "gelu", "relu")}, LAYOUTS[layout].family
    )
