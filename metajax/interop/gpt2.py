"""GPT-2 in Hugging Face's names and layout: its tensors, and conversion of config.json in both directions.

Linear maps are stored as [in, out], with query, key and value fused in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from metajax.config import Model, Runtime
from metajax.core.errors import require
from metajax.interop.layouts import HEAD, Layout, Tensor, pairs, require_fields
from metajax.interop.settings import MOST, MOST_LAYERS, Settings
from metajax.models.lm import LM, named_params

LAYOUT = Layout(
    family="GPT-2",
    whole={"transformer.wte.weight": "embedding", "transformer.wpe.weight": "positions"}
    | pairs({"transformer.ln_f": "final_norm"})
    | {HEAD: "unembedding"},
    layer=pairs(
        {
            "ln_1": "mixer_norm",
            "attn.c_attn": "mixer.attention.query mixer.attention.key mixer.attention.value",
            "attn.c_proj": "mixer.output",
            "ln_2": "mlp_norm",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
        }
    ),
    prefix="transformer.h.{}.",
    turned=(),
    buffers=(".attn.bias", ".attn.masked_bias"),
    fields={
        "hybrid": (None,),
        "window": (None,),
        "activation": ("gelu_tanh", "gelu", "relu"),
        "norm": ("layernorm",),
        "norm_position": ("pre",),
        "position": ("learned",),
    },
)
# Hugging Face's name -> ours. The first of several names is written.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu"}
_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# The last one sets the dtype of products, which are float32 here.
_HARMLESS = """
    attn_pdrop embd_pdrop n_ctx n_special predict_special_tokens resid_pdrop summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj reorder_and_upcast_attn
""".split()
_SIZES = {"n_embd": "width", "n_head": "heads", "n_layer": "layers", "n_positions": "max_positions"}
# Names that Hugging Face accepts as synonyms.
_OTHER_NAMES = dict(
    zip(_SIZES, ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"), strict=True)
)
_REST = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "use_cache": True}
_REST |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json. UserError lists every setting that this model does not support."""
    read = Settings(values)
    sizes = {
        name: read.size(name, read.get(other), most=MOST_LAYERS if name == "n_layer" else MOST)
        for name, other in _OTHER_NAMES.items()
    }
    for name, value in (_FIXED | {other: sizes[name] for name, other in _OTHER_NAMES.items()}).items():
        read.fixed(name, value)
    fields = {ours: sizes[name] for name, ours in _SIZES.items()}
    fields["mlp_width"] = read.size("n_inner", 4 * sizes["n_embd"], most=4 * MOST)
    fields["activation"] = _ACTIVATIONS[read.choice("activation_function", "gelu_new", _ACTIVATIONS)]
    fields["norm_eps"] = read.number("layer_norm_epsilon", 1e-5)
    fields["tied"] = read.flag("tie_word_embeddings", True)
    fields["init_std"] = read.number("initializer_range", 0.02)
    read.check_rest(_HARMLESS)
    return read.build(Model, norm="layernorm", bias=True, position="learned", **fields)


def hub_config(cfg: Model, length: int) -> dict[str, Any]:
    """The values of config.json for a model with `length` positions. UserError for fields that GPT-2 lacks."""
    require_fields(cfg, LAYOUT)
    require(cfg.num_kv_heads == cfg.heads, f"model.num_kv_heads is {cfg.num_kv_heads}, but GPT-2 has {cfg.heads} alone")
    values = {name: getattr(cfg, ours) for name, ours in _SIZES.items()}
    values |= {"n_ctx": length, "n_positions": length, "n_inner": cfg.mlp_width, "layer_norm_epsilon": cfg.norm_eps}
    values["activation_function"] = next(name for name, ours in _ACTIVATIONS.items() if ours == cfg.activation)
    return _FIXED | _REST | values | {"initializer_range": cfg.init_std, "tie_word_embeddings": cfg.tied}


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
