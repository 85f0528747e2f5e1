"""Analytic training FLOPs: exact for the matrix products, and for the (query, key) pairs a mask allows.

A multiply-add is two operations; the backward pass costs twice the forward pass; recomputation is not counted.
"""

from __future__ import annotations

import jax
import numpy as np

from metajax.config import Config
from metajax.models import hybrid_flops
from metajax.models.masks import Mask

# Peak dense bf16 operations per second of one chip, by jax's device kind (vendors' published figures).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def matmul_flops(config: Config, vocab_size: int) -> dict[str, int]:
    """Forward operations of the matrix products, by part, for one slot ("meta_attention": see `_meta_rows`).

    Those of a hybrid model have its convolution and scan with them.
    """
    model = config.model
    if model.hybrid is not None:
        return hybrid_flops.token_flops(model) | {"head": 2 * model.width * vocab_size}
    kv = model.num_kv_heads * model.head_dim
    attention = 2 * model.width * (2 * model.width + 2 * kv)
    mlp = 2 * model.width * model.mlp_width * (3 if model.activation == "swiglu" else 2)
    parts = {"attention": model.layers * attention, "mlp": model.layers * mlp, "head": 2 * model.width * vocab_size}
    if config.meta_tokens is not None and config.meta_tokens.attention != "none":
        parts["meta_attention"] = model.layers * attention
    return parts


def _meta_rows(config: Config, metas: int, slots: int) -> int:
    """Tokens that meta-attention is for: the meta-tokens, or all where it writes to ordinary tokens too."""
    return slots if config.meta_tokens is not None and config.meta_tokens.writes_everywhere else metas


def pair_flops(config: Config) -> int:
    """Forward operations of one allowed (query, key) pair in all heads of one attention: scores and weighted sum."""
    return 4 * config.model.width


def batch_pairs(config: Config, batch: dict[str, np.ndarray]) -> tuple[int, int]:
    """Allowed (query, key) pairs of a batch in one layer: (causal attention, meta-attention), padding left out."""
    real = batch["segment_ids"] > 0
    window = config.model.window
    reach = batch["positions"] + 1 if window is None else np.minimum(batch["positions"], window) + 1
    causal = int(reach[real].sum())
    if "meta_slots" not in batch or config.meta_tokens is None or config.meta_tokens.attention == "none":
        return causal, 0
    behind = ((0, 0), (0, 1))  # an unused slot points behind the row: no segment, no past
    slots = np.minimum(batch["meta_slots"], real.shape[1])
    segments = np.take_along_axis(np.pad(batch["segment_ids"], behind), slots, axis=1)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    among = int(np.tril(same).sum())
    if not config.meta_tokens.writes_everywhere:
        return causal, among
    past = np.pad(np.where(real, batch["positions"] + 1, 0), behind)
    if config.meta_tokens.attention == "causal":
        return causal, int(past.sum())
    np.put_along_axis(past, slots, 0, axis=1)  # ordinary tokens attend to their past, meta-tokens to meta-tokens
    return causal, int(past.sum()) + among


def passes(config: Config) -> int:
    """What a step costs in forward passes: the backward pass is two, the reference's of `dpo` one."""
    return 3 + (config.dpo is not None)


def step_flops(config: Config, vocab_size: int, batch: dict[str, np.ndarray]) -> int:
    """Operations of one training step on this batch, all hosts' rows included when `batch` holds them all."""
    slots = batch["tokens"].size
    metas = batch["meta_slots"].size if "meta_slots" in batch else 0
    parts = matmul_flops(config, vocab_size)
    if config.model.hybrid is not None:
        pairs = hybrid_flops.pair_operations(config.model) * hybrid_flops.batch_pairs(config.model, batch)
        in_front = config.model.hybrid.meta_tokens * (sum(parts.values()) - parts["head"])
        return passes(config) * (slots * sum(parts.values()) + in_front + pairs)
    dense = sum(cost * (_meta_rows(config, metas, slots) if name == "meta_attention" else slots) for name, cost in parts.items())
    causal, meta = batch_pairs(config, batch)
    return passes(config) * (dense + config.model.layers * pair_flops(config) * (causal + meta))


def flops_per_token(config: Config, vocab_size: int) -> dict[str, float]:
    """Training operations a slot by part, for a row that is one document (the most attention a row can need)."""
    slots = config.row_slots
    if config.model.hybrid is not None:
        return _hybrid_per_token(config, vocab_size)
    metas = _meta_rows(config, config.row_meta_tokens, slots)
    times = float(passes(config))
    parts = {k: times * v * (metas / slots if k == "meta_attention" else 1) for k, v in matmul_flops(config, vocab_size).items()}
    scale = times * config.model.layers * pair_flops(config) / slots
    parts["attention_pairs"] = scale * Mask(window=config.model.window).pairs([slots])
    if "meta_attention" in parts:
        parts["meta_attention"] += scale * Mask().pairs([metas])
    return parts


def _hybrid_per_token(config: Config, vocab_size: int) -> dict[str, float]:
    """`flops_per_token` of a hybrid model; the meta tokens' own part is shared by all slots of a batch."""
    model, rows, slots = config.model, config.data.batch_rows, config.row_slots
    batch = {"positions": np.tile(np.arange(slots), (rows, 1)), "segment_ids": np.ones((rows, slots), np.int32)}
    share, times = 1 + model.hybrid.meta_tokens / (rows * slots), float(passes(config))
    parts = {name: times * cost * (1 if name == "head" else share) for name, cost in matmul_flops(config, vocab_size).items()}
    pairs = hybrid_flops.pair_operations(model) * hybrid_flops.batch_pairs(model, batch)
    return parts | ({"attention_pairs": times * pairs / (rows * slots)} if "attention" in parts else {})


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Peak bf16 operations per second of these devices together, or None when the chip is not known."""
    per_chip = PEAK_FLOPS.get(devices[0].device_kind)
    return None if per_chip is None else per_chip * len(devices)
