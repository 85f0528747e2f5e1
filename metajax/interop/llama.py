"""Llama as Hugging Face names and lays it out: its tensors, and config.json both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metajax.config import Model, require
from metajax.interop.layouts import HEAD, Layout, require_fields

_ATTENTION = "attention.projections"
_MAPS = {
    "self_attn.q_proj": f"{_ATTENTION}.query",
    "self_attn.k_proj": f"{_ATTENTION}.key",
    "self_attn.v_proj": f"{_ATTENTION}.value",
    "self_attn.o_proj": f"{_ATTENTION}.output",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
LAYOUT = Layout(
    family="Llama",
    whole={"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm.scale", HEAD: "unembedding"},
    layer={
        "input_layernorm.weight": ("attention_norm.scale",),
        "post_attention_layernorm.weight": ("mlp_norm.scale",),
        **{f"{name}.weight": (f"{path}.w",) for name, path in _MAPS.items()},
        **{f"{name}.bias": (f"{path}.b",) for name, path in _MAPS.items()},
    },
    prefix="model.layers.{}.",
    buffers=("rotary_emb.inv_freq",),
)
# What Hugging Face's code can be told and this model cannot.
_FIXED = {"hidden_act": "silu", "rope_scaling": None}
_REST = {"architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0, "model_type": "llama", "use_cache": True}
# What this model can be told and Hugging Face's code cannot.
_KNOWN = {
    "hybrid": (None,), "window": (None,), "activation": ("swiglu",), "norm": ("rmsnorm",), "norm_position": ("pre",), "position": ("rope",),
}  # fmt: skip


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json. UserError for a setting that this model cannot follow."""
    rotary = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 10_000.0)}  # of newer and of older files
    width, heads, bias = values["hidden_size"], values["num_attention_heads"], values.get("attention_bias", False)
    fixed = _FIXED | {"mlp_bias": bias, "head_dim": width // heads}
    kind = rotary.get("rope_type", "default")
    require(kind == "default", f"config.json: rope_type = {kind!r}, but only 'default' is supported here")
    for name, value in fixed.items():
        found = values.get(name, value)
        found = value if found is None else found
        require(found == value, f"config.json: {name} = {found!r}, but only {value!r} is supported here")
    return Model(
        layers=values["num_hidden_layers"], width=width, heads=heads, kv_heads=values.get("num_key_value_heads") or heads,
        mlp_width=values["intermediate_size"], activation="swiglu", norm="rmsnorm", norm_eps=values.get("rms_norm_eps", 1e-6), bias=bias,
        tied=values.get("tie_word_embeddings", False), position="rope", rope_theta=rotary["rope_theta"],
        init_std=values.get("initializer_range", 0.02),
    )  # fmt: skip


def hub_config(cfg: Model, length: int) -> dict[str, Any]:
    """What config.json says of a model for rows of `length` tokens. UserError for what Llama does not have."""
    require_fields(cfg, _KNOWN, "Llama")
    return _FIXED | _REST | {
        "attention_bias": cfg.bias, "head_dim": cfg.head_dim, "hidden_size": cfg.width, "initializer_range": cfg.init_std,
        "intermediate_size": cfg.mlp_width, "max_position_embeddings": length, "mlp_bias": cfg.bias, "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.layers, "num_key_value_heads": cfg.num_kv_heads, "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tied,
    }  # fmt: skip
