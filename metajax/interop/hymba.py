"""Hymba as released: its tensors, and conversion of config.json in both directions.

One in-projection holds the rows of query, key, value, scan input and gate, in this order (key and value only if `owns_kv`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metajax.config import Hybrid, Model, hymba_ntk_factor
from metajax.core.errors import require
from metajax.interop.layouts import HEAD, Layout, pairs, require_fields
from metajax.interop.settings import Settings, shared_fields, shared_values, shown

_ATTENTION, _MAMBA = "mixer.attention", "mixer.mamba"
_IN_PROJECTION = (f"{_ATTENTION}.query", f"{_ATTENTION}.key", f"{_ATTENTION}.value", f"{_MAMBA}.in_proj", f"{_MAMBA}.gate_proj")
LAYOUT = Layout(
    family="Hymba",
    whole={
        "model.embed_tokens.weight": "embedding",
        "model.memory_tokens": "prefix",
        "model.final_layernorm.weight": "final_norm.scale",
        HEAD: "unembedding",
    },
    layer=pairs({"mamba.in_proj": " ".join(_IN_PROJECTION), "mamba.out_proj": "mixer.output"})
    | {"mamba.conv1d.weight": f"{_MAMBA}.conv", "mamba.conv1d.bias": f"{_MAMBA}.conv_bias"}
    | pairs({"mamba.x_proj.0": f"{_MAMBA}.x_proj"})
    | {"mamba.dt_proj.0.weight": f"{_MAMBA}.dt_proj.w", "mamba.dt_proj.0.bias": f"{_MAMBA}.dt_bias"}
    | {"mamba.A_log.0": f"{_MAMBA}.A_log", "mamba.D.0": f"{_MAMBA}.D"}
    | pairs({f"mamba.{name}_layernorm": f"{_MAMBA}.{name.lower()}_norm" for name in ("dt", "B", "C")})
    | pairs(
        {
            "mamba.pre_avg_layernorm1": "mixer.attention_norm",
            "mamba.pre_avg_layernorm2": "mixer.mamba_norm",
            "input_layernorm": "mixer_norm",
            "pre_moe_layernorm": "mlp_norm",
            "moe.experts.0.gate_proj": "mlp.gate",
            "moe.experts.0.up_proj": "mlp.up",
            "moe.experts.0.down_proj": "mlp.down",
        }
    ),
    prefix="model.layers.{}.",
    buffers=("rotary_emb.inv_freq",),
    fields={
        "hybrid.fusion": ("mean",),
        "hybrid.ssm": ("mamba",),
        "hybrid.branch_norm": ("scaled",),
        "norm": ("rmsnorm",),
        "norm_position": ("pre",),
        "activation": ("swiglu",),
        "bias": (False,),
        "position": ("rope", "ntk", "none"),
    },
)
# Settings of the released code that this model does not support, with their only accepted values.
_FIXED = {"hidden_act": "silu", "mlp_hidden_act": "silu", "mamba_conv_bias": True, "mamba_proj_bias": False}
_FIXED |= {"num_mamba": 1, "num_experts": 1, "attn_hidden_size": -1, "kq_head_dim": -1, "kq_norm": "none"}
_FIXED |= {"kv_weight_reuse": False, "kv_reuse_every_i_layer": -1, "memory_tokens_interspersed_every": 0}
# Other entries of the released file, which affect no result. auto_map names the authors' code, to be copied next to the file.
_CODE = {"AutoConfig": "configuration_hymba.HymbaConfig", "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM"}
_REST = {"architectures": ["HymbaForCausalLM"], "auto_map": _CODE, "model_type": "hymba", "transformers_version": "4.44.0"}
_REST |= {"attention_dropout": 0.0, "attn_implementation": "flex", "attn_implementation_new": "flex", "use_cache": False}
_REST |= {"calc_logits_for_entire_prompt": False, "num_experts_per_tok": 1, "output_router_logits": False}
_REST |= {"router_aux_loss_coef": 0.001, "use_mamba_kernels": True}
_HARMLESS = (*_REST, "conv_dim", "seq_length", "v_head_dim")  # the code overwrites v_head_dim and conv_dim


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json, with the released code's defaults. UserError lists every setting that is not supported here."""
    read = Settings(values)
    for name, value in _FIXED.items():
        read.fixed(name, value)
    fields = shared_fields(read)
    layers, rank = fields["layers"], read.get("mamba_dt_rank", "auto")
    kinds, full = read.get("layer_type", ["h"] * layers), read.get("global_attn_idx", [])
    if kinds != ["h"] * layers:
        read.refuse("layer_type", kinds, f"only 'h' for each of {layers} layers is supported")
    if not (isinstance(full, list) and all(type(layer) is int and 0 <= layer < layers for layer in full)):
        full = read.refuse("global_attn_idx", full, f"a list of layers from 0 to {layers - 1} is needed", ())
    window = None if read.get("sliding_window") is None else read.size("sliding_window")
    hybrid = {
        "prefix_tokens": read.size("num_memory_tokens", 0, least=0),
        "full_layers": tuple(full) if window is not None else (),
        "kv_groups": _group_sizes(read, layers),
        "expand": read.size("mamba_expand", 2),
        "state": read.size("mamba_d_state", 16),
        "d_conv": read.size("mamba_d_conv", 4, least=2, most=4),
        "dt_rank": -(-fields["width"] // 16) if rank == "auto" else read.size("mamba_dt_rank"),
        "inner_norms": read.flag("mamba_inner_layernorms", True),
    }
    fields |= _positions(read)
    read.check_rest(_HARMLESS)
    return read.build(lambda: Model(**fields, bias=False, window=window, hybrid=Hybrid(**hybrid)))


def _positions(read: Settings) -> dict[str, Any]:
    theta, length = read.number("rope_theta", 10_000.0), read.size("max_position_embeddings", 2048)
    kind = read.choice("rope_type", "default", ("default", "ntk"))
    original = read.size("orig_max_position_embeddings", None if kind == "ntk" else length)
    if not read.flag("rope", False):
        return {"position": "none"}
    if kind == "default":
        return {"position": "rope", "rope_theta": theta}
    factor = hymba_ntk_factor(length, original)
    return {"position": "ntk", "rope_theta": theta, "rope_factor": factor, "rope_original_length": original}


def _group_sizes(read: Settings, layers: int) -> tuple[int, ...]:
    """Group sizes in layer order; a layer in no group is a group of one. () if no keys are shared."""
    groups = read.get("kv_reuse_group", [])
    groups = groups if isinstance(groups, list) else [groups]
    by_first: dict[int, list[int]] = {}
    for group in groups:
        fits = isinstance(group, list) and group and all(type(layer) is int for layer in group)
        if fits and group == list(range(group[0], group[0] + len(group))) and 0 <= group[0] <= group[-1] < layers:
            by_first[group[0]] = group
        else:
            read.problems.append(f"kv_reuse_group has {shown(repr(group))}, but only layers that follow each other are supported")
    if len({layer for group in by_first.values() for layer in group}) < sum(map(len, by_first.values())):
        read.problems.append("kv_reuse_group has a layer in two groups")
    sizes, layer = [], 0
    while layer < layers:
        sizes.append(len(by_first.get(layer, [layer])))
        layer += sizes[-1]
    return tuple(sizes) if max(sizes) > 1 else ()


def hub_config(cfg: Model, length: int) -> dict[str, Any]:
    """The released keys of config.json for a model and sequence length. UserError for fields that the released code lacks."""
    require(cfg.hybrid is not None, "model.hybrid is null: only a hybrid model has a place in Hymba's layout")
    require_fields(cfg, LAYOUT)
    hybrid, groups, layers = cfg.hybrid, cfg.hybrid.kv_groups, cfg.layers
    require(
        cfg.mlp_width > 0 and cfg.head_dim * cfg.heads == cfg.width and cfg.value_dim == hybrid.expand * cfg.head_dim,
        "model.mlp_width = 0, model.hybrid.head_dim and model.hybrid.value_dim of their own have no place in Hymba's layout",
    )
    starts = np.cumsum([0, *groups]).tolist()
    shared = [list(range(start, start + size)) for start, size in zip(starts, groups, strict=False) if size > 1]
    values = {"layer_type": ["h"] * layers, "global_attn_idx": list(hybrid.full_layers), "kv_reuse_group": shared}
    values |= {"num_memory_tokens": hybrid.prefix_tokens, "seq_length": length, "sliding_window": cfg.window}
    values |= {"mamba_expand": hybrid.expand, "mamba_d_state": hybrid.state, "mamba_d_conv": hybrid.d_conv}
    values |= {"mamba_dt_rank": cfg.dt_rank, "mamba_inner_layernorms": hybrid.inner_norms, "v_head_dim": cfg.value_dim}
    values["conv_dim"] = {str(layer): cfg.ssm_width for layer in range(layers)}
    return _FIXED | _REST | shared_values(cfg) | _hub_positions(cfg, length) | values


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
