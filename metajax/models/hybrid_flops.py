"""Forward operations of hybrid layers: their matrix products, the recurrence of the scan, and the pairs that their masks allow.

The meta tokens go through the layers once in a batch, whatever the number of its rows; every token then attends to them.
"""

from __future__ import annotations

import numpy as np

from metajax.config import Model
from metajax.models.hybrid import Kind, layer_groups


def layers_of(model: Model) -> list[Kind]:
    """The layers in order."""
    return [kind for group in layer_groups(model) for kind in group]


def scan_operations(channels: int, state: int) -> int:
    """Operations of one token in the scan, a transcendental function counted as one.

    For each number of the state 7: s A, its exponential, times h, (s u) B, plus, times C, plus. For each channel 6: bias and softplus
    of the step, s u, D u, which starts the sum over the state, silu of the gate and the product with it.
    """
    return channels * (7 * state + 6)


def mamba2_flops(model: Model) -> dict[str, int]:
    """Forward operations of one token in a Mamba-2, by part; its scan is counted from the recurrence, as Mamba-1's is.

    For each number of the state 5: decay h, (s x) B, plus, times C, plus. For each channel 7: s x, D x, plus, silu of the gate, its product,
    and twice for the norm. For each head 4: bias and softplus of the step, s A, its exponential.
    """
    channels, state = model.ssm_width, model.hybrid.state
    heads, mixed = model.ssm_heads, model.conv_width
    return {
        "mamba": 2 * model.width * (channels + mixed + heads),
        "conv": 2 * model.hybrid.d_conv * mixed,
        "scan": channels * (5 * state + 7) + 4 * heads,
    }


def mamba_flops(model: Model) -> dict[str, int]:
    """Forward operations of one token in a Mamba-1, by part."""
    channels, selection = model.ssm_width, model.dt_rank + 2 * model.hybrid.state
    return {
        "mamba": 2 * channels * (2 * model.width + selection + model.dt_rank),
        "conv": 2 * model.hybrid.d_conv * channels,
        "scan": scan_operations(channels, model.hybrid.state),
    }


def token_flops(model: Model) -> dict[str, int]:
    """Forward operations of one token in all layers, by part, without attention's pairs."""
    parts = dict.fromkeys(("attention", "mamba", "conv", "scan", "output", "mlp"), 0)
    width, channels, heads_out = model.width, model.ssm_width, model.heads * model.value_dim
    recurrent = mamba2_flops(model) if model.hybrid.ssm == "mamba2" else mamba_flops(model)
    kv = model.num_kv_heads * (model.head_dim + model.value_dim)
    for kind in layers_of(model):
        joined = kind.attends * heads_out, kind.scans * channels
        inner = sum(joined) if model.hybrid.fusion == "concat" else max(joined)
        parts["attention"] += kind.attends * 2 * width * (model.heads * model.head_dim + kind.owns_kv * kv)
        for name, cost in recurrent.items():
            parts[name] += kind.scans * cost
        parts["output"] += 2 * inner * width
        parts["mlp"] += 2 * width * model.mlp_width * (3 if model.activation == "swiglu" else 2)
    return {name: cost for name, cost in parts.items() if cost}


def pair_operations(model: Model) -> int:
    """Forward operations of one allowed (query, key) pair in all heads: scores and weighted sum."""
    return 2 * model.heads * (model.head_dim + model.value_dim)


def batch_pairs(model: Model, batch: dict[str, np.ndarray]) -> int:
    """Allowed (query, key) pairs of a batch in all layers, those of the meta tokens among them; padding left out."""
    earlier, metas = batch["positions"][batch["segment_ids"] > 0], model.hybrid.meta_tokens
    total = 0
    for kind in layers_of(model):
        if kind.attends:
            reach = earlier if kind.window is None else np.minimum(earlier, kind.window)
            total += int(reach.sum()) + earlier.size * (1 + metas) + metas * (metas + 1) // 2
    return total
