"""Hymba as it was released: its tensors, and its config.json both ways.

One in-projection holds the rows of query, key, value (both only where a layer owns its keys), scan input and gate, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metajax.config import Hybrid, Model, Runtime, require
from metajax.interop.layouts import Layout, Tensor, load_model, require_fields, tensors_of
from metajax.model_config import hymba_ntk_factor
from metajax.models.lm import LM

_MAMBA, _HEADS = "mixer.mamba", "mixer.attention"
LAYOUT = Layout(
    family="Hymba",
    whole={
        "model.embed_tokens.weight": "embedding",
        "model.memory_tokens": "blocks.meta_tokens",
        "model.final_layernorm.weight": "final_norm.scale",
    },
    layer={
        "mamba.in_proj.weight": (
            f"{_HEADS}.query.w",
            f"{_HEADS}.key.w",
            f"{_HEADS}.value.w",
            f"{_MAMBA}.input.w",
            f"{_MAMBA}.gate.w",
        ),
        "mamba.out_proj.weight": ("mixer.output.w",),
        "mamba.conv1d.weight": (f"{_MAMBA}.conv",),
        "mamba.conv1d.bias": (f"{_MAMBA}.conv_bias",),
        "mamba.x_proj.0.weight": (f"{_MAMBA}.select.w",),
        "mamba.dt_proj.0.weight": (f"{_MAMBA}.step.w",),
        "mamba.dt_proj.0.bias": (f"{_MAMBA}.step_bias",),
        "mamba.A_log.0": (f"{_MAMBA}.log_rate",),
        "mamba.D.0": (f"{_MAMBA}.skip",),
        "mamba.dt_layernorm.weight": (f"{_MAMBA}.step_norm.scale",),
        "mamba.B_layernorm.weight": (f"{_MAMBA}.b_norm.scale",),
        "mamba.C_layernorm.weight": (f"{_MAMBA}.c_norm.scale",),
        "mamba.pre_avg_layernorm1.weight": ("mixer.attention_norm.scale",),
        "mamba.pre_avg_layernorm2.weight": ("mixer.ssm_norm.scale",),
        "input_layernorm.weight": ("mixer_norm.scale",),
        "pre_moe_layernorm.weight": ("mlp_norm.scale",),
        "moe.experts.0.gate_proj.weight": ("mlp.gate.w",),
        "moe.experts.0.up_proj.weight": ("mlp.up.w",),
        "moe.experts.0.down_proj.weight": ("mlp.down.w",),
    },
    prefix="model.layers.{}.",
    buffers=("rotary_emb.inv_freq",),
)
# What the released code can be told and this model cannot.
_FIXED = {
    "hidden_act": "silu", "mlp_hidden_act": "silu", "mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False, "num_mamba": 1,
    "num_experts": 1, "attn_hidden_size": -1, "kq_head_dim": -1, "kq_norm": "none", "kv_weight_reuse": False,
    "kv_reuse_every_i_layer": -1, "memory_tokens_interspersed_every": 0, "tie_word_embeddings": True,
}  # fmt: skip
# What the released file says besides and no number depends on; auto_map names the authors' own code, to be copied beside it.
_REST = {
    "architectures": ["HymbaForCausalLM"], "attention_dropout": 0.0, "attn_implementation": "flex", "attn_implementation_new": "flex",
    "auto_map": {"AutoConfig": "configuration_hymba.HymbaConfig", "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM"},
    "calc_logits_for_entire_prompt": False, "model_type": "hymba", "num_experts_per_tok": 1, "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "transformers_version": "4.44.0", "use_cache": False, "use_mamba_kernels": True,
}  # fmt: skip
# What this model can be told and the released code cannot.
_KNOWN = {
    "hybrid.fusion": ("mean",), "hybrid.ssm": ("mamba",), "hybrid.branch_norm": ("scaled",), "norm": ("rmsnorm",), "norm_position": ("pre",), "activation": ("swiglu",),
    "bias": (False,), "tied": (True,), "position": ("rope", "ntk", "none"),
}  # fmt: skip


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json. UserError for a setting that this model cannot follow.

    `v_head_dim` is not read: the released code overwrites it.
    """
    for name, value in _FIXED.items():
        found = values.get(name, value)
        require(found == value, f"config.json: {name} = {found!r}, but only {value!r} is supported")
    kinds = set(values.get("layer_type", ["h"]))
    require(kinds == {"h"}, f"config.json: layer_type has {', '.join(sorted(kinds - {'h'}))}, but only 'h' is supported")
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    hybrid = Hybrid(
        meta_tokens=values.get("num_memory_tokens", 0),
        full_layers=tuple(values.get("global_attn_idx") or ()) if window is not None else (),
        kv_groups=_group_sizes(values.get("kv_reuse_group") or [], layers),
        expand=values["mamba_expand"],
        state=values["mamba_d_state"],
        dt_rank=values["mamba_dt_rank"],
        inner_norms=values["mamba_inner_layernorms"],
    )
    return Model(
        layers=layers, width=values["hidden_size"], heads=values["num_attention_heads"], kv_heads=values["num_key_value_heads"],
        mlp_width=values["intermediate_size"], activation="swiglu", norm="rmsnorm", norm_eps=values["rms_norm_eps"], bias=False, tied=True,
        window=window, init_std=values["initializer_range"], hybrid=hybrid, **_positions(values),
    )  # fmt: skip


