"""GPT-2 in the names and layouts of nanoGPT and Hugging Face, and conversion of Hugging Face's config.json in both directions.

nanoGPT stores linear maps as [out, in] and uses the exact (erf) GELU. Hugging Face stores them as [in, out] and has both forms.
Both fuse query, key and value, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Model, Runtime
from metajax.core.errors import require
from metajax.interop.layouts import HEAD, Layout, Tensor, load_model, require_fields, tensors_of
from metajax.interop.settings import MOST, MOST_LAYERS, Settings
from metajax.models.lm import LM, named_params

_ATTENTION = "mixer.attention"
_TABLE: dict[str, Any] = {
    "whole": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "positions",
        "transformer.ln_f.weight": "final_norm.scale",
        "transformer.ln_f.bias": "final_norm.bias",
        HEAD: "unembedding",
    },
    "layer": {
        "ln_1.weight": ("mixer_norm.scale",),
        "ln_1.bias": ("mixer_norm.bias",),
        "attn.c_attn.weight": tuple(f"{_ATTENTION}.{part}.w" for part in ("query", "key", "value")),
        "attn.c_attn.bias": tuple(f"{_ATTENTION}.{part}.b" for part in ("query", "key", "value")),
        "attn.c_proj.weight": ("mixer.output.w",),
        "attn.c_proj.bias": ("mixer.output.b",),
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
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu",
}  # fmt: skip
_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# The last one sets the dtype of products, which are float32 here.
_HARMLESS = (
    "attn_pdrop", "embd_pdrop", "n_ctx", "n_special", "predict_special_tokens", "resid_pdrop", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "reorder_and_upcast_attn",
)  # fmt: skip
# Names that Hugging Face accepts as synonyms.
_OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
_REST = {
    "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0, "embd_pdrop": 0.0, "model_type": "gpt2", "resid_pdrop": 0.0, "use_cache": True,
}  # fmt: skip
# Values of our model's fields that GPT-2 supports.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "hybrid": (None,), "window": (None,), "activation": ("gelu_tanh", "gelu", "relu"), "norm": ("layernorm",), "norm_position": ("pre",),
    "position": ("learned",),
}  # fmt: skip


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json. UserError lists every setting that this model does not support."""
    read = Settings(values)
    sizes = {
        name: read.size(name, read.get(other), most=MOST_LAYERS if name == "n_layer" else MOST)
        for name, other in _OTHER_NAMES.items()
    }
    for name, value in (_FIXED | {other: sizes[name] for name, other in _OTHER_NAMES.items()}).items():
        read.fixed(name, value)
    activation = read.choice("activation_function", "gelu_new", _ACTIVATIONS)
    return read.model(
        _HARMLESS, layers=sizes["n_layer"], width=sizes["n_embd"], heads=sizes["n_head"], mlp_width=read.size("n_inner", 4 * sizes["n_embd"], most=4 * MOST),
        activation=_ACTIVATIONS[activation], norm="layernorm", norm_eps=read.number("layer_norm_epsilon", 1e-5), bias=True,
        tied=read.flag("tie_word_embeddings", True), position="learned", max_positions=sizes["n_positions"],
        init_std=read.number("initializer_range", 0.02),
    )  # fmt: skip


def hub_config(cfg: Model, length: int) -> dict[str, Any]:
    """The values of config.json for a model with `length` positions. UserError for fields that GPT-2 lacks."""
    _require_gpt2(cfg, "GPT-2")
    name = next(name for name, ours in _ACTIVATIONS.items() if ours == cfg.activation)
    return _FIXED | _REST | {
        "activation_function": name, "initializer_range": cfg.init_std, "layer_norm_epsilon": cfg.norm_eps, "n_ctx": length,
        "n_embd": cfg.width, "n_head": cfg.heads, "n_inner": cfg.mlp_width, "n_layer": cfg.layers, "n_positions": length,
        "tie_word_embeddings": cfg.tied,
    }  # fmt: skip


def _require_gpt2(cfg: Model, what: str) -> None:
    require_fields(cfg, _KNOWN | {"num_kv_heads": (cfg.heads,)}, what)


def names(state: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The state dict with "transformer." before every name except the head's, and without the prefix of compiled models."""
    named = {}
    for name, value in state.items():
        name = name.removeprefix("_orig_mod.")
        named[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = value
    return named


def with_biases(model: LM) -> LM:
    """The model with zero biases added, which Hugging Face's GPT-2 requires; the same function."""
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
    """An LM with the weights of a GPT-2 state dict in one of `LAYOUTS`. The dict decides the number of rows and positions.

    Accepts names with or without "transformer.", the prefix of compiled nanoGPT models, Hugging Face's causal-mask buffers
    and a tied "lm_head.weight". Raises UserError naming a missing, extra or misshapen tensor, or a field of `cfg` that
    GPT-2 does not support.
    """
    _check_layout(cfg, layout)
    state = names(state)
    require("transformer.wpe.weight" in state, "the checkpoint lacks transformer.wpe.weight")
    length = state["transformer.wpe.weight"].shape[0]
    return load_model(state, cfg, LAYOUTS[layout], max_length=length, runtime=runtime)


def to_gpt2(model: LM, layout: str) -> dict[str, np.ndarray]:
    """The state dict of an LM in a layout's names and shapes, without the tied head; UserError if it is not a GPT-2."""
    _check_layout(model.cfg, layout)
    return dict(tensors_of(model, LAYOUTS[layout]))


def _check_layout(cfg: Model, layout: str) -> None:
    require(layout in LAYOUTS, f"layout = {layout!r}; known: {', '.join(LAYOUTS)}")
    _require_gpt2(cfg, LAYOUTS[layout].family)
    if layout == "nanogpt":
        require_fields(cfg, {"activation": ("gelu",), "tied": (True,)}, LAYOUTS[layout].family)
