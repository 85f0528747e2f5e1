"""Llama in Hugging Face's names and layout: its tensors, and conversion of config.json in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metajax.config import Model
from metajax.interop.layouts import HEAD, Layout, Tensor, pairs, require_fields
from metajax.interop.settings import Settings, shared_fields, shared_values
from metajax.models.lm import LM, named_params
from metajax.models.rotary import HIGH_TURNS, LOW_TURNS, yarn_magnitude

_MAPS = {
    "self_attn.q_proj": "mixer.attention.query",
    "self_attn.k_proj": "mixer.attention.key",
    "self_attn.v_proj": "mixer.attention.value",
    "self_attn.o_proj": "mixer.output",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_FIELDS = {"hybrid": (None,), "window": (None,), "activation": ("swiglu",), "norm": ("rmsnorm",), "norm_position": ("pre",)}
LAYOUT = Layout(
    family="Llama",
    whole={"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm.scale", HEAD: "unembedding"},
    layer=pairs({"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"} | _MAPS),
    prefix="model.layers.{}.",
    buffers=("rotary_emb.inv_freq",),
    fields=_FIELDS | {"position": ("rope", "linear", "llama3", "yarn")},
)
_HARMLESS = ("is_llama_config", "max_window_layers", "original_max_position_embeddings", "pretraining_tp", "sliding_window")
_REST = {"architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "model_type": "llama"}


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json. UserError lists every setting that this model does not support."""
    read = Settings(values)
    fields, length = shared_fields(read), read.size("max_position_embeddings", 2048)
    read.choice("hidden_act", "silu", ("silu", "swish"))
    read.fixed("head_dim", fields["width"] // fields["heads"])
    read.fixed("partial_rotary_factor", 1)
    kinds, window = read.get("layer_types", []), read.get("sliding_window")
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        read.fixed("layer_types")
    if read.get("use_sliding_window") is not False and not (type(window) is int and window >= length):
        read.fixed("sliding_window")
    bias = read.flag("attention_bias", False), read.flag("mlp_bias", False)
    fields |= _positions(read, length)
    read.check_rest(_HARMLESS)
    return read.build(Model, bias=any(bias), **fields)


def _positions(read: Settings, length: int) -> dict[str, Any]:
    """The rotary scheme: `rope_parameters` in newer files, `rope_scaling` in older ones. The latter wins if both are present."""
    theta = read.number("rope_theta", 10_000.0)
    rotary = read.inside("rope_scaling" if read.get("rope_scaling") else "rope_parameters")
    read.get("rope_parameters")
    kind = rotary.choice("rope_type", rotary.get("type", "default"), ("default", "linear", "llama3", "yarn"))
    theta = rotary.number("rope_theta", theta)
    rotary.fixed("partial_rotary_factor", 1)
    found = {"position": "rope" if kind == "default" else kind, "rope_theta": theta}
    if kind != "default":
        original = read.size("original_max_position_embeddings", rotary.size("original_max_position_embeddings", length))
        default = length / original if kind == "yarn" else None
        found["rope_factor"] = factor = rotary.number("factor", default)
        found["rope_original_length"] = original if kind != "linear" else 0
        for name, value in _fixed_parts(kind, factor).items():
            rotary.fixed(name, value)
        rotary.fixed("mscale")
        rotary.fixed("mscale_all_dim")
    rotary.refuse_rest()
    return found


def _fixed_parts(kind: str, factor: float) -> dict[str, Any]:
    """The further settings of a rotary scheme, with the values that this model uses."""
    if kind == "llama3":
        return {"low_freq_factor": LOW_TURNS, "high_freq_factor": HIGH_TURNS}
    if kind == "yarn":
        return {"beta_fast": 32, "beta_slow": 1, "attention_factor": yarn_magnitude(factor), "truncate": True}
    return {}


def names(state: Mapping[str, Tensor], values: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict with zero biases added if only attention or only the feed-forward network has biases; the same function."""
    has = {kind: bool(values.get(f"{kind}_bias")) for kind in ("attention", "mlp")}
    if all(has.values()) or not any(has.values()):
        return state
    parts = [part for part in _MAPS if not has["mlp" if part.startswith("mlp.") else "attention"]]
    ends = tuple(f".{part}.weight" for part in parts)
    biases = {name: tensor.shape[0] for name, tensor in state.items() if name.endswith(ends) and len(tensor.shape) == 2}
    zeros = {name.removesuffix("weight") + "bias": np.broadcast_to(np.float32(0), (rows,)) for name, rows in biases.items()}
    return zeros | dict(state)


def zero_biases(model: LM) -> dict[str, tuple[str, ...]]:
    """{setting: suffixes of tensor names} of biases that are all zero."""
    params = named_params(model)
    found = {}
    for setting, start in (("attention_bias", "self_attn."), ("mlp_bias", "mlp.")):
        parts = {part: f"blocks.0.0.{path}.b" for part, path in _MAPS.items() if part.startswith(start)}
        if not any(np.any(params[path][...]) for path in parts.values() if path in params):
            found[setting] = tuple(f".{part}.bias" for part in parts)
    return found


def hub_config(cfg: Model, length: int) -> dict[str, Any]:
    """The values of config.json for a model with sequences of `length` tokens. UserError for fields that Llama lacks."""
    require_fields(cfg, LAYOUT)
    scaling = None
    if cfg.position != "rope":
        original = {"original_max_position_embeddings": cfg.rope_original_length} if cfg.position != "linear" else {}
        scaling = {"rope_type": cfg.position, "factor": cfg.rope_factor} | original | _fixed_parts(cfg.position, cfg.rope_factor)
    values = {"attention_bias": cfg.bias, "mlp_bias": cfg.bias, "head_dim": cfg.head_dim, "max_position_embeddings": length}
    values |= {"rope_scaling": scaling, "rope_theta": cfg.rope_theta, "use_cache": True}
    return _REST | shared_values(cfg) | values
