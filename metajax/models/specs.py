"""Maps a config to the layer specs of its model. Only this file distinguishes GPT-2, Llama, Hymba and sequential hybrids."""

from __future__ import annotations

import itertools

from metajax.config import Hybrid, MetaTokens, Model
from metajax.core.errors import require
from metajax.models.layers import residual_std
from metajax.models.mixers import MIXERS, LayerSpec
from metajax.models.rotary import rotary_of

Group = tuple[LayerSpec, ...]


def layer_groups(cfg: Model, meta: MetaTokens | None) -> list[Group]:
    """The layers in order, in groups that are stacked as one unit: layers that share keys and values, or a sequential pair.

    Raises:
      UserError: `model.position` or `model.hybrid.ssm` is not registered, or not fit for this model.
    """
    rotary_of(cfg)
    if cfg.hybrid is None:
        form = "none" if meta is None else meta.attention
        layer = LayerSpec(window=cfg.window, meta_attention=form, residual_std=residual_std(cfg), split_keys=False)
        return [(layer,)] * cfg.layers
    ssm, groups, start = cfg.hybrid.ssm, [], 0
    is_known = MIXERS.find(ssm, "model.hybrid.ssm").in_hybrid
    require(is_known, f"model.hybrid.ssm = {ssm!r}: name a mixer other than attention, such as mamba")
    sequential = cfg.hybrid.fusion == "sequential"
    for size in (2,) * (cfg.layers // 2) if sequential else cfg.hybrid.kv_groups or (1,) * cfg.layers:
        groups.append(tuple(_hybrid_layer(cfg, cfg.hybrid, start + i, owns_kv=sequential or i == 0) for i in range(size)))
        start += size
    return groups


def _hybrid_layer(cfg: Model, hybrid: Hybrid, index: int, *, owns_kv: bool) -> LayerSpec:
    names = {"attention": ("attention",), "mamba": (hybrid.ssm,)}
    names["sequential"] = names["attention" if index % 2 else "mamba"]
    mixers = names.get(hybrid.fusion, ("attention", hybrid.ssm))
    attends = "attention" in mixers
    return LayerSpec(
        mixers=mixers,
        join=hybrid.fusion if hybrid.fusion in ("mean", "concat") else "alone",
        branch_norm=hybrid.branch_norm if hybrid.is_parallel else "none",
        window=cfg.layer_window(index) if attends else None,
        owns_kv=attends and owns_kv,
        mlp=cfg.mlp_width > 0,
        residual_std=cfg.init_std,  # Hymba's released code initialises these projections like all others
    )


def layer_specs(cfg: Model, meta: MetaTokens | None = None) -> list[LayerSpec]:
    """The layer specs in order."""
    return [layer for group in layer_groups(cfg, meta) for layer in group]


def layer_runs(cfg: Model, meta: MetaTokens | None = None) -> list[tuple[Group, int]]:
    """(group, number of consecutive equal groups): each run is stacked and scanned."""
    return [(group, len(list(alike))) for group, alike in itertools.groupby(layer_groups(cfg, meta))]