def _positions(values: Mapping[str, Any]) -> dict[str, Any]:
    if not values.get("rope", False):
        return {"position": "none"}
    kind, theta = values.get("rope_type", "default"), values["rope_theta"]
    require(kind in ("default", "ntk"), f"config.json: rope_type = {kind!r}, but only 'default' and 'ntk' are supported")
    if kind == "default":
        return {"position": "rope", "rope_theta": theta}
    original = values["orig_max_position_embeddings"]
    factor = hymba_ntk_factor(values["max_position_embeddings"], original)
    return {"position": "ntk", "rope_theta": theta, "rope_factor": factor, "rope_original_length": original}


def _group_sizes(groups: list[list[int]], layers: int) -> tuple[int, ...]:
    """Sizes in layer order, layers in no group as groups of one; () when nothing is shared."""
    by_first = {group[0]: group for group in groups}
    for group in groups:
        together = list(range(group[0], group[0] + len(group)))
        require(
            group == together, f"config.json: kv_reuse_group has {group}, but only layers that follow each other are supported"
        )
    sizes, layer = [], 0
    while layer < layers:
        sizes.append(len(by_first.get(layer, [layer])))
        layer += sizes[-1]
    return tuple(sizes) if max(sizes) > 1 else ()


def hub_config(cfg: Model, length: int) -> dict[str, Any]:
    """What config.json says of a model for rows of `length` tokens, in the released file's keys. UserError for what the released code cannot be told."""
    require(cfg.hybrid is not None, "model.hybrid is null: only a hybrid model has a place in Hymba's layout")
    require_fields(cfg, _KNOWN, "Hymba's layout")
    hybrid, groups, layers = cfg.hybrid, cfg.hybrid.kv_groups, cfg.layers
    require(
        cfg.mlp_width > 0 and cfg.head_dim * cfg.heads == cfg.width and cfg.value_dim == hybrid.expand * cfg.head_dim,
        "model.mlp_width = 0, model.hybrid.head_dim and model.hybrid.value_dim of their own have no place in Hymba's layout",
    )
    starts = np.cumsum([0, *groups]).tolist()
    shared = [list(range(start, start + size)) for start, size in zip(starts, groups, strict=False) if size > 1]
    return _FIXED | _REST | _hub_positions(cfg, length) | {
        "conv_dim": {str(layer): cfg.ssm_width for layer in range(layers)},
        "global_attn_idx": list(hybrid.full_layers), "hidden_size": cfg.width, "initializer_range": cfg.init_std,
        "intermediate_size": cfg.mlp_width, "kv_reuse_group": shared, "layer_type": ["h"] * layers, "mamba_d_state": hybrid.state,
        "mamba_dt_rank": cfg.dt_rank, "mamba_expand": hybrid.expand, "mamba_inner_layernorms": hybrid.inner_norms,
        "num_attention_heads": cfg.heads, "num_hidden_layers": layers, "num_key_value_heads": cfg.num_kv_heads,
        "num_memory_tokens": hybrid.meta_tokens, "rms_norm_eps": cfg.norm_eps, "seq_length": length, "sliding_window": cfg.window, "v_head_dim": cfg.value_dim,
    }  # fmt: skip


def _hub_positions(cfg: Model, length: int) -> dict[str, Any]:
    values = {"rope": cfg.position != "none", "rope_theta": cfg.rope_theta}
    if cfg.position != "ntk":
        return values | {"rope_type": "default", "max_position_embeddings": length, "orig_max_position_embeddings": length}
    original = cfg.rope_original_length
    longest = round((cfg.rope_factor + 1) / 2 * original)
    require(
        hymba_ntk_factor(longest, original) == cfg.rope_factor,
        f"model.rope_factor = {cfg.rope_factor} is not 2 n / model.rope_original_length - 1 for a whole n, as Hymba's layout has it",
    )
    return values | {"rope_type": "ntk", "max_position_embeddings": longest, "orig_max_position_embeddings": original}


def from_hymba(state: Mapping[str, Tensor], cfg: Model, *, vocab_size: int | None = None, runtime: Runtime | None = None) -> LM:
    """An LM with the weights of a Hymba state dict; see `load_model`."""
    return load_model(state, cfg, LAYOUT, vocab_size=vocab_size, runtime=runtime)


def to_hymba(model: LM) -> dict[str, np.ndarray]:
    """The state dict of an LM in the released names and shapes, float32, without the tied head."""
    return dict(tensors_of(model, LAYOUT))
